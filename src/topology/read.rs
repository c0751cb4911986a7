//! From the spanned document to a [`Topology`]: every key once, with its default.
//!
//! A value that cannot be read is reported and replaced by its default, so that reading goes on.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::gpus::gpus;
use super::keys;
use super::kv::kv;
use super::problem::{Findings, ProblemKind};
use super::section::Section;
use super::source::join;
use super::supervisor::supervisor;
use super::value::{
    address, boolean, cpus, device, duration, duration_or_zero, header, host, integer, node_url,
    non_empty, number, one_of, role, size, string, wrong,
};
use super::{
    CpuRequest, Device, GpuRequest, KvReady, ModelRef, NodeModel, NodeSettings, RouterSettings,
    RuntimeSettings, Secrets, TlsFiles, Topology,
};
use crate::fleet::{DEFAULT_POOL, Role};

const GIB: u64 = 1 << 30;
/// Limits that only keep typing errors out.
const MANY: i128 = 1_000_000;

pub(super) fn topology(document: &DeTable<'_>, findings: &mut Findings<'_>) -> Topology {
    let file = findings.source.file().to_owned();
    let base = file.parent().unwrap_or(Path::new("")).to_owned();
    let mut top = Section::new(document, String::new(), &keys::TOP, findings);

    let device = top.get("device", device).unwrap_or(Device::Cuda);
    let model = top.require(
        "model",
        "`model = \"owner/name\"`, a directory or \"builtin:tiny\"",
    );
    let model_text = model.unwrap_or_default();
    let model = model_ref(&model_text, "model", &base, top.findings);
    let served_model_name = top
        .get("served_model_name", non_empty)
        .unwrap_or_else(|| last_component(&model_text));
    let block_size = top
        .get("block_size", integer(1..=1024))
        .unwrap_or(match device {
            Device::Cuda => 16,
            Device::Cpu => 32,
        });
    let main = NodeModel {
        model,
        served_name: served_model_name,
    };
    let nodes = nodes(&mut top, device, &base, &main);
    let NodeModel {
        model,
        served_name: served_model_name,
    } = main;
    let kv = kv(&mut top);
    Topology {
        name: top.get("name", string).unwrap_or_else(|| stem_name(&file)),
        device,
        model,
        served_model_name,
        dtype: top.get("dtype", dtype).unwrap_or_else(|| "auto".to_owned()),
        block_size,
        max_model_len: top.get("max_model_len", integer(1..=1 << 30)),
        runtime: runtime(&mut top, &base),
        router: RouterSettings {
            connector: kv.connector,
            ..router(&mut top, &base)
        },
        kv,
        supervisor: supervisor(&mut top, &base),
        nodes,
        source: top.findings.source.clone(),
        secrets: Secrets::default(),
    }
}

fn model_ref(text: &str, key: &str, base: &Path, findings: &mut Findings<'_>) -> ModelRef {
    let is_id_part = |part: &str| {
        !part.is_empty()
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    if text == "builtin:tiny" {
        return ModelRef::BuiltinTiny;
    }
    if text.starts_with(['/', '.']) {
        return ModelRef::Path(base.join(text));
    }
    let parts: Vec<&str> = text.split('/').collect();
    if (parts.len() > 2 || !parts.iter().all(|part| is_id_part(part))) && !findings.is_bad(key) {
        let found = format!("{text:?}");
        let instead = "a Hugging Face id like \"Qwen/Qwen3-8B\", a directory that begins with \
                       \"/\" or \"./\", or \"builtin:tiny\"";
        findings.add(
            key,
            ProblemKind::BadValue {
                found,
                instead: instead.to_owned(),
            },
        );
    }
    ModelRef::HuggingFace(text.to_owned())
}

fn last_component(model: &str) -> String {
    model
        .rsplit(['/', ':'])
        .find(|part| !part.is_empty() && *part != ".")
        .unwrap_or("model")
        .to_owned()
}

/// The file's name as far as it can name an instance; validation has the last word.
pub(super) fn stem_name(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    stem.to_lowercase().replace(['_', '.', ' '], "-")
}

fn dtype(value: &DeValue<'_>) -> Result<String, ProblemKind> {
    let names = ["auto", "bfloat16", "float16", "half", "float32", "float"];
    one_of(value, &names.map(|name| (name, name.to_owned())))
}

fn runtime(top: &mut Section<'_, '_, '_, '_>, base: &Path) -> RuntimeSettings {
    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Path,
        Python,
        Managed,
    }
    let mut section = top.sub("runtime", &keys::RUNTIME);
    let kinds = [
        ("path", Kind::Path),
        ("python", Kind::Python),
        ("managed", Kind::Managed),
    ];
    let kind = section.get("kind", |value| one_of(value, &kinds));
    if let Some((kind, name)) = kind
        .or((!section.has("kind")).then_some(Kind::Path))
        .and_then(|kind| Some((kind, kinds.iter().find(|(_, k)| *k == kind)?.0)))
    {
        for (key, owner) in [
            ("python", Kind::Python),
            ("python_version", Kind::Managed),
            ("requirements", Kind::Managed),
            ("overrides", Kind::Managed),
        ] {
            if section.has(key) && owner != kind {
                let owner = if owner == Kind::Python {
                    "python"
                } else {
                    "managed"
                };
                let conflict = ProblemKind::Conflict {
                    with: format!("`kind = \"{name}\"`"),
                    instead: format!("write `kind = \"{owner}\"`, or leave it out"),
                };
                section.findings.add_at_key(&join("runtime", key), conflict);
            }
        }
    }
    match kind {
        None | Some(Kind::Path) => RuntimeSettings::Path,
        Some(Kind::Python) => {
            let python = section.require("python", "`python = \"/path/to/venv\"`");
            RuntimeSettings::Python(python.map_or_else(PathBuf::new, |path| base.join(path)))
        }
        Some(Kind::Managed) => {
            let requirements = section.strings("requirements");
            if requirements.is_empty() && !section.findings.is_bad("runtime.requirements") {
                section.missing("requirements", "`requirements = [\"vllm==...\"]`");
            }
            RuntimeSettings::Managed {
                python_version: section
                    .get("python_version", non_empty)
                    .unwrap_or_else(|| "3.11".to_owned()),
                requirements,
                overrides: section.strings("overrides"),
            }
        }
    }
}

fn router(top: &mut Section<'_, '_, '_, '_>, base: &Path) -> RouterSettings {
    let mut section = top.sub("router", &keys::ROUTER);
    let default = RouterSettings::default();
    let mut positive = |key, default| section.get(key, duration).unwrap_or(default);
    let connect_timeout = positive("connect_timeout", default.connect_timeout);
    let first_byte_timeout = positive("first_byte_timeout", default.first_byte_timeout);
    let chunk_timeout = positive("chunk_timeout", default.chunk_timeout);
    let handoff_timeout = positive("handoff_timeout", default.handoff_timeout);
    let head_timeout = positive("head_timeout", default.head_timeout);
    let body_timeout = positive("body_timeout", default.body_timeout);
    let max_body = section.get("max_body", size);
    let tls = tls(&mut section, base);
    let cors_origins = section.strings("cors_origins");
    let aliases = section.string_map("aliases");
    RouterSettings {
        listen: section.get("listen", address).unwrap_or(default.listen),
        api_keys: section.file("api_keys", base),
        admin_key_file: section.file("admin_key_file", base),
        kv_ready: section.get("kv_ready", kv_ready).unwrap_or_default(),
        connector: default.connector,
        tls,
        cors_origins,
        aliases,
        metrics_listen: section.get("metrics_listen", address),
        connect_timeout,
        first_byte_timeout,
        chunk_timeout,
        handoff_timeout,
        head_timeout,
        body_timeout,
        max_body: max_body.map_or(default.max_body, |bytes| {
            usize::try_from(bytes).unwrap_or(usize::MAX)
        }),
        max_in_flight: section
            .get("max_in_flight", integer(1..=MANY))
            .unwrap_or(default.max_in_flight),
        max_queue: section
            .get("max_queue", integer(0..=MANY))
            .unwrap_or(default.max_queue),
        queue_timeout: section
            .get("queue_timeout", duration_or_zero)
            .unwrap_or(default.queue_timeout),
        drain_timeout: section
            .get("drain_timeout", duration_or_zero)
            .unwrap_or(default.drain_timeout),
        access_log: section
            .get("access_log", boolean)
            .unwrap_or(default.access_log),
        replay: section.get("replay", boolean).unwrap_or(default.replay),
        session_header: section
            .get("session_header", header)
            .unwrap_or(default.session_header),
        split_min_tokens: section
            .get("split_min_tokens", integer(0..=MANY))
            .unwrap_or(default.split_min_tokens),
        split_max_backlog: section
            .get("split_max_backlog", integer(0..=1000 * MANY))
            .unwrap_or(default.split_max_backlog),
    }
}

fn kv_ready(value: &DeValue<'_>) -> Result<KvReady, ProblemKind> {
    let choices = [("reply", KvReady::Reply), ("callback", KvReady::Callback)];
    one_of(value, &choices)
}

/// A certificate without its key, or the other way round, is a mistake.
fn tls(section: &mut Section<'_, '_, '_, '_>, base: &Path) -> Option<TlsFiles> {
    for (given, lacks) in [("tls_cert", "tls_key"), ("tls_key", "tls_cert")] {
        if section.has(given) && !section.has(lacks) {
            section.missing(lacks, &format!("`{lacks} = \"FILE\"` beside `{given}`"));
        }
    }
    let cert = section.get("tls_cert", non_empty);
    let key = section.get("tls_key", non_empty);
    Some(TlsFiles {
        cert: base.join(cert?),
        key: base.join(key?),
    })
}

fn nodes(
    top: &mut Section<'_, '_, '_, '_>,
    device: Device,
    base: &Path,
    main: &NodeModel,
) -> Vec<NodeSettings> {
    const INSTEAD: &str = "at least one [[node]] with its role";
    let items = match top.raw("node") {
        Some(DeValue::Array(items)) if !items.is_empty() => items,
        Some(DeValue::Array(_)) | None => {
            top.missing("node", INSTEAD);
            return Vec::new();
        }
        Some(other) => {
            top.findings
                .add("node", wrong(other, "[[node]], with two brackets"));
            return Vec::new();
        }
    };
    let mut nodes = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let path = format!("node[{index}]");
        match item.get_ref() {
            DeValue::Table(table) => {
                let section = Section::new(table, path, &keys::NODE, top.findings);
                nodes.push(node(section, device, base, main));
            }
            other => top
                .findings
                .add(&path, wrong(other, "a table, as [[node]]")),
        }
    }
    nodes
}

/// What is not written is the topology's.
fn node_model(
    section: &mut Section<'_, '_, '_, '_>,
    base: &Path,
    main: &NodeModel,
) -> Option<NodeModel> {
    let key = join(&section.path, "model");
    let text = section.get("model", non_empty);
    let name = section.get("served_model_name", non_empty);
    let own = text.map(|text| NodeModel {
        model: model_ref(&text, &key, base, section.findings),
        served_name: last_component(&text),
    });
    match (own, name) {
        (None, None) => None,
        (own, name) => {
            let own = own.unwrap_or_else(|| main.clone());
            Some(NodeModel {
                served_name: name.unwrap_or(own.served_name),
                model: own.model,
            })
        }
    }
}

fn node(
    mut section: Section<'_, '_, '_, '_>,
    device: Device,
    base: &Path,
    main: &NodeModel,
) -> NodeSettings {
    if !section.has("role") {
        section.missing("role", "`role = \"prefill\"`, \"decode\" or \"unified\"");
    }
    let role = section.get("role", role).unwrap_or(Role::Unified);
    let (gpus, gpu_count) = section
        .get("gpus", gpus)
        .unwrap_or((GpuRequest::Auto, None));
    let tensor_parallel = section.get("tensor_parallel", integer(1..=64));
    if let (Some(tensor_parallel), Some(gpu_count)) = (tensor_parallel, gpu_count)
        && tensor_parallel != gpu_count
    {
        let conflict = ProblemKind::Conflict {
            with: format!("`tensor_parallel = {tensor_parallel}`"),
            instead: format!("it asks for {gpu_count} GPUs; write the same number"),
        };
        section.findings.add(&join(&section.path, "gpus"), conflict);
    }
    NodeSettings {
        name: section
            .get("name", string)
            .unwrap_or_else(|| role.to_string()),
        role,
        pool: section
            .get("pool", string)
            .unwrap_or_else(|| DEFAULT_POOL.to_owned()),
        weight: section.get("weight", integer(1..=100)).unwrap_or(1),
        url: section.get("url", node_url),
        key_file: section.file("key_file", base),
        ca_file: section.file("ca_file", base),
        host: section
            .get("host", host)
            .unwrap_or(Ipv4Addr::LOCALHOST.into()),
        model: node_model(&mut section, base, main),
        count: section.get("count", integer(1..=64)).unwrap_or(1),
        gpus,
        cpus: section.get("cpus", cpus).unwrap_or(CpuRequest::Auto),
        tensor_parallel: tensor_parallel.or(gpu_count).unwrap_or(1),
        args: section.strings("args"),
        env: section.string_map("env"),
        port: section
            .get("port", integer(0..=65535))
            .filter(|port| *port != 0),
        gpu_memory_fraction: section
            .get("gpu_memory_fraction", number(0.01..=1.0))
            .unwrap_or(0.9),
        gpu_memory_free: section.get("gpu_memory_free", size),
        share_gpus: section.get("share_gpus", boolean).unwrap_or(false),
        kv_cache: section
            .get("kv_cache", size)
            .or((device == Device::Cpu).then_some(GIB)),
    }
}
