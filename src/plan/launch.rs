//! The command line and the environment of one vLLM server. Pure.

use std::collections::BTreeMap;

use serde_json::json;

use super::{NodePlan, Placement, PlanInputs, Replica, address, cpu};
use crate::fleet::{NodeKey, Role};
use crate::topology::{Connector, Device, Launcher, ModelRef, NodeSettings, Topology};

/// What all nodes have in common.
pub(super) struct Launch<'a> {
    pub(super) topology: &'a Topology,
    pub(super) inputs: &'a PlanInputs,
}

impl Launch<'_> {
    pub(super) fn node(&self, replica: &Replica<'_>, placement: Placement) -> NodePlan {
        NodePlan {
            id: replica.id.clone(),
            role: replica.settings.role,
            served_model: self.topology.served_by(replica.settings).to_owned(),
            pool: replica.settings.pool.clone(),
            weight: replica.settings.weight,
            addr: address(replica.settings, placement.port),
            argv: self.argv(replica, &placement),
            env: self.env(replica, &placement),
            tensor_parallel: replica.settings.tensor_parallel,
            memory: None,
            gpus: placement.gpus,
            cpus: placement.cpus,
            numa: placement.numa,
        }
    }

    /// The user's own flags come last.
    fn argv(&self, replica: &Replica<'_>, placement: &Placement) -> Vec<String> {
        let Self { topology, inputs } = self;
        let node = replica.settings;
        let model = inputs.facts(node).load_from.as_str();
        let mut argv: Vec<String> = match &inputs.launcher {
            Launcher::Vllm(program) => vec![
                program.to_string_lossy().into_owned(),
                "serve".to_owned(),
                model.to_owned(),
            ],
            Launcher::Python(python) => [
                &python.to_string_lossy(),
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                model,
            ]
            .map(str::to_owned)
            .to_vec(),
        };
        let mut flag = |name: &str, value: String| argv.extend([name.to_owned(), value]);
        flag("--served-model-name", topology.served_by(node).to_owned());
        flag("--host", address(node, placement.port).ip().to_string());
        flag("--port", placement.port.to_string());
        flag("--block-size", topology.block_size.to_string());
        flag("--dtype", topology.dtype.clone());
        flag("--tensor-parallel-size", node.tensor_parallel.to_string());
        if let Some(length) = topology.max_model_len {
            flag("--max-model-len", length.to_string());
        }
        if topology.device == Device::Cuda {
            let fraction = node.gpu_memory_fraction;
            flag("--gpu-memory-utilization", fraction.to_string());
            if let Some(bytes) = node.kv_cache {
                flag("--kv-cache-memory-bytes", bytes.to_string());
            }
        }
        if node.shares_kv() {
            flag("--prefix-caching-hash-algo", "sha256_cbor".to_owned());
            let config = match topology.kv.connector {
                Connector::Pegaflow => pega_config(),
                Connector::Nixl => nixl_config(topology.device, node.role),
            };
            flag("--kv-transfer-config", config);
        }
        // A line for each health probe would fill the log and count as progress of a start.
        argv.push("--disable-uvicorn-access-log".to_owned());
        argv.extend(node.args.iter().cloned());
        argv
    }

    /// Defaults, then the user's variables, then those that must be ours.
    fn env(&self, replica: &Replica<'_>, placement: &Placement) -> BTreeMap<String, String> {
        let Self { topology, inputs } = self;
        let node = replica.settings;
        let mut env = BTreeMap::new();
        let mut set = |name: &str, value: String| env.insert(name.to_owned(), value);
        for name in ["PYTHONUNBUFFERED", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"] {
            set(name, "1".to_owned());
        }
        if self.model_is_local(node) {
            set("HF_HUB_OFFLINE", "1".to_owned());
        }
        for (name, value) in &node.env {
            set(name, value.clone());
        }

        set("PYTHONPATH", self.pythonpath(&node.env));
        set("PYTHONHASHSEED", "0".to_owned());
        set("VLLM_PORT", placement.internal_port.to_string());
        set("PEGAFLOW_NODE", replica.id.to_string());
        set("PEGAFLOW_RUN_ID", inputs.run_id.clone());
        set(NodeKey::VARIABLE, inputs.node_key.reveal().to_owned());
        match topology.device {
            Device::Cuda => {
                let gpus: Vec<String> = placement.gpus.iter().map(u32::to_string).collect();
                set("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned());
                set("CUDA_VISIBLE_DEVICES", gpus.join(","));
            }
            Device::Cpu => {
                let gib = node.kv_cache.unwrap_or(0) >> 30;
                let bind = cpu::threads_bind(&placement.cpus, node.tensor_parallel);
                set("VLLM_CPU_KVCACHE_SPACE", gib.to_string());
                set("VLLM_CPU_OMP_THREADS_BIND", bind);
            }
        }
        if node.shares_kv() && topology.kv.connector == Connector::Nixl {
            let host = topology.kv.side_channel_host.to_string();
            set("VLLM_NIXL_SIDE_CHANNEL_HOST", host);
            set(
                "VLLM_NIXL_SIDE_CHANNEL_PORT",
                placement.side_channel_port.to_string(),
            );
        }
        if node.shares_kv() && topology.kv.connector == Connector::Pegaflow {
            let socket = inputs.engine_socket.to_string_lossy();
            set("PEGAFLOW_KV_SOCKET", socket.into_owned());
            set("PEGAFLOW_KV_TOKEN", inputs.kv_token.clone());
            set("PEGAFLOW_WEIGHTS_ID", inputs.facts(node).identity.clone());
            if topology.kv.save_decoded {
                set("PEGAFLOW_KV_SAVE_DECODED", "1".to_owned());
            }
        }
        env
    }

    /// Everything is on this disk: vLLM need not ask Hugging Face.
    fn model_is_local(&self, node: &NodeSettings) -> bool {
        match self.topology.model_of(node) {
            ModelRef::BuiltinTiny | ModelRef::Path(_) => true,
            ModelRef::HuggingFace(id) => *id != self.inputs.facts(node).load_from,
        }
    }

    fn pythonpath(&self, env: &BTreeMap<String, String>) -> String {
        let shim = self.inputs.shim_dir.to_string_lossy();
        let others = env
            .get("PYTHONPATH")
            .or(self.inputs.inherited_pythonpath.as_ref());
        match others.filter(|others| !others.is_empty()) {
            Some(others) => format!("{shim}:{others}"),
            None => shim.into_owned(),
        }
    }
}

fn pega_config() -> String {
    json!({
        "kv_connector": "PegaConnector",
        "kv_connector_module_path": "pegaflow_vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "PegaSpec",
            "spec_module_path": "pegaflow_vllm.spec",
        },
    })
    .to_string()
}

/// A prefill node keeps a prompt's KV for so long after its answer; a decode node that has asked for it
/// renews that every few seconds until it has read it. vLLM's own default, written down since the router counts
/// on it.
const NIXL_LEASE_SECONDS: u32 = 30;

fn nixl_config(device: Device, role: Role) -> String {
    json!({
        "kv_connector": "NixlConnector",
        "kv_role": match role {
            Role::Prefill => "kv_producer",
            Role::Decode => "kv_consumer",
            Role::Unified => "kv_both",
        },
        "kv_buffer_device": match device {
            Device::Cuda => "cuda",
            Device::Cpu => "cpu",
        },
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": { "kv_lease_duration": NIXL_LEASE_SECONDS },
    })
    .to_string()
}
