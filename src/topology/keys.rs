//! The keys that exist: one table, from which the reader knows unknown keys and [`super::schema`]
//! makes what editors complete and check.
//!
//! A new key goes in here first: reading one that is not listed fails every test. Its default and its
//! range stand in [`super::read`] as well; `tests/plan_schema.rs` compares the two.

mod hint;

/// A table of the file and the keys that it may hold.
pub(super) struct Table {
    /// As a person writes it: empty for the top, `[kv]`, `[[node]]`.
    pub(super) header: &'static str,
    pub(super) doc: &'static str,
    pub(super) keys: &'static [Key],
}

pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) shape: Shape,
    pub(super) absent: Absent,
    /// What an editor shows; `docs/topology.md` says more.
    pub(super) doc: &'static str,
}

/// What a key's value looks like.
#[derive(Clone, Copy)]
pub(super) enum Shape {
    /// Any string that is not empty.
    Text,
    /// Of an instance or a node.
    Name,
    Model,
    OneOf(&'static [&'static str]),
    Boolean,
    /// From, to, and the number that it is a multiple of.
    Integer(i64, i64, i64),
    Number(f64, f64),
    Duration,
    DurationOrZero,
    Size,
    SizeOrPercent,
    Address,
    /// An IP address of this machine.
    Host,
    /// Of a node that others started.
    Url,
    /// A header's name, or nothing.
    Header,
    Strings,
    /// A list of web pages' origins.
    Origins,
    /// Names to names.
    Aliases,
    /// Names to strings.
    Variables,
    Numa,
    Gpus,
    Cpus,
    Table(&'static Table),
    Tables(&'static Table),
}

/// What holds where the key is left out.
#[derive(Clone, Copy)]
pub(super) enum Absent {
    Required,
    /// In TOML.
    Is(&'static str),
    /// It depends on other keys or the machine.
    Words(&'static str),
}

use Absent::{Is, Required, Words};
use Shape::{
    Address, Aliases, Boolean, Cpus, Duration, DurationOrZero, Gpus, Header, Host, Integer, Model,
    Name, Numa, Number, OneOf, Origins, Size, SizeOrPercent, Strings, Tables, Text, Url, Variables,
};

const fn key(name: &'static str, shape: Shape, absent: Absent, doc: &'static str) -> Key {
    Key {
        name,
        shape,
        absent,
        doc,
    }
}

#[rustfmt::skip]
pub(super) const TOP: Table = Table {
    header: "",
    doc: "Which vLLM nodes pegaflow starts on this machine, and how it serves them.",
    keys: &[
        key("name", Name, Words("the file's name"), "Names the instance; two runs of one name exclude each other."),
        key("device", OneOf(&["cuda", "cpu"]), Is("\"cuda\""), "Where all nodes compute."),
        key("model", Model, Required, "A Hugging Face id, a directory that begins with / or ./, or builtin:tiny."),
        key("served_model_name", Text, Words("the last part of `model`"), "What clients write in `model`."),
        key("dtype", OneOf(&["auto", "bfloat16", "float16", "half", "float32", "float"]), Is("\"auto\""), "As vLLM's --dtype."),
        key("block_size", Integer(16, 1024, 16), Words("16, on CPU 32"), "Tokens per KV block, equal on all nodes; on CPU a multiple of 32."),
        key("max_model_len", Integer(16, 1 << 30, 1), Words("the model's"), "Tokens of prompt and answer together; at least one block."),
        key("runtime", Shape::Table(&RUNTIME), Is("{}"), RUNTIME.doc),
        key("kv", Shape::Table(&KV), Is("{}"), KV.doc),
        key("router", Shape::Table(&ROUTER), Is("{}"), ROUTER.doc),
        key("supervisor", Shape::Table(&SUPERVISOR), Is("{}"), SUPERVISOR.doc),
        key("node", Tables(&NODE), Required, NODE.doc),
    ],
};

#[rustfmt::skip]
pub(super) const RUNTIME: Table = Table {
    header: "[runtime]",
    doc: "Which vLLM serves the nodes.",
    keys: &[
        key("kind", OneOf(&["path", "python", "managed"]), Is("\"path\""), "path: the vllm program on PATH. python: an interpreter or virtual environment of yours. managed: one that pegaflow makes once and keeps in its cache."),
        key("python", Text, Words("none; needed for kind = \"python\""), "The interpreter, or the environment's directory."),
        key("python_version", Text, Words("\"3.11\" for kind = \"managed\""), "The Python version of a managed environment."),
        key("requirements", Strings, Words("none; needed for kind = \"managed\""), "What to install into a managed environment, like [\"vllm==0.30.0\"]."),
        key("overrides", Strings, Words("[] for kind = \"managed\""), "Versions that replace what the requirements ask for."),
    ],
};

#[rustfmt::skip]
pub(super) const KV: Table = Table {
    header: "[kv]",
    doc: "The store through which prefill hands KV to decode, or what does so in its place.",
    keys: &[
        key("connector", OneOf(&["pegaflow", "nixl"]), Is("\"pegaflow\""), "pegaflow: the store, in memory that all nodes of this machine share. nixl: vLLM's NixlConnector, with which decode reads from prefill, also over a network; then there is no store."),
        key("side_channel_host", Host, Is("\"127.0.0.1\""), "With nixl: the IP address of this machine at which decode nodes ask prefill nodes what they hold."),
        key("capacity", SizeOrPercent, Is("\"8GiB\""), "Host memory for KV, at least 16MiB: a size, or a share of the machine's memory like 50%."),
        key("hugepages", OneOf(&["auto", "on", "off"]), Is("\"auto\""), "auto: 2 MiB pages where enough are set aside. on: refused where too few are free. off: normal pages."),
        key("numa", Numa, Is("\"auto\""), "On which NUMA nodes the store lies: auto, interleave, none, or a list of them."),
        key("handoff_deadline", Duration, Is("\"60s\""), "A hand-off that is open for longer fails, and decode computes the prompt itself."),
        key("save_decoded", Boolean, Is("false"), "Decode nodes save the tokens they generate too, for the next turn of a conversation."),
        key("verify", Boolean, Is("false"), "A checksum is kept of everything that is saved and compared at every load; what differs is computed again."),
        key("allow_unproven_models", Boolean, Is("false"), "Skips the refusal of models that are known to answer wrongly with loaded KV."),
        key("canary_logprob_tolerance", Number(0.0, 10.0), Words("0.05, on CPU without AMX 0.0, with NIXL 0.2"), "How far log probabilities with loaded KV may be from computed ones; 0.0 is bit-exact."),
    ],
};

#[rustfmt::skip]
pub(super) const ROUTER: Table = Table {
    header: "[router]",
    doc: "The OpenAI API.",
    keys: &[
        key("listen", Address, Is("\"127.0.0.1:8000\""), "IP address and port."),
        key("api_keys", Text, Words("everybody may come"), "A file of API keys, one a line, relative to the topology; read again when it changes. More may stand in PEGAFLOW_API_KEYS."),
        key("admin_key_file", Text, Words("no /kv_ready"), "A file with the key that prefill nodes of others show at /kv_ready, relative to the topology. PEGAFLOW_ADMIN_KEY instead of it will do."),
        key("kv_ready", OneOf(&["reply", "callback"]), Is("\"reply\""), "What says that the KV is ready, of prefill nodes that others started: their reply, or what they say at /kv_ready."),
        key("tls_cert", Text, Words("plain HTTP"), "A certificate and its chain in PEM, for HTTPS; read again when it changes. Needs tls_key."),
        key("tls_key", Text, Words("plain HTTP"), "The certificate's key in PEM, which no other user may read."),
        key("cors_origins", Origins, Is("[]"), "Web pages that may use the API from a browser, like [\"https://chat.example.com\"]; [\"*\"] for all."),
        key("aliases", Aliases, Is("{}"), "Other names that clients may write in `model`, like { \"gpt-4o\" = \"Qwen3-8B\" }."),
        key("metrics_listen", Address, Words("/metrics and /status are on `listen`"), "IP address and port for /metrics, /status and the dashboard, without TLS and API keys; they are then not on `listen`."),
        key("connect_timeout", Duration, Is("\"5s\""), "To a node."),
        key("first_byte_timeout", Duration, Is("\"600s\""), "From sending a request to a node to the head of its reply (for a stream) or the whole reply."),
        key("chunk_timeout", Duration, Is("\"120s\""), "Between two pieces of a stream."),
        key("handoff_timeout", Duration, Is("\"60s\""), "From sending a prompt to prefill to its KV being ready; then decode computes it itself."),
        key("head_timeout", Duration, Is("\"120s\""), "How long a client's connection may be idle, or take to send a request's head."),
        key("body_timeout", Duration, Is("\"60s\""), "From a request's head to the end of its body."),
        key("max_body", Size, Is("\"64MiB\""), "Of a request."),
        key("max_in_flight", Integer(1, 1_000_000, 1), Is("1024"), "Requests at a time."),
        key("max_queue", Integer(0, 1_000_000, 1), Is("1024"), "Requests that may wait; more are answered 429."),
        key("queue_timeout", DurationOrZero, Is("\"60s\""), "How long a request waits; \"0s\" for not at all."),
        key("drain_timeout", DurationOrZero, Is("\"30s\""), "After Ctrl-C, how long running requests may finish."),
        key("access_log", Boolean, Is("false"), "One line in the log for every request, at level info; else at debug."),
        key("replay", Boolean, Is("true"), "A stream whose node fails goes on at another one, where its rest can be the same."),
        key("session_header", Header, Is("\"x-session-id\""), "The header with which clients name a session: its requests meet the same nodes while load allows it. Empty: none."),
        key("split_min_tokens", Integer(0, 1_000_000, 1), Is("0"), "Prompts of fewer tokens, estimated from their bytes, are served whole by one node."),
        key("split_max_backlog", Integer(0, 1_000_000_000, 1), Is("65536"), "Prompt tokens that every prefill node has in flight before an idle decode node computes a prompt itself; 0: it never does."),
    ],
};

#[rustfmt::skip]
pub(super) const SUPERVISOR: Table = Table {
    header: "[supervisor]",
    doc: "The life of the nodes.",
    keys: &[
        key("start_timeout", Duration, Is("\"900s\""), "From start to the first answer to /health; extended while the log or the memory of its processes grows, to four times this at most. The warm-up request then has this long again, but 300 s at most."),
        key("health_interval", Duration, Is("\"1s\""), "Between two health probes."),
        key("hang_timeout", Duration, Is("\"120s\""), "Requests running and token counters that stand still for this long: the node is restarted."),
        key("idle_canary", DurationOrZero, Is("\"30s\""), "An idle or silent node is asked for one token this often; \"0s\": only one that has been silent for hang_timeout."),
        key("stop_grace", Duration, Is("\"15s\""), "Between TERM and KILL."),
        key("backoff_first", Duration, Is("\"5s\""), "Delay of the second restart (the first is at once); doubles up to backoff_max."),
        key("backoff_max", Duration, Is("\"120s\""), "The longest delay of a restart."),
        key("crash_limit", Integer(1, 1000, 1), Is("5"), "Deaths within crash_window after which a node stays down."),
        key("crash_window", Duration, Is("\"30m\""), "In which crash_limit counts deaths."),
        key("log_bytes", Size, Is("\"32MiB\""), "Of one log file before it is rotated; at least 1MiB."),
        key("log_files", Integer(1, 100, 1), Is("5"), "Rotated log files that are kept of each node, beside the current one."),
        key("cgroup", OneOf(&["auto", "off", "require"]), Is("\"auto\""), "auto: each node gets a control group (version 2) of its own where pegaflow may make some. off: none. require: refused where it may not."),
        key("node_key_file", Text, Words("a key that is new for each run"), "A file with the key that nodes ask for, relative to the topology, which no other user may read: for who else uses a node with a `host`."),
    ],
};

#[rustfmt::skip]
pub(super) const NODE: Table = Table {
    header: "[[node]]",
    doc: "One or more vLLM servers.",
    keys: &[
        key("name", Name, Words("the role"), "Unique."),
        key("role", OneOf(&["prefill", "decode", "unified"]), Required, "prefill computes prompts, decode loads their KV and generates (both are needed), unified does everything for itself."),
        key("pool", Name, Is("\"default\""), "Prefill and decode nodes of one pool hand off to each other, and to no others."),
        key("url", Url, Words("pegaflow starts the node"), "Where a node is that others started, like http://10.0.0.7:8000: it is looked at and gets requests, and nothing else of it is pegaflow's. https:// is spoken too."),
        key("key_file", Text, Words("the client's own key goes there"), "Beside `url`: a file with that node's API key, relative to the topology, which no other user may read."),
        key("ca_file", Text, Words("whom this machine trusts"), "Beside an https `url`: the certificates, in PEM, of who vouches for that node."),
        key("host", Host, Is("\"127.0.0.1\""), "The IP address of this machine at which the node listens; another than 127.0.0.1 for a pegaflow elsewhere, which needs `node_key_file` of [supervisor] too."),
        key("model", Model, Words("the topology's `model`"), "Another model for this node: as `model` at the top. All prefill and decode nodes of a pool serve one."),
        key("served_model_name", Text, Words("the last part of the node's `model`, else the topology's name"), "What clients write in `model` to reach this node."),
        key("weight", Integer(1, 100, 1), Is("1"), "How much it can do beside other nodes of its role: one of 2 gets twice the tokens of one of 1."),
        key("count", Integer(1, 64, 1), Is("1"), "Replicas, named NAME-0, NAME-1, ..."),
        key("gpus", Gpus, Is("\"auto\""), "auto: GPUs close to each other and to the partners, with the most free memory. A number: that many, chosen so. A list: indices in PCI bus order, UUIDs or PCI addresses."),
        key("cpus", Cpus, Is("\"auto\""), "auto: on CPU an equal share of the cores, with GPUs those of their NUMA nodes. Or a list of cores. all (GPUs only): not confined."),
        key("tensor_parallel", Integer(1, 64, 1), Words("what `gpus` asks for, else 1"), "Ranks of one replica; equal on all nodes that share KV."),
        key("args", Strings, Is("[]"), "More flags for vLLM, like [\"--max-num-seqs\", \"64\"]; not those that pegaflow sets."),
        key("env", Variables, Is("{}"), "More environment variables; not those that pegaflow sets. ${NAME} takes pegaflow's own."),
        key("port", Integer(0, 65535, 1), Is("0"), "HTTP port on `host`; 0: pegaflow finds one. One replica only."),
        key("gpu_memory_fraction", Number(0.01, 1.0), Is("0.9"), "Of each GPU's memory, for weights and KV."),
        key("gpu_memory_free", Size, Words("none"), "Each of the node's GPUs must have this much memory free."),
        key("share_gpus", Boolean, Is("false"), "The GPUs may be other nodes' too that say the same, while their fractions add up to 1.0 at most."),
        key("kv_cache", Size, Words("vLLM's choice, on CPU \"1GiB\""), "vLLM's own KV cache; on CPU in whole GiB."),
    ],
};

const ALL: [&Table; 6] = [&TOP, &RUNTIME, &KV, &ROUTER, &SUPERVISOR, &NODE];

impl Table {
    pub(super) fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_has_a_row_for_every_key_with_its_default() {
        let reference = include_str!("../../docs/topology.md");
        for table in ALL {
            let header = match table.header {
                "" => "\n## Top".to_owned(),
                header => format!("\n## `{header}`"),
            };
            let (_, section) = reference.split_once(&header).unwrap();
            let section = section.split("\n## ").next().unwrap();
            for key in table.keys {
                if matches!(key.shape, Shape::Table(_) | Tables(_)) {
                    continue;
                }
                let row = section
                    .lines()
                    .find(|line| line.starts_with(&format!("| `{}` |", key.name)));
                let row = row.unwrap_or_else(|| panic!("{header} lacks {}", key.name));
                let default = row.split(" | ").nth(1).unwrap().replace('`', "");
                match key.absent {
                    Is(is) => assert_eq!(default, is, "{}", key.name),
                    Required => assert_eq!(default, "required", "{}", key.name),
                    Words(_) => assert!(!default.is_empty(), "{}", key.name),
                }
            }
        }
    }
}
