//! The plan as `pegaflow plan` shows it: everything that would run, and no secret.

use std::collections::BTreeMap;
use std::fmt::Write;

use bytesize::ByteSize;
use serde::Serialize;

use super::render::{columns, ranges};
use super::{ArenaPlan, MemoryEstimate, NodePlan, NumaPlan, PageKind, Plan, redact};
use crate::fleet::Role;
use crate::host::HostSnapshot;
use crate::topology::{Connector, Device, Secrets};

/// What `pegaflow plan --json` prints; `docs/plan.md` explains it.
#[derive(Debug, Serialize)]
pub struct Report {
    name: String,
    device: Device,
    model: Model,
    /// What carries KV from prefill to decode.
    connector: Connector,
    /// `null`: no node shares KV, or something else carries it.
    store: Option<Store>,
    listen: String,
    nodes: Vec<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    others: Vec<Other>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Model {
    served_name: String,
    load_from: String,
    block_size: u32,
}

#[derive(Debug, Serialize)]
struct Store {
    capacity: u64,
    /// The kinds of pages to try, in this order.
    pages: Vec<&'static str>,
    /// Empty: where the kernel puts it.
    numa: Vec<u32>,
    pools: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
struct Node {
    id: String,
    role: Role,
    /// Where it is not the topology's.
    #[serde(skip_serializing_if = "Option::is_none")]
    served_name: Option<String>,
    pool: String,
    gpus: Vec<Gpu>,
    /// Empty: not confined.
    cpus: Vec<usize>,
    /// Empty: the kernel's choice.
    numa: Vec<u32>,
    address: String,
    tensor_parallel: u32,
    /// Of each rank, in bytes; `null`: the model's configuration is not known yet.
    memory: Option<MemoryEstimate>,
    argv: Vec<String>,
    env: BTreeMap<String, String>,
}

/// A node that others started.
#[derive(Debug, Serialize)]
struct Other {
    id: String,
    role: Role,
    pool: String,
    url: String,
}

impl Other {
    fn row(&self) -> [String; 9] {
        let dash = || "-".to_owned();
        let (id, role, url) = (self.id.clone(), self.role.to_string(), self.url.clone());
        [
            id,
            role,
            dash(),
            dash(),
            dash(),
            url,
            dash(),
            dash(),
            dash(),
        ]
    }
}

#[derive(Debug, Serialize)]
struct Gpu {
    index: u32,
    uuid: String,
    pci: Option<String>,
    name: String,
    numa_node: Option<u32>,
    memory_total: Option<u64>,
    memory_free: Option<u64>,
    /// Of its way to the store's memory, where that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    probe: Option<String>,
}

impl Report {
    pub fn new(plan: &Plan, host: &HostSnapshot, secrets: &Secrets) -> Self {
        let kv = &plan.kv;
        let pools = kv.pools.iter();
        Self {
            name: plan.name.clone(),
            device: plan.device,
            model: Model {
                served_name: plan.model.served_name.clone(),
                load_from: plan.model.load_from.clone(),
                block_size: plan.model.block_size,
            },
            connector: plan.router.connector,
            store: kv.enabled.then(|| Store {
                capacity: kv.capacity,
                pages: pages(&kv.arena),
                numa: match &kv.arena.numa {
                    NumaPlan::Anywhere => Vec::new(),
                    NumaPlan::Bind(node) => vec![*node],
                    NumaPlan::Interleave(nodes) => nodes.clone(),
                },
                pools: pools
                    .map(|pool| (pool.name.clone(), pool.capacity))
                    .collect(),
            }),
            listen: plan.router.listen.to_string(),
            nodes: plan
                .nodes
                .iter()
                .map(|node| Node {
                    served_name: (node.served_model != plan.model.served_name)
                        .then(|| node.served_model.clone()),
                    ..Node::new(node, host, secrets)
                })
                .collect(),
            others: plan
                .others
                .iter()
                .map(|node| Other {
                    id: node.id.to_string(),
                    role: node.role,
                    pool: node.pool.clone(),
                    url: node.url.to_string(),
                })
                .collect(),
            warnings: plan.warnings.clone(),
        }
    }

    /// Adds what was found out beside the plan.
    pub fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }

    /// What was measured of a GPU.
    pub fn probed(&mut self, index: u32, what: impl Into<String>) {
        let what = what.into();
        let gpus = self.nodes.iter_mut().flat_map(|node| &mut node.gpus);
        gpus.filter(|gpu| gpu.index == index)
            .for_each(|gpu| gpu.probe = Some(what.clone()));
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}: what would run; nothing was started\n", self.name);
        let Model {
            served_name,
            load_from,
            block_size,
        } = &self.model;
        let _ = writeln!(
            text,
            "model   {load_from}, served as {served_name}, {block_size} tokens per block"
        );
        match &self.store {
            None if self.connector == Connector::Nixl => {
                text.push_str("store   none: decode reads from prefill, through NIXL\n");
            }
            None => text.push_str("store   none: no node shares KV\n"),
            Some(store) => {
                let _ = writeln!(
                    text,
                    "store   {} in {} pages{}",
                    ByteSize(store.capacity),
                    store.pages.join(", else "),
                    match ranges(&store.numa) {
                        numa if numa.is_empty() => numa,
                        numa => format!(", on NUMA {numa}"),
                    }
                );
            }
        }
        let _ = writeln!(text, "listen  {}\n", self.listen);
        let header = [
            "NODE", "ROLE", "GPUS", "CORES", "NUMA", "ADDRESS", "WEIGHTS", "KV", "TOKENS",
        ];
        let rows = self.nodes.iter().map(Node::row);
        let rows = std::iter::once(header.map(str::to_owned)).chain(rows);
        let rows = rows.chain(self.others.iter().map(Other::row));
        text.push_str(&columns(&rows.collect::<Vec<_>>()));
        for node in &self.nodes {
            let served = node
                .served_name
                .iter()
                .map(|name| format!(" serves {name}"));
            let _ = writeln!(text, "\n{}:{}", node.id, served.collect::<String>());
            for gpu in &node.gpus {
                if let Some(probe) = &gpu.probe {
                    let _ = writeln!(text, "  GPU {}: {probe}", gpu.index);
                }
            }
            let _ = writeln!(text, "  {}", shell(&node.argv));
            for (name, value) in &node.env {
                let _ = writeln!(text, "    {name}={}", quote(value));
            }
        }
        for warning in &self.warnings {
            let _ = writeln!(text, "\nwarning: {warning}");
        }
        text
    }
}

impl Node {
    fn new(node: &NodePlan, host: &HostSnapshot, secrets: &Secrets) -> Self {
        let gpus = host.gpus.iter();
        Self {
            id: node.id.to_string(),
            role: node.role,
            served_name: None,
            pool: node.pool.clone(),
            gpus: gpus
                .filter(|gpu| node.gpus.contains(&gpu.index))
                .map(|gpu| Gpu {
                    index: gpu.index,
                    uuid: gpu.uuid.clone(),
                    pci: gpu.pci.map(|address| address.to_string()),
                    name: gpu.name.clone(),
                    numa_node: gpu.numa_node,
                    memory_total: gpu.memory_total,
                    memory_free: gpu.memory_free,
                    probe: None,
                })
                .collect(),
            cpus: node.cpus.clone(),
            numa: node.numa.clone(),
            address: node.addr.to_string(),
            tensor_parallel: node.tensor_parallel,
            memory: node.memory,
            argv: redact::argv(&node.argv, secrets),
            env: redact::env(&node.env, secrets),
        }
    }

    fn row(&self) -> [String; 9] {
        let or_dash = |text: String| {
            if text.is_empty() {
                "-".to_owned()
            } else {
                text
            }
        };
        let gpus: Vec<u32> = self.gpus.iter().map(|gpu| gpu.index).collect();
        let memory = |of: &dyn Fn(&MemoryEstimate) -> Option<String>| {
            or_dash(self.memory.as_ref().and_then(of).unwrap_or_default())
        };
        let size = |bytes: u64| ByteSize(bytes).to_string();
        [
            self.id.clone(),
            self.role.to_string(),
            or_dash(ranges(&gpus)),
            or_dash(ranges(&self.cpus)),
            or_dash(ranges(&self.numa)),
            self.address.clone(),
            memory(&|memory| Some(size(memory.weights))),
            memory(&|memory| memory.kv.map(size)),
            memory(&|memory| memory.kv_tokens.map(|tokens| tokens.to_string())),
        ]
    }
}

fn pages(arena: &ArenaPlan) -> Vec<&'static str> {
    let word = |kind: &PageKind| match kind {
        PageKind::Huge => "huge",
        PageKind::Transparent => "transparent huge",
        PageKind::Normal => "normal",
    };
    arena.pages.iter().map(word).collect()
}

/// As a shell takes it.
fn shell(argv: &[String]) -> String {
    let words: Vec<String> = argv.iter().map(|word| quote(word)).collect();
    words.join(" ")
}

fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+*".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_a_row_are_joined() {
        assert_eq!(ranges::<u32>(&[]), "");
        assert_eq!(ranges(&[0u32, 1, 2, 5, 7, 8]), "0-2,5,7-8");
    }

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        let words = ["vllm", "--x", "a b", "{\"k\": 1}", "", "it's"].map(str::to_owned);
        assert_eq!(shell(&words), r#"vllm --x 'a b' '{"k": 1}' '' 'it'\''s'"#);
    }
}
