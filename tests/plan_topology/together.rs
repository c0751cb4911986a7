//! What does not go together: with another key, another node, or with pegaflow.

use std::path::Path;

use pegaflow::topology::{ProblemKind as Kind, Topology};

use crate::{PD, assert_one, cuda, one, problems, unified, unified_cpu};

#[test]
fn prefill_and_decode_need_each_other() {
    assert_one!(unified("").replace("unified", "prefill"), 4:8 "node[0].role", Kind::PrefillWithoutDecode);
    assert_one!(unified("").replace("unified", "decode"), 4:8 "node[0].role", Kind::DecodeWithoutPrefill);
    let mixed = cuda(&format!("{PD}[[node]]\nname = \"u\"\nrole = \"unified\"\n"));
    Topology::parse(&mixed, Path::new("t.toml")).unwrap();
}

#[test]
fn names_are_unique_also_when_replicas_are_counted() {
    let text = cuda(&PD.replace("\"d\"", "\"p\""));
    assert_one!(text, 7:8 "node[1].name", Kind::DuplicateName { name, .. } if name == "p");
    let text = unified("name = \"a\"\ncount = 2\n[[node]]\nname = \"a-1\"\nrole = \"unified\"\n");
    assert_one!(text, 8:8 "node[1].name", Kind::DuplicateName { name, .. } if name == "a-1");
    let text = unified("name = \"pegaflow\"\n");
    assert_one!(text, 5:8 "node[0].name", Kind::BadValue { found, .. } if found.contains("pegaflow"));
}

#[test]
fn nodes_that_share_kv_must_agree() {
    assert_one!(
        cuda(&format!("{PD}tensor_parallel = 2\n")),
        9:19 "node[1].tensor_parallel",
        Kind::UnequalTensorParallel { this: 2, theirs: 1, .. }
    );
    assert_one!(cuda(&format!("{PD}gpus = [0, 1]\n")), 9:8 "node[1].gpus", Kind::UnequalTensorParallel { .. });
    assert_one!(
        cuda(&format!("{PD}args = [\"--kv-cache-dtype\", \"fp8\"]\n")),
        9:9 "node[1].args[0]",
        Kind::UnequalFlag { flag: "--kv-cache-dtype", .. }
    );
    // A unified node shares nothing.
    let text = format!("{PD}[[node]]\nrole = \"unified\"\ntensor_parallel = 2\n");
    Topology::parse(&cuda(&text), Path::new("t.toml")).unwrap();
}

#[test]
fn what_must_agree_and_what_must_be_there_holds_for_each_pool() {
    let pd = |pool: &str, rest: &str| {
        let key = format!("pool = \"{pool}\"\n{rest}");
        let named = PD.replace("\"p\"", &format!("\"p-{pool}\""));
        let named = named.replace("\"d\"", &format!("\"d-{pool}\""));
        named.replace("[[node]]\n", &format!("[[node]]\n{key}"))
    };
    let text = cuda(&[pd("a", ""), pd("b", "tensor_parallel = 2\n")].concat());
    let topology = Topology::parse(&text, Path::new("t.toml")).unwrap();
    let pools: Vec<_> = topology.nodes.iter().map(|n| n.pool.as_str()).collect();
    assert_eq!(pools, ["a", "a", "b", "b"]);

    let apart = PD.replace("role = \"decode\"", "role = \"decode\"\npool = \"b\"");
    let kinds: Vec<_> = problems(&cuda(&apart)).into_iter().map(|p| p.3).collect();
    assert!(
        matches!(
            kinds[..],
            [Kind::PrefillWithoutDecode, Kind::DecodeWithoutPrefill]
        ),
        "{kinds:?}"
    );
    assert_one!(unified("pool = \"a\"\n"), 5:8 "node[0].pool", Kind::Conflict { .. });
    assert_one!(
        cuda(&pd("a", "").replacen("\"a\"", "\"A b\"", 1)),
        4:8 "node[0].pool",
        Kind::BadValue { .. }
    );
}

#[test]
fn flags_that_are_ours_or_unsupported_are_refused() {
    for (arg, flag) in [
        ("--port=1", "--port"),
        ("--host", "--host"),
        ("--model", "--model"),
        ("--kv_transfer_config", "--kv-transfer-config"),
        ("--block-size", "--block-size"),
        ("-tp", "-tp"),
        ("--served-model-name", "--served-model-name"),
        ("--dtype", "--dtype"),
        ("--max-model-len", "--max-model-len"),
    ] {
        let text = unified(&format!("args = [\"--enforce-eager\", \"{arg}\"]\n"));
        assert_one!(text, 5:28 "node[0].args[1]", Kind::OwnedFlag { flag: owned, .. } if *owned == flag);
    }
    for arg in [
        "--data-parallel-size=2",
        "--pipeline-parallel-size=2",
        "--api-server-count=4",
        "--uds=x",
        "--config=x",
    ] {
        let text = unified(&format!("args = [\"{arg}\"]\n"));
        assert_one!(text, 5:9 "node[0].args[0]", Kind::UnsupportedFlag { .. });
    }
    let fine = unified("args = [\"--data-parallel-size\", \"1\", \"--max-num-seqs=4\"]\n");
    Topology::parse(&fine, Path::new("t.toml")).unwrap();
}

#[test]
fn environment_that_is_ours_is_refused() {
    for name in [
        "CUDA_VISIBLE_DEVICES",
        "PYTHONHASHSEED",
        "VLLM_PORT",
        "PEGAFLOW_X",
    ] {
        let text = unified(&format!("[node.env]\n{name} = \"1\"\n"));
        let (line, column, key, kind) = one(&text);
        assert_eq!((line, column), (6, 1));
        assert_eq!(key, format!("node[0].env.{name}"));
        assert!(matches!(kind, Kind::OwnedEnv { .. }), "{kind:?}");
    }
}

#[test]
fn keys_of_the_other_device_are_refused() {
    assert_one!(unified_cpu("gpus = \"auto\"\n"), 5:1 "node[0].gpus", Kind::WrongDevice { only: "cuda", .. });
    assert_one!(unified_cpu("gpu_memory_fraction = 0.5\n"), 5:1 "node[0].gpu_memory_fraction", Kind::WrongDevice { only: "cuda", .. });
    assert_one!(unified_cpu("gpu_memory_free = \"1GiB\"\n"), 5:1 "node[0].gpu_memory_free", Kind::WrongDevice { only: "cuda", .. });
    assert_one!(unified_cpu("share_gpus = true\n"), 5:1 "node[0].share_gpus", Kind::WrongDevice { only: "cuda", .. });
    assert_one!(unified_cpu("cpus = \"all\"\n"), 5:8 "node[0].cpus", Kind::BadValue { .. });
}

#[test]
fn combinations_that_contradict_are_refused() {
    assert_one!(unified("count = 2\ngpus = [0]\n"), 6:8 "node[0].gpus", Kind::Conflict { .. });
    assert_one!(unified("tensor_parallel = 2\ngpus = 3\n"), 6:8 "node[0].gpus", Kind::Conflict { .. });
    assert_one!(unified("count = 2\nport = 9000\n"), 6:8 "node[0].port", Kind::Conflict { .. });
    assert_one!(unified_cpu("tensor_parallel = 2\ncpus = [0, 1, 2]\n"), 6:8 "node[0].cpus", Kind::Conflict { .. });
    assert_one!(unified_cpu("count = 2\ncpus = [0]\n"), 6:8 "node[0].cpus", Kind::Conflict { .. });
    assert_one!(unified("[runtime]\npython = \"x\"\n"), 6:1 "runtime.python", Kind::Conflict { .. });
    assert_one!(unified("[supervisor]\nbackoff_first = \"1h\"\n"), 6:17 "supervisor.backoff_first", Kind::Conflict { .. });
    assert_one!(unified("port = 8000\n"), 5:8 "node[0].port", Kind::PortCollision { port: 8000, .. });
    assert_one!(
        unified("port = 9000\n[[node]]\nname = \"b\"\nrole = \"unified\"\nport = 9000\n"),
        9:8 "node[1].port",
        Kind::PortCollision { port: 9000, .. }
    );
}

#[test]
fn a_node_of_others_has_an_address_and_a_part_and_nothing_else() {
    let other = |role: &str, rest: &str| {
        format!(
            "[[node]]\nname = \"o-{role}\"\nrole = \"{role}\"\nurl = \"http://{role}:8000\"\n{rest}"
        )
    };
    let text = cuda(&[PD, &other("unified", "")].concat());
    let topology = Topology::parse(&text, Path::new("t.toml")).unwrap();
    let own: Vec<_> = topology.nodes.iter().map(|node| node.is_own()).collect();
    assert_eq!(own, [true, true, false]);
    for rest in [
        "count = 2\n",
        "gpus = [0]\n",
        "args = [\"--seed\", \"1\"]\n",
        "env = { A = \"b\" }\n",
        "port = 9000\n",
        "host = \"10.0.0.8\"\n",
        "kv_cache = \"1GiB\"\n",
    ] {
        let (.., key, kind) = one(&cuda(&[PD, &other("unified", rest)].concat()));
        let name = rest.split(' ').next().unwrap();
        assert_eq!(key, format!("node[2].{name}"));
        assert!(matches!(kind, Kind::Conflict { with, .. } if with == "`url`"));
    }
    // They share what they share among themselves.
    let apart = |pool: &str| {
        let (p, d) = (other("prefill", pool), other("decode", pool));
        cuda(&[PD, &p, &d].concat())
    };
    Topology::parse(&apart("pool = \"far\"\n"), Path::new("t.toml")).unwrap();
    let (.., key, kind) = one(&apart(""));
    assert_eq!(key, "node[2].url");
    assert!(matches!(kind, Kind::Conflict { .. }), "{kind:?}");
    let (.., key, kind) = one(&cuda(&[PD, &other("decode", "pool = \"far\"\n")].concat()));
    assert_eq!(
        (key.as_str(), kind),
        ("node[2].role", Kind::DecodeWithoutPrefill)
    );
    let twice = other("unified", "").replace("o-unified", "again");
    let (.., key, kind) = one(&cuda(&[PD, &other("unified", ""), &twice].concat()));
    assert_eq!(key, "node[3].url");
    assert!(matches!(kind, Kind::Conflict { with, .. } if with.contains("node[2]")));
    for wrong in ["ftp://a:1", "a:1", "http://a:1/v1", "https://a"] {
        let text = other("unified", "").replace("http://unified:8000", wrong);
        let (.., key, kind) = one(&cuda(&[PD, &text].concat()));
        assert_eq!(key, "node[2].url", "{wrong}");
        assert!(matches!(kind, Kind::BadValue { .. }), "{kind:?}");
    }
    // Somebody has to be started.
    let (.., key, kind) = one(&cuda(&other("unified", "")));
    assert_eq!(key, "node");
    assert!(matches!(kind, Kind::Missing { instead } if instead.contains("pegaflow router")));
}

#[test]
fn a_node_of_others_may_want_a_key_and_speak_tls() {
    let other = |url: &str, rest: &str| {
        let other = format!("[[node]]\nname = \"o\"\nrole = \"unified\"\nurl = \"{url}\"\n{rest}");
        cuda(&[PD, &other].concat())
    };
    let (tls, plain) = ("https://node.test:8000", "http://node.test:8000");
    let text = other(tls, "key_file = \"node.key\"\nca_file = \"/ca.pem\"\n");
    let node = Topology::parse(&text, Path::new("dir/t.toml"))
        .unwrap()
        .nodes
        .pop()
        .unwrap();
    assert!(node.url.unwrap().is_https());
    assert_eq!(node.key_file.as_deref(), Some(Path::new("dir/node.key")));
    assert_eq!(node.ca_file.as_deref(), Some(Path::new("/ca.pem")));
    let text = other(plain, "key_file = \"node.key\"\n");
    Topology::parse(&text, Path::new("t.toml")).unwrap();
    assert_one!(other(plain, "ca_file = \"a\"\n"), 13:1 "node[2].ca_file", Kind::Conflict { .. });
    assert_one!(other(tls, "key_file = \"\"\n"), 13:12 "node[2].key_file", Kind::BadValue { .. });
    for key in ["key_file", "ca_file"] {
        let (.., found, kind) = one(&unified(&format!("{key} = \"a\"\n")));
        assert_eq!(found, format!("node[0].{key}"));
        assert!(matches!(kind, Kind::Conflict { with, .. } if with.contains("without `url`")));
    }
}

#[test]
fn a_node_of_ours_listens_at_one_address() {
    for good in ["127.0.0.1", "10.0.0.8", "::1", "fd00::8"] {
        let text = unified(&format!("host = \"{good}\"\n"));
        let topology = Topology::parse(&text, Path::new("t.toml")).unwrap();
        assert_eq!(topology.nodes[0].host.to_string(), good);
    }
    for wrong in ["0.0.0.0", "::", "224.0.0.1", "localhost", "10.0.0.8:1", ""] {
        let text = unified(&format!("host = \"{wrong}\"\n"));
        assert_one!(text, 5:8 "node[0].host", Kind::BadValue { .. });
    }
}

#[test]
fn an_alias_means_a_model_that_is_here() {
    let aliases = |table: &str| unified(&format!("[router]\naliases = {table}\n"));
    let topology =
        Topology::parse(&aliases("{ \"gpt-4o\" = \"name\" }"), Path::new("t.toml")).unwrap();
    assert_eq!(topology.router.aliases["gpt-4o"], "name");
    for (table, key) in [
        ("{ a = \"other\" }", "router.aliases.a"),
        ("{ name = \"name\" }", "router.aliases.name"),
    ] {
        let (.., found, kind) = one(&aliases(table));
        assert_eq!(found, key);
        assert!(matches!(kind, Kind::Conflict { .. }), "{kind:?}");
    }
    let (.., kind) = one(&aliases("{ \" \" = \"name\" }"));
    assert!(matches!(kind, Kind::BadValue { .. }), "{kind:?}");
}

#[test]
fn what_the_router_shows_to_clients_is_whole_and_apart_from_its_figures() {
    let router = |keys: &str| unified(&format!("[router]\n{keys}\n"));
    for (keys, key) in [
        ("tls_cert = \"a\"", "router.tls_key"),
        ("tls_key = \"a\"", "router.tls_cert"),
    ] {
        let (.., found, kind) = one(&router(keys));
        assert_eq!(found, key);
        assert!(matches!(kind, Kind::Missing { .. }), "{kind:?}");
    }
    let both = router("tls_cert = \"cert.pem\"\ntls_key = \"/etc/key.pem\"");
    let topology = Topology::parse(&both, Path::new("dir/t.toml")).unwrap();
    let tls = topology.router.tls.as_ref().unwrap();
    assert_eq!(
        (tls.cert.as_path(), tls.key.as_path()),
        (Path::new("dir/cert.pem"), Path::new("/etc/key.pem"))
    );
    assert_eq!(topology.router.url(), "https://127.0.0.1:8000");

    let (.., key, kind) = one(&router("metrics_listen = \"127.0.0.1:8000\""));
    assert_eq!(key, "router.metrics_listen");
    assert!(
        matches!(kind, Kind::PortCollision { port: 8000, .. }),
        "{kind:?}"
    );
    let (.., key, kind) = one(&router("cors_origins = [\"*\", \"https://a/b\"]"));
    assert_eq!(key, "router.cors_origins[1]");
    assert!(matches!(kind, Kind::BadValue { .. }), "{kind:?}");
}

#[test]
fn each_pool_has_one_model_and_each_name_means_one() {
    let pair = |pool: &str, p: &str, d: &str| {
        let node = |role: &str, rest: &str| {
            format!(
                "[[node]]\nname = \"{role}-{pool}\"\nrole = \"{role}\"\npool = \"{pool}\"\n{rest}"
            )
        };
        node("prefill", p) + &node("decode", d)
    };
    let other = "model = \"owner/other\"\n";
    let text = cuda(&[pair("a", "", ""), pair("b", other, other)].concat());
    let topology = Topology::parse(&text, Path::new("t.toml")).unwrap();
    let names: Vec<_> = topology.served_names().into_iter().collect();
    assert_eq!(names, ["name", "other"]);
    assert_eq!(topology.other_models().len(), 1);
    assert_eq!(topology.served_by(&topology.nodes[3]), "other");

    let (.., key, kind) = one(&cuda(&pair("a", "", other)));
    assert_eq!(key, "node[1].model");
    assert!(matches!(kind, Kind::Conflict { with, .. } if with.contains("node[0]")));
    let named = "served_model_name = \"big\"\n";
    let (.., key, kind) = one(&cuda(&pair("a", named, "")));
    assert_eq!(key, "node[1].name");
    assert!(matches!(kind, Kind::Conflict { .. }), "{kind:?}");
    let topology = Topology::parse(&cuda(&pair("a", named, named)), Path::new("t.toml")).unwrap();
    assert_eq!(topology.served_by(&topology.nodes[0]), "big");
    assert!(topology.other_models().is_empty());

    let same = "model = \"else/name\"\n";
    let problems = problems(&cuda(&[pair("a", "", ""), pair("b", same, same)].concat()));
    assert_eq!(problems.len(), 2, "{problems:#?}");
    for (_, _, key, kind) in problems {
        assert!(key.ends_with(".model"), "{key}");
        assert!(
            matches!(kind, Kind::Conflict { instead, .. } if instead.contains("served_model_name"))
        );
    }
    let (.., key, kind) = one(&unified("model = \"a/b/c\"\n"));
    assert_eq!(key, "node[0].model");
    assert!(matches!(kind, Kind::BadValue { .. }), "{kind:?}");
}

#[test]
fn adapters_are_for_nodes_that_share_no_kv() {
    let args = "args = [\"--enable-lora\", \"--lora-modules\", \"sql=/adapters/sql\"]\n";
    Topology::parse(&unified(args), Path::new("t.toml")).unwrap();
    let problems = problems(&cuda(&format!("{PD}{args}")));
    let keys: Vec<_> = problems.iter().map(|problem| problem.2.as_str()).collect();
    assert_eq!(keys, ["node[1].args[0]", "node[1].args[1]"]);
    for (.., kind) in problems {
        assert!(matches!(kind, Kind::UnsupportedFlag { reason, .. } if reason.contains("unified")));
    }
}
