//! Keys and values, one by one.

use std::path::Path;
use std::time::Duration;

use pegaflow::topology::{
    Capacity, CpuRequest, Device, GpuRequest, GpuSelector, HugepageRequest, ModelRef, NumaRequest,
    ProblemKind as Kind, RuntimeSettings, Topology, TopologyErrors,
};

use crate::{PD, assert_one, cuda, problems, unified, unified_cpu};

#[test]
fn the_smallest_file_has_all_defaults() {
    let topology = Topology::parse(
        &unified("").replace("device = \"cuda\"", ""),
        Path::new("dir/My_file.toml"),
    )
    .unwrap();
    assert_eq!(topology.name, "my-file");
    assert_eq!(topology.device, Device::Cuda);
    assert_eq!(
        topology.model,
        ModelRef::HuggingFace("owner/name".to_owned())
    );
    assert_eq!(topology.served_model_name, "name");
    assert_eq!(topology.block_size, 16);
    assert_eq!(topology.runtime, RuntimeSettings::Path);
    assert_eq!(topology.supervisor.crash_window, Duration::from_secs(1800));
    let node = &topology.nodes[0];
    assert_eq!((node.name.as_str(), node.count), ("unified", 1));
    assert_eq!(node.gpus, GpuRequest::Auto);
    assert_eq!(
        (node.tensor_parallel, node.port, node.kv_cache),
        (1, None, None)
    );

    let cpu = Topology::parse(&unified_cpu(""), Path::new("t.toml")).unwrap();
    assert_eq!(cpu.block_size, 32);
    assert_eq!(cpu.kv.canary_logprob_tolerance, None);
    assert_eq!(cpu.nodes[0].kv_cache, Some(1 << 30));
}

#[test]
fn every_key_is_read() {
    let text = r#"
name = "full"
device = "cuda"
model = "./weights"
served_model_name = "m"
dtype = "bfloat16"
block_size = 64
max_model_len = 4096
[runtime]
kind = "managed"
python_version = "3.12"
requirements = ["vllm==1"]
overrides = ["torch==2"]
[kv]
capacity = "2GiB"
hugepages = "on"
numa = [1, 0]
handoff_deadline = "7s"
allow_unproven_models = true
save_decoded = true
verify = true
canary_logprob_tolerance = 1
[router]
listen = "0.0.0.0:9000"
connect_timeout = "1s"
first_byte_timeout = "2s"
chunk_timeout = "3s"
handoff_timeout = "4s"
head_timeout = "5s"
body_timeout = "6s"
max_body = "5MiB"
max_in_flight = 6
max_queue = 0
queue_timeout = "0s"
drain_timeout = "8s"
replay = false
[supervisor]
start_timeout = "1m"
health_interval = "2s"
hang_timeout = "3s"
idle_canary = "0s"
stop_grace = "4s"
backoff_first = "5s"
backoff_max = "6s"
crash_limit = 7
crash_window = "8m"
log_bytes = "9MiB"
log_files = 2
[[node]]
name = "p"
role = "prefill"
gpus = [0, "GPU-a"]
args = ["--max-num-seqs", "8"]
env = { A = "b" }
port = 9001
gpu_memory_fraction = 0.5
kv_cache = "3MiB"
[[node]]
name = "d"
role = "decode"
count = 2
gpus = 2
tensor_parallel = 2
"#;
    let topology = Topology::parse(text, Path::new("dir/t.toml")).unwrap();
    assert_eq!(topology.name, "full");
    assert_eq!(topology.model, ModelRef::Path("dir/./weights".into()));
    assert_eq!(topology.served_model_name, "m");
    assert_eq!(
        (topology.block_size, topology.max_model_len),
        (64, Some(4096))
    );
    assert_eq!(
        topology.runtime,
        RuntimeSettings::Managed {
            python_version: "3.12".to_owned(),
            requirements: vec!["vllm==1".to_owned()],
            overrides: vec!["torch==2".to_owned()],
        }
    );
    assert_eq!(topology.kv.capacity, Capacity::Bytes(2 << 30));
    assert_eq!(topology.kv.hugepages, HugepageRequest::On);
    assert_eq!(topology.kv.numa, NumaRequest::Nodes(vec![1, 0]));
    assert_eq!(topology.kv.handoff_deadline, Duration::from_secs(7));
    assert!(topology.kv.allow_unproven_models);
    assert!(topology.kv.save_decoded && topology.kv.verify);
    assert_eq!(topology.kv.canary_logprob_tolerance, Some(1.0));
    let router = &topology.router;
    assert_eq!(router.listen, ([0, 0, 0, 0], 9000).into());
    let seconds = [
        router.connect_timeout,
        router.first_byte_timeout,
        router.chunk_timeout,
        router.handoff_timeout,
        router.head_timeout,
        router.body_timeout,
        router.queue_timeout,
        router.drain_timeout,
    ]
    .map(|duration| duration.as_secs());
    assert_eq!(seconds, [1, 2, 3, 4, 5, 6, 0, 8]);
    assert_eq!(
        (router.max_body, router.max_in_flight, router.max_queue),
        (5 << 20, 6, 0)
    );
    assert!(!router.replay);
    let supervisor = &topology.supervisor;
    let seconds = [
        supervisor.start_timeout,
        supervisor.health_interval,
        supervisor.hang_timeout,
        supervisor.stop_grace,
        supervisor.backoff_first,
        supervisor.backoff_max,
        supervisor.crash_window,
    ]
    .map(|duration| duration.as_secs());
    assert_eq!(seconds, [60, 2, 3, 4, 5, 6, 480]);
    assert_eq!(supervisor.idle_canary, None);
    assert_eq!((supervisor.crash_limit, supervisor.log_bytes), (7, 9 << 20));
    assert_eq!(supervisor.log_files, 2);
    let [p, d] = &topology.nodes[..] else {
        panic!("two nodes")
    };
    assert_eq!(
        p.gpus,
        GpuRequest::Listed(vec![
            GpuSelector::Index(0),
            GpuSelector::Uuid("GPU-a".to_owned())
        ])
    );
    assert_eq!(
        (p.tensor_parallel, p.port, p.kv_cache),
        (2, Some(9001), Some(3 << 20))
    );
    assert_eq!(p.args, ["--max-num-seqs", "8"]);
    assert_eq!(p.env["A"], "b");
    assert_eq!(p.gpu_memory_fraction, 0.5);
    assert_eq!(
        (d.count, d.tensor_parallel, &d.gpus),
        (2, 2, &GpuRequest::Auto)
    );
    assert_eq!(d.cpus, CpuRequest::Auto);
    let ids: Vec<String> = d.ids().map(|id| id.to_string()).collect();
    assert_eq!(ids, ["d-0", "d-1"]);
}

#[test]
fn syntax_errors_have_a_place() {
    assert_one!("model = \n".to_owned(), 1:9 "", Kind::Syntax { .. });
}

#[test]
fn unknown_keys_suggest_the_nearest_or_the_right_table() {
    assert_one!(unified("gpu = 1\n"), 5:1 "node[0].gpu", Kind::UnknownKey { hint } if hint.contains("`gpus`"));
    assert_one!(unified("  block_size = 16\n"), 5:3 "node[0].block_size", Kind::UnknownKey { hint } if hint.contains("top"));
    assert_one!(cuda(&format!("capacity = \"1GiB\"\n{PD}")), 3:1 "capacity", Kind::UnknownKey { hint } if hint.contains("[kv]"));
    assert_one!(unified("[kv]\nbanana = 1\n"), 6:1 "kv.banana", Kind::UnknownKey { .. });
}

#[test]
fn missing_keys_point_at_the_table_that_lacks_them() {
    assert_one!("[[node]]\nrole = \"unified\"\n".to_owned(), 1:1 "model", Kind::Missing { .. });
    assert_one!(cuda(""), 1:1 "node", Kind::Missing { .. });
    assert_one!(cuda("[[node]]\nname = \"a\"\n"), 3:1 "node[0].role", Kind::Missing { .. });
    assert_one!(unified("[runtime]\nkind = \"python\"\n"), 5:1 "runtime.python", Kind::Missing { .. });
    assert_one!(unified("[runtime]\nkind = \"managed\"\n"), 5:1 "runtime.requirements", Kind::Missing { .. });
}

#[test]
fn wrong_types_and_bad_values() {
    assert_one!(unified("count = \"2\"\n"), 5:9 "node[0].count", Kind::WrongType { .. });
    assert_one!(unified("count = 0\n"), 5:9 "node[0].count", Kind::BadValue { .. });
    assert_one!(unified("args = [\"--a\", 3]\n"), 5:16 "node[0].args[1]", Kind::WrongType { .. });
    assert_one!(unified("args = \"--a\"\n"), 5:8 "node[0].args", Kind::WrongType { .. });
    assert_one!(unified("env = { A = 1 }\n"), 5:13 "node[0].env.A", Kind::WrongType { .. });
    assert_one!(unified("gpus = \"all\"\n"), 5:8 "node[0].gpus", Kind::BadValue { .. });
    assert_one!(unified("gpus = [0, 0]\n"), 5:8 "node[0].gpus", Kind::BadValue { .. });
    assert_one!(unified("gpus = true\n"), 5:8 "node[0].gpus", Kind::WrongType { .. });
    assert_one!(unified("gpu_memory_fraction = 1.5\n"), 5:23 "node[0].gpu_memory_fraction", Kind::BadValue { .. });
    assert_one!(unified("name = \"Ä\"\n"), 5:8 "node[0].name", Kind::BadValue { .. });
    assert_one!(unified("port = 70000\n"), 5:8 "node[0].port", Kind::BadValue { .. });
    assert_one!(unified("[router]\nlisten = \"localhost:1\"\n"), 6:10 "router.listen", Kind::BadValue { .. });
    assert_one!(unified("[router]\nchunk_timeout = 30\n"), 6:17 "router.chunk_timeout", Kind::WrongType { .. });
    assert_one!(unified("[router]\nchunk_timeout = \"0s\"\n"), 6:17 "router.chunk_timeout", Kind::BadValue { .. });
    assert_one!(unified("[router]\nchunk_timeout = \"30\"\n"), 6:17 "router.chunk_timeout", Kind::BadValue { .. });
    assert_one!(unified("[kv]\ncapacity = \"many\"\n"), 6:12 "kv.capacity", Kind::BadValue { .. });
    assert_one!(unified("[kv]\ncapacity = \"1MiB\"\n"), 6:12 "kv.capacity", Kind::BadValue { .. });
    for percent in ["0%", "101%", "-1%", "1.5%", "%", "half%"] {
        assert_one!(unified(&format!("[kv]\ncapacity = \"{percent}\"\n")), 6:12 "kv.capacity", Kind::BadValue { .. });
    }
    assert_one!(unified("[kv]\ncapacity = 50\n"), 6:12 "kv.capacity", Kind::WrongType { .. });
    assert_one!(unified("[kv]\nhugepages = true\n"), 6:13 "kv.hugepages", Kind::WrongType { .. });
    assert_one!(unified("[kv]\nhugepages = \"1GiB\"\n"), 6:13 "kv.hugepages", Kind::BadValue { .. });
    assert_one!(unified("[kv]\nnuma = \"bind\"\n"), 6:8 "kv.numa", Kind::BadValue { .. });
    assert_one!(unified("[kv]\nnuma = []\n"), 6:8 "kv.numa", Kind::BadValue { .. });
    assert_one!(unified("[kv]\nnuma = [0, 0]\n"), 6:8 "kv.numa", Kind::BadValue { .. });
    assert_one!(unified("[kv]\nnuma = [1024]\n"), 6:8 "kv.numa", Kind::BadValue { .. });
    assert_one!(unified("[kv]\nnuma = 0\n"), 6:8 "kv.numa", Kind::WrongType { .. });
    assert_one!(unified("[kv]\nallow_unproven_models = \"yes\"\n"), 6:25 "kv.allow_unproven_models", Kind::WrongType { .. });
    assert_one!(unified("[supervisor]\nlog_bytes = \"1KiB\"\n"), 6:13 "supervisor.log_bytes", Kind::BadValue { .. });
    assert_one!(cuda(&format!("kv = 1\n{PD}")), 3:6 "kv", Kind::WrongType { .. });
    assert_one!(cuda(&format!("block_size = 24\n{PD}")), 3:14 "block_size", Kind::BadValue { .. });
    assert_one!(cuda(&format!("max_model_len = 8\n{PD}")), 3:17 "max_model_len", Kind::BadValue { .. });
    assert_one!(cuda(&format!("name = \"a b\"\n{PD}")), 3:8 "name", Kind::BadValue { .. });
    assert_one!(cuda(&format!("dtype = \"int4\"\n{PD}")), 3:9 "dtype", Kind::BadValue { .. });
    assert_one!(unified("").replace("owner/name", "a/b/c"), 2:9 "model", Kind::BadValue { .. });
    assert_one!(unified("").replace("owner/name", "builtin:huge"), 2:9 "model", Kind::BadValue { .. });
    assert_one!(unified("").replace("\"cuda\"", "\"rocm\""), 1:10 "device", Kind::BadValue { .. });
    assert_one!(unified_cpu("kv_cache = \"1536MiB\"\n"), 5:12 "node[0].kv_cache", Kind::BadValue { .. });
    assert_one!(unified_cpu("cpus = [1, 1]\n"), 5:8 "node[0].cpus", Kind::BadValue { .. });
    assert_one!(cuda("[node]\nrole = \"unified\"\n"), 3:1 "node", Kind::WrongType { .. });
}

#[test]
fn gpus_are_named_by_index_uuid_or_address() {
    let text = unified(
        "gpus = [1, \"GPU-a\", \"3b:00.0\"]\ncpus = \"all\"\ngpu_memory_free = \"40GiB\"\nshare_gpus = true\n",
    );
    let topology = Topology::parse(&text, Path::new("t.toml")).unwrap();
    let node = &topology.nodes[0];
    let GpuRequest::Listed(listed) = &node.gpus else {
        panic!("a list")
    };
    let [
        GpuSelector::Index(1),
        GpuSelector::Uuid(uuid),
        GpuSelector::Pci(address),
    ] = &listed[..]
    else {
        panic!("{listed:?}")
    };
    assert_eq!(
        (uuid.as_str(), address.to_string().as_str()),
        ("GPU-a", "0000:3b:00.0")
    );
    assert_eq!((node.tensor_parallel, node.share_gpus), (3, true));
    assert_eq!(
        (node.gpu_memory_free, &node.cpus),
        (Some(40 << 30), &CpuRequest::All)
    );
    // Two spellings of one address.
    assert_one!(unified("gpus = [\"3b:00.0\", \"00000000:3B:00.0\"]\n"), 5:8 "node[0].gpus", Kind::BadValue { .. });
    assert_one!(unified("gpus = [\"MIG-a\"]\n"), 5:8 "node[0].gpus", Kind::BadValue { instead, .. } if instead.contains("MIG"));
    assert_one!(unified("gpus = [\"3b:00.1\"]\n"), 5:8 "node[0].gpus", Kind::BadValue { .. });
}

#[test]
fn all_problems_come_at_once_in_the_files_order() {
    let text = "device = \"cpu\"\nmodel = 3\nfoo = 1\n[[node]]\nrole = \"prefil\"\ncount = \"x\"\n\
                gpus = 2\nargs = [\"--port\"]\n[kv]\ncapacity = 8\n";
    let problems = problems(text);
    let keys: Vec<(usize, &str)> = problems
        .iter()
        .map(|(line, _, key, _)| (*line, key.as_str()))
        .collect();
    assert_eq!(
        keys,
        [
            (2, "model"),
            (3, "foo"),
            (5, "node[0].role"),
            (6, "node[0].count"),
            (7, "node[0].gpus"),
            (8, "node[0].args[0]"),
            (10, "kv.capacity"),
        ]
    );
    let error = Topology::parse(text, Path::new("t.toml")).unwrap_err();
    assert_eq!(error.to_string().split("\n\n").count(), 1 + problems.len());
}

#[test]
fn a_file_that_cannot_be_read_says_so() {
    let error = Topology::load(Path::new("does/not/exist.toml")).unwrap_err();
    assert!(matches!(error, TopologyErrors::Read { .. }));
}
