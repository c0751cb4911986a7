//! The JSON schema against the reader: what one takes the other takes, key by key, and the defaults that
//! the schema tells are those that the reader has.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use jsonschema::Validator;
use pegaflow::topology::{ProblemKind as Kind, Surroundings, Topology, TopologyErrors, schema};
use serde_json::Value as Json;
use toml::{Table, Value};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn validator() -> Validator {
    jsonschema::validator_for(&schema()).unwrap()
}

fn json(document: &Table) -> Json {
    serde_json::to_value(document).unwrap()
}

/// Every topology that the repository shows to people: where it is from, and its text.
fn shown() -> BTreeMap<String, String> {
    let mut shown = BTreeMap::new();
    for (dir, extension) in [
        ("configs", "toml"),
        ("examples", "toml"),
        ("docs", "md"),
        ("examples", "md"),
        (".", "md"),
    ] {
        for entry in fs::read_dir(root().join(dir)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|found| found != extension) {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if extension == "toml" {
                shown.insert(format!("{dir}/{name}"), text);
                continue;
            }
            for (index, block) in text.split("```toml\n").skip(1).enumerate() {
                let block = block.split("```").next().unwrap();
                shown.insert(format!("{dir}/{name} #{index}"), block.to_owned());
            }
        }
    }
    shown
}

#[test]
fn the_committed_schema_is_what_the_command_prints() {
    let run = Command::new(env!("CARGO_BIN_EXE_pegaflow"))
        .arg("schema")
        .output()
        .unwrap();
    assert!(run.status.success());
    let printed: Json = serde_json::from_slice(&run.stdout).unwrap();
    let committed = fs::read_to_string(root().join("configs/topology.schema.json")).unwrap();
    let committed: Json = serde_json::from_str(&committed).unwrap();
    assert!(
        printed == committed,
        "a key changed: run `cargo run -- schema > configs/topology.schema.json` and commit it"
    );
    assert!(jsonschema::meta::is_valid(&printed), "not a JSON schema");
}

#[test]
fn every_topology_that_is_shown_fits_the_schema_and_the_reader() {
    let validator = validator();
    let shown = shown();
    assert!(shown.keys().any(|name| name.starts_with("configs/")));
    assert!(
        shown
            .keys()
            .any(|name| name.starts_with("docs/topology.md"))
    );
    for (name, text) in shown {
        let document: Table = text
            .parse()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let errors: Vec<String> = validator
            .iter_errors(&json(&document))
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{name}: {errors:#?}");
        let around = Surroundings {
            set: &[],
            env: &|_| Some("value".into()),
        };
        Topology::parse_with(&text, Path::new("t.toml"), &around)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        if name.starts_with("configs/") {
            let first = text.lines().next().unwrap();
            let schema = first.strip_prefix("#:schema ").unwrap_or_default();
            assert!(
                root().join("configs").join(schema).is_file() && !schema.is_empty(),
                "{name} lacks its first line, `#:schema ./topology.schema.json`"
            );
        }
    }
}

const SMALLEST: &str =
    "device = \"cuda\"\nmodel = \"owner/name\"\n[[node]]\nname = \"a\"\nrole = \"unified\"\n";

#[test]
fn broken_topologies_are_refused_by_both() {
    let validator = validator();
    for (from, to) in [
        ("", "modell = \"x\"\n"),
        ("model = \"owner/name\"\n", ""),
        ("[[node]]", "[node]"),
        ("[[node]]", "[kv]\nverfy = true\n[[node]]"),
        ("[[node]]", "[extra]\n[[node]]"),
        ("role = \"unified\"\n", ""),
        ("\"unified\"", "\"prefil\""),
        ("\"cuda\"", "\"rocm\""),
        ("name = \"a\"", "gpu = 1"),
        ("name = \"a\"", "port = \"8000\""),
        ("name = \"a\"", "env = { A = 1 }"),
        ("name = \"a\"", "args = [1]"),
        ("\"owner/name\"", "1"),
        ("[[node]]", "[router]\nchunk_timeout = 30\n[[node]]"),
    ] {
        let text = SMALLEST.replacen(from, to, 1);
        let document: Table = text.parse().unwrap();
        assert!(
            !validator.is_valid(&json(&document)),
            "the schema takes\n{text}"
        );
        let read = Topology::parse(&text, Path::new("t.toml"));
        assert!(read.is_err(), "the reader takes\n{text}");
    }
    assert!(validator.is_valid(&json(&SMALLEST.parse().unwrap())));
    assert!(Topology::parse(SMALLEST, Path::new("t.toml")).is_ok());
}

/// One key of the schema: the keys on the way to it, and what is said of it.
struct Key {
    path: Vec<String>,
    property: Json,
}

impl Key {
    fn all() -> Vec<Self> {
        let mut keys = Vec::new();
        let schema = schema();
        let mut add = |prefix: &[&str], properties: &Json| {
            for (name, property) in properties.as_object().unwrap() {
                let mut path: Vec<String> = prefix.iter().map(|&part| part.to_owned()).collect();
                path.push(name.clone());
                keys.push(Self {
                    path,
                    property: property.clone(),
                });
            }
        };
        add(&[], &schema["properties"]);
        for table in ["runtime", "kv", "router", "supervisor"] {
            add(&[table], &schema["properties"][table]["properties"]);
        }
        add(
            &["node"],
            &schema["properties"]["node"]["items"]["properties"],
        );
        keys
    }

    fn is_table(&self) -> bool {
        self.path.len() == 1
            && ["runtime", "kv", "router", "supervisor", "node"].contains(&self.name())
    }

    fn name(&self) -> &str {
        self.path.last().unwrap()
    }

    /// As the reader says it.
    fn said(&self) -> String {
        match &self.path[..] {
            [table, name] if table == "node" => format!("node[0].{name}"),
            path => path.join("."),
        }
    }

    /// The smallest topology in which the reader looks at this key.
    fn document(&self) -> Table {
        let mut document: Table = SMALLEST.parse().unwrap();
        let runtime = match (self.path[0].as_str(), self.name()) {
            ("runtime", "runtime" | "kind") => None,
            ("runtime", "python") => Some("kind = \"python\""),
            ("runtime", _) => Some("kind = \"managed\"\nrequirements = [\"vllm\"]"),
            _ => None,
        };
        if let Some(runtime) = runtime {
            document.insert("runtime".into(), Value::Table(runtime.parse().unwrap()));
        }
        document
    }

    fn set(&self, document: &mut Table, value: Value) {
        let table = match &self.path[..] {
            [_] => document,
            [table, _] if table == "node" => document["node"].as_array_mut().unwrap()[0]
                .as_table_mut()
                .unwrap(),
            [table, _] => document
                .entry(table)
                .or_insert_with(|| Value::Table(Table::new()))
                .as_table_mut()
                .unwrap(),
            path => panic!("{path:?}"),
        };
        table.insert(self.name().to_owned(), value);
    }

    /// The reader finds no fault with the value itself; what it does not go together with is not asked.
    fn is_taken_by_the_reader(&self, document: &Table) -> bool {
        let text = toml::to_string(document).unwrap();
        let problems = match Topology::parse(&text, Path::new("t.toml")) {
            Ok(_) => return true,
            Err(TopologyErrors::Invalid { problems, .. }) => problems,
            Err(error) => panic!("{error}"),
        };
        !problems.iter().any(|problem| {
            problem.key.starts_with(&self.said())
                && matches!(
                    problem.kind,
                    Kind::BadValue { .. }
                        | Kind::WrongType { .. }
                        | Kind::UnknownKey { .. }
                        | Kind::UnsetVariable { .. }
                        | Kind::BadVariable { .. }
                )
        })
    }
}

/// TOML values of every kind, near the edges of what keys take. No float without a fraction: JSON takes
/// that for an integer.
const VALUES: &[&str] = &[
    "true",
    "-1",
    "0",
    "1",
    "2",
    "8",
    "16",
    "17",
    "24",
    "32",
    "64",
    "65",
    "1000",
    "1001",
    "1024",
    "1040",
    "4096",
    "65535",
    "65536",
    "1000000",
    "1000001",
    "2000000000",
    "0.01",
    "0.5",
    "1.5",
    "10.5",
    "''",
    "' '",
    "'a'",
    "'a-1'",
    "'A'",
    "'a b'",
    "'auto'",
    "'on'",
    "'off'",
    "'none'",
    "'interleave'",
    "'cpu'",
    "'cuda'",
    "'path'",
    "'managed'",
    "'prefill'",
    "'unified'",
    "'bfloat16'",
    "'half'",
    "'reply'",
    "'nixl'",
    "'callback'",
    "'int4'",
    "'builtin:tiny'",
    "'builtin:huge'",
    "'owner/name'",
    "'a/b/c'",
    "'./dir/x y'",
    "'/dir'",
    "'0s'",
    "'1s'",
    "'500ms'",
    "'1h 30m'",
    "'30'",
    "'1.5min'",
    "'2 days'",
    "'s'",
    "'0GiB'",
    "'1GiB'",
    "'64 MiB'",
    "'1.5g'",
    "'20mb'",
    "'33554432'",
    "'many'",
    "'1XiB'",
    "'0%'",
    "'1%'",
    "'50%'",
    "'100%'",
    "'101%'",
    "'1.5%'",
    "'127.0.0.1:80'",
    "'10.0.0.8'",
    "'0.0.0.0'",
    "'239.0.0.1'",
    "'::1'",
    "'::'",
    "'ff02::1'",
    "'[::1]:80'",
    "'localhost:80'",
    "'127.0.0.1'",
    "'http://10.0.0.7:8000'",
    "'https://10.0.0.7:8000'",
    "'http://10.0.0.7'",
    "['http://10.0.0.7']",
    "'GPU-1'",
    "[]",
    "[0]",
    "[0, 1]",
    "[0, 0]",
    "[-1]",
    "[5000]",
    "['a']",
    "['']",
    "['GPU-1']",
    "['GPU-1', 0]",
    "[true]",
    "{}",
    "{ A = 'b' }",
    "{ A = 1 }",
    "{ 'A=B' = 'c' }",
];

/// Where the schema cannot say what the reader knows.
const ONLY_THE_READER_KNOWS: &[(&str, &str)] = &[
    // The least number of bytes.
    ("kv.capacity", "'30'"),
    ("supervisor.log_bytes", "'30'"),
];

#[test]
fn each_key_takes_the_same_values_in_schema_and_reader() {
    let validator = validator();
    let mut differ = Vec::new();
    for key in Key::all().iter().filter(|key| !key.is_table()) {
        let (mut taken, mut refused) = (0, 0);
        for text in VALUES {
            let mut document = key.document();
            let value: Table = format!("x = {text}").parse().unwrap();
            key.set(&mut document, value["x"].clone());
            let reader = key.is_taken_by_the_reader(&document);
            let schema = validator.is_valid(&json(&document));
            let known = ONLY_THE_READER_KNOWS.contains(&(key.said().as_str(), text));
            if (reader != schema) != known {
                differ.push(format!(
                    "{} = {text}: reader {reader}, schema {schema}",
                    key.said()
                ));
            }
            taken += usize::from(reader);
            refused += usize::from(!reader);
        }
        // Also that the reader looks at the key at all.
        assert!(
            taken > 0 && refused > 0,
            "{}: {taken} taken, {refused} refused",
            key.said()
        );
    }
    assert!(differ.is_empty(), "{differ:#?}");
}

#[test]
fn a_variable_fits_every_string() {
    let validator = validator();
    for key in Key::all().iter().filter(|key| !key.is_table()) {
        let mut document = key.document();
        key.set(&mut document, Value::String("${NAME:-x}".into()));
        let is_string = |value: &&str| {
            let mut document = key.document();
            let value: Table = format!("x = {value}").parse().unwrap();
            key.set(&mut document, value["x"].clone());
            value["x"].is_str() && validator.is_valid(&json(&document))
        };
        let takes_strings = VALUES.iter().any(is_string);
        assert_eq!(
            validator.is_valid(&json(&document)),
            takes_strings,
            "{}",
            key.said()
        );
    }
}

#[test]
fn the_defaults_of_the_schema_are_the_readers() {
    for device in ["cuda", "cpu"] {
        // A pair, since some keys are only for nodes that share KV.
        let smallest = SMALLEST
            .replace("cuda", device)
            .replace("unified", "prefill")
            + "[[node]]\nrole = \"decode\"\n";
        let mut document: Table = smallest.parse().unwrap();
        let mut written = 0;
        for key in Key::all().iter().filter(|key| !key.is_table()) {
            let others: &[&str] = match device {
                "cuda" => &["device", "side_channel_host"],
                _ => &[
                    "device",
                    "side_channel_host",
                    "gpus",
                    "gpu_memory_fraction",
                    "share_gpus",
                ],
            };
            if let Some(default) = key.property.get("default")
                && !others.contains(&key.name())
            {
                key.set(&mut document, Value::try_from(default).unwrap());
                written += 1;
            }
        }
        assert!(written > 20, "{written}");
        let file = Path::new("t.toml");
        let text = toml::to_string(&document).unwrap();
        let mut with = Topology::parse(&text, file).unwrap_or_else(|error| panic!("{error}"));
        let without = Topology::parse(&smallest, file).unwrap();
        with.source = without.source.clone();
        assert_eq!(with, without);
    }
}
