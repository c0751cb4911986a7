//! What `--set` and environment variables make of a topology, and what is said when they cannot.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use pegaflow::topology::{
    Capacity, CpuRequest, Device, ModelRef, Problem, ProblemKind as Kind, Surroundings, Topology,
    TopologyErrors,
};

const FILE: &str = r#"device = "cpu"
model = "owner/name"
[kv]
capacity = "1GiB"
[[node]]
role = "prefill"
args = ["--seed", "1"]
[[node]]
name = "writer"
role = "decode"
args = ["--seed", "1"]
"#;

fn env(name: &str) -> Option<OsString> {
    match name {
        "TOKEN" => Some("hf_0123456789".into()),
        "SIZE" => Some("2GiB".into()),
        "EMPTY" => Some("".into()),
        "BYTES" => Some(OsString::from_vec(vec![0xff])),
        _ => None,
    }
}

fn read(text: &str, set: &[&str]) -> Result<Topology, TopologyErrors> {
    let set: Vec<String> = set.iter().map(|set| (*set).to_owned()).collect();
    let around = Surroundings {
        set: &set,
        env: &env,
    };
    Topology::parse_with(text, Path::new("dir/t.toml"), &around)
}

fn with(set: &[&str]) -> Topology {
    read(FILE, set).unwrap_or_else(|error| panic!("{error}"))
}

#[track_caller]
fn one(text: &str, set: &[&str]) -> Problem<Kind> {
    let Err(TopologyErrors::Invalid { mut problems, .. }) = read(text, set) else {
        panic!("no problem with {set:?}");
    };
    assert_eq!(problems.len(), 1, "{problems:#?}");
    problems.remove(0)
}

#[test]
fn overrides_replace_and_add_keys_of_every_kind() {
    let topology = with(&[
        "kv.capacity=3GiB",
        "model = \"other/model\"",
        "served_model_name=m",
        "router.listen=0.0.0.0:9000",
        "kv.save_decoded=true",
        "node[0].count=2",
        "node.writer.cpus=[0, 1]",
        "node.writer.tensor_parallel=1",
        "node.prefill.env.NAME=a=b",
        "node.1.args[1]=\"1\"",
        "supervisor = { crash_limit = 9 }",
    ]);
    assert_eq!(topology.kv.capacity, Capacity::Bytes(3 << 30));
    assert_eq!(topology.model, ModelRef::HuggingFace("other/model".into()));
    assert_eq!(topology.served_model_name, "m");
    assert_eq!(topology.router.listen, ([0, 0, 0, 0], 9000).into());
    assert!(topology.kv.save_decoded);
    assert_eq!(topology.supervisor.crash_limit, 9);
    let [prefill, writer] = &topology.nodes[..] else {
        panic!("two nodes")
    };
    assert_eq!(prefill.count, 2);
    assert_eq!(prefill.env["NAME"], "a=b");
    assert_eq!(writer.cpus, CpuRequest::Listed(vec![0, 1]));
    assert_eq!(writer.args, ["--seed", "1"]);
}

#[test]
fn a_later_override_wins_and_a_file_without_any_is_what_it_was() {
    assert_eq!(
        with(&["kv.capacity=3GiB", "kv.capacity=4GiB"]).kv.capacity,
        Capacity::Bytes(4 << 30)
    );
    assert_eq!(
        with(&[]),
        Topology::parse(FILE, Path::new("dir/t.toml")).unwrap()
    );
    // It can also mend what the file got wrong.
    let broken = FILE.replace("\"cpu\"", "\"tpu\"");
    assert_eq!(read(&broken, &["device=cpu"]).unwrap().device, Device::Cpu);
}

#[test]
fn a_problem_of_an_override_points_into_the_argument() {
    for (set, column, key) in [
        ("kv.capacity=many", 13, "kv.capacity"),
        ("kv.capazity=1GiB", 4, "kv.capazity"),
        (
            "node.writer.args=[\"--seed\", \"1\", 1]",
            34,
            "node[1].args[2]",
        ),
        ("node[1].role=\"prefil\"", 14, "node[1].role"),
        ("kv={ numa = \"x\" }", 13, "kv.numa"),
        ("node.writer.cpus=[0, 0]", 18, "node[1].cpus"),
    ] {
        let problem = one(FILE, &[set]);
        assert_eq!(problem.place.argument.as_deref(), Some(set));
        assert_eq!(
            (problem.place.line, problem.place.column),
            (1, column),
            "{set}"
        );
        assert_eq!(problem.key, key);
        assert!(
            matches!(
                problem.kind,
                Kind::BadValue { .. } | Kind::UnknownKey { .. } | Kind::WrongType { .. }
            ),
            "{set}: {:?}",
            problem.kind
        );
    }
    let error = read(FILE, &["kv.capacity=many"]).unwrap_err().to_string();
    assert!(
        error.contains("\n\n--set 'kv.capacity=many' column 13: kv.capacity\n"),
        "{error}"
    );
}

#[test]
fn an_override_that_leads_nowhere_says_what_is_there() {
    for (set, column, key, word) in [
        ("kv.capacity", 1, "", "KEY=VALUE"),
        ("=1", 1, "", "path of keys"),
        ("node.writer.=1", 13, "", "path of keys"),
        (
            "node.decode.count=2",
            6,
            "node",
            "[0] (prefill), [1] (writer)",
        ),
        ("node[2].count=2", 5, "node", "[0] (prefill), [1] (writer)"),
        ("node[0].args[2]=x", 13, "node[0].args", "[0], [1]"),
        ("model.name=x", 7, "model", "neither a table nor a list"),
        ("kv[0]=1", 3, "kv", "a table has keys"),
    ] {
        let problem = one(FILE, &[set]);
        assert_eq!(problem.place.argument.as_deref(), Some(set));
        assert_eq!(
            (problem.place.column, problem.key.as_str()),
            (column, key),
            "{set}"
        );
        assert!(
            matches!(&problem.kind, Kind::Override { instead } if instead.contains(word)),
            "{set}: {:?}",
            problem.kind
        );
    }
    let problem = one(FILE, &["node.writer.cpus=[0,"]);
    assert!(matches!(problem.kind, Kind::Syntax { .. }));
    assert_eq!(problem.key, "node.writer.cpus");
}

#[test]
fn variables_are_filled_in_everywhere_a_string_is() {
    let text = FILE
        .replace("1GiB", "${SIZE}")
        .replace("owner/name", "${ORG:-owner}/name")
        .replace(
            "args",
            "env = { TOKEN = \"Bearer ${TOKEN}\", COST = \"5$$\" }\nargs",
        );
    let topology = read(
        &text,
        &["dtype=${TYPE:-bfloat16}", "node[0].args[1]=${EMPTY:-1}"],
    )
    .unwrap();
    assert_eq!(topology.kv.capacity, Capacity::Bytes(2 << 30));
    assert_eq!(topology.model, ModelRef::HuggingFace("owner/name".into()));
    assert_eq!(topology.dtype, "bfloat16");
    assert_eq!(topology.nodes[0].env["TOKEN"], "Bearer hf_0123456789");
    assert_eq!(topology.nodes[1].env["COST"], "5$");
    assert_eq!(topology.nodes[0].args, ["--seed", "1"]);
}

#[test]
fn a_variable_that_is_not_set_is_told_once_with_its_place() {
    let text = FILE.replace("\"1GiB\"", "\"${CAPACITY}\"");
    let problem = one(&text, &[]);
    assert!(matches!(&problem.kind, Kind::UnsetVariable { name } if name == "CAPACITY"));
    assert_eq!(problem.place.argument, None);
    assert_eq!((problem.place.line, problem.place.column), (4, 12));
    assert_eq!(problem.key, "kv.capacity");
    let error = read(&text, &[]).unwrap_err().to_string();
    assert!(error.contains("dir/t.toml:4:12: kv.capacity\n"), "{error}");
    assert!(error.contains("CAPACITY is not set"), "{error}");

    let problem = one(FILE, &["kv.capacity=${CAPACITY}"]);
    assert_eq!(problem.place.column, 13);
    for text in ["${BYTES}", "${SIZE", "${}"] {
        let problem = one(&FILE.replace("1GiB", text), &[]);
        assert!(matches!(problem.kind, Kind::BadVariable { .. }), "{text}");
    }
}

#[test]
fn what_came_from_a_variable_is_not_shown() {
    let env = "env = { TOKEN = \"Bearer ${TOKEN}\" }\nargs";
    let topology = read(&FILE.replace("args", env), &[]).unwrap();
    assert_eq!(
        topology.secrets.redact("--header 'Bearer hf_0123456789'"),
        "--header 'Bearer ***'"
    );
    // Not even in a message about the value itself.
    for (text, key) in [
        (FILE.replace("1GiB", "${TOKEN}"), "kv.capacity"),
        (FILE.replace("owner/name", "a b${TOKEN}"), "model"),
        (FILE.replace("\"writer\"", "\"${TOKEN}!\""), "node[1].name"),
        (format!("count = \"${{TOKEN}}\"\n{FILE}"), "count"),
    ] {
        let error = read(&text, &[]).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
        assert!(!error.contains("hf_0123456789"), "{error}");
    }
}

#[test]
fn the_name_of_an_instance_needs_nothing_else_of_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("My_fleet.toml");
    std::fs::write(&file, "model = \"${NOT_SET_HERE}\"\nunknown = 1\n").unwrap();
    let name = |set: &[&str]| {
        let set: Vec<String> = set.iter().map(|set| (*set).to_owned()).collect();
        let around = Surroundings {
            set: &set,
            env: &env,
        };
        Topology::instance_name(&file, &around)
    };
    assert_eq!(name(&[]).unwrap(), "my-fleet");
    assert_eq!(name(&["name=other"]).unwrap(), "other");
    assert_eq!(
        name(&["name=${SIZE}"])
            .unwrap_err()
            .to_string()
            .matches("2GiB")
            .count(),
        0
    );
    for set in [
        "name=${NONE}",
        "name=1",
        "name=a b",
        "name",
        "node[3].count=1",
    ] {
        let error = name(&[set]).unwrap_err();
        assert!(matches!(error, TopologyErrors::Invalid { .. }), "{set}");
    }
}
