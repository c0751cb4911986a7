//! vLLM flags and environment variables that a node's `args` and `env` must not hold.

/// What pegaflow thinks of a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// pegaflow writes it by itself.
    Owned { instead: &'static str },
    /// Refused with any value.
    Unsupported { reason: &'static str },
    /// Refused with a value above 1.
    OneOnly { reason: &'static str },
    /// Refused on nodes that share KV.
    UnifiedOnly { reason: &'static str },
}

use Verdict::{OneOnly, Owned, UnifiedOnly, Unsupported};

const SPLIT_WORLD: &str =
    "pegaflow pins and pairs nodes itself; write more nodes (`count`) or `tensor_parallel`";
const ADDRESS: &str = "pegaflow's router and probes speak plain HTTP to it";
const KV: &str = "leave it out: pegaflow configures the connector, its store is sized in [kv]";

const LORA: &str = "that a node loads no other adapter's KV is not proven yet; merge the adapter into the model, or \
     serve it from a node with `role = \"unified\"`";

const FLAGS: &[(&str, Verdict)] = &[
    (
        "--port",
        Owned {
            instead: "write `port` in the [[node]]",
        },
    ),
    (
        "--host",
        Owned {
            instead: "write `host` in the [[node]]; clients come in at `listen` in [router]",
        },
    ),
    (
        "--model",
        Owned {
            instead: "write `model` at the top",
        },
    ),
    (
        "--served-model-name",
        Owned {
            instead: "write `served_model_name` at the top",
        },
    ),
    (
        "--dtype",
        Owned {
            instead: "write `dtype` at the top",
        },
    ),
    (
        "--block-size",
        Owned {
            instead: "write `block_size` at the top",
        },
    ),
    (
        "--max-model-len",
        Owned {
            instead: "write `max_model_len` at the top",
        },
    ),
    (
        "--tensor-parallel-size",
        Owned {
            instead: "write `tensor_parallel` in the [[node]]",
        },
    ),
    (
        "-tp",
        Owned {
            instead: "write `tensor_parallel` in the [[node]]",
        },
    ),
    (
        "--gpu-memory-utilization",
        Owned {
            instead: "write `gpu_memory_fraction` in the [[node]]",
        },
    ),
    (
        "--kv-cache-memory-bytes",
        Owned {
            instead: "write `kv_cache` in the [[node]]",
        },
    ),
    (
        "--prefix-caching-hash-algo",
        Owned {
            instead: "leave it out: nodes must hash alike",
        },
    ),
    ("--kv-transfer-config", Owned { instead: KV }),
    ("--kv-offloading-size", Unsupported { reason: KV }),
    ("--kv-offloading-backend", Unsupported { reason: KV }),
    (
        "--data-parallel-size",
        OneOnly {
            reason: "write `count` in the [[node]] for more replicas",
        },
    ),
    (
        "-dp",
        OneOnly {
            reason: "write `count` in the [[node]] for more replicas",
        },
    ),
    (
        "--data-parallel-rank",
        Unsupported {
            reason: SPLIT_WORLD,
        },
    ),
    (
        "--data-parallel-start-rank",
        Unsupported {
            reason: SPLIT_WORLD,
        },
    ),
    (
        "--data-parallel-address",
        Unsupported {
            reason: SPLIT_WORLD,
        },
    ),
    (
        "--data-parallel-hybrid-lb",
        Unsupported {
            reason: SPLIT_WORLD,
        },
    ),
    (
        "--data-parallel-external-lb",
        Unsupported {
            reason: SPLIT_WORLD,
        },
    ),
    (
        "--pipeline-parallel-size",
        OneOnly {
            reason: "the store keeps one row per tensor-parallel rank only; write `tensor_parallel`",
        },
    ),
    (
        "-pp",
        OneOnly {
            reason: "the store keeps one row per tensor-parallel rank only; write `tensor_parallel`",
        },
    ),
    (
        "--decode-context-parallel-size",
        OneOnly {
            reason: "ranks would hold different tokens of one block",
        },
    ),
    (
        "-dcp",
        OneOnly {
            reason: "ranks would hold different tokens of one block",
        },
    ),
    (
        "--prefill-context-parallel-size",
        OneOnly {
            reason: "ranks would hold different tokens of one block",
        },
    ),
    (
        "-pcp",
        OneOnly {
            reason: "ranks would hold different tokens of one block",
        },
    ),
    (
        "--api-server-count",
        OneOnly {
            reason: "pegaflow watches one API server per node; write `count` for more nodes",
        },
    ),
    (
        "-asc",
        OneOnly {
            reason: "pegaflow watches one API server per node; write `count` for more nodes",
        },
    ),
    (
        "--nnodes",
        OneOnly {
            reason: "pegaflow serves one machine",
        },
    ),
    (
        "--node-rank",
        Unsupported {
            reason: "pegaflow serves one machine",
        },
    ),
    (
        "--headless",
        Unsupported {
            reason: "every node needs its API server",
        },
    ),
    ("--uds", Unsupported { reason: ADDRESS }),
    ("--ssl-keyfile", Unsupported { reason: ADDRESS }),
    ("--ssl-certfile", Unsupported { reason: ADDRESS }),
    ("--root-path", Unsupported { reason: ADDRESS }),
    (
        "--api-key",
        Unsupported {
            reason: "pegaflow gives its nodes a key of their own; write `api_keys` in [router] for clients",
        },
    ),
    ("--enable-lora", UnifiedOnly { reason: LORA }),
    ("--lora-modules", UnifiedOnly { reason: LORA }),
    (
        "--revision",
        Unsupported {
            reason: "pegaflow fetches the main revision once; give a directory as `model` for another",
        },
    ),
    (
        "--config",
        Unsupported {
            reason: "it could set what pegaflow decides; write the flags in `args`",
        },
    ),
];

/// Flags that change the bytes of the KV or their names: alike on all nodes that share KV.
pub(super) const SHAPES_KV: &[&str] = &[
    "--kv-cache-dtype",
    "--quantization",
    "--hf-overrides",
    "--load-format",
    "--seed",
    "--speculative-config",
];

/// A flag of `args` by its full name, and its value where it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flag {
    /// In `args`.
    pub(super) index: usize,
    pub(super) name: String,
    pub(super) value: Option<String>,
}

/// The flags of `args`, as vLLM's parser reads them: `--a b`, `--a=b`, `--a_b` for `--a-b`,
/// `--a.key` for a part of a JSON value.
pub(super) fn flags(args: &[String]) -> Vec<Flag> {
    let is_flag = |arg: &str| arg.starts_with('-') && arg.parse::<f64>().is_err();
    let mut flags = Vec::new();
    for (index, arg) in args.iter().enumerate() {
        if !is_flag(arg) {
            continue;
        }
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (arg.as_str(), None),
        };
        let name = name.split('.').next().unwrap_or(name).replace('_', "-");
        let following = || args.get(index + 1).filter(|next| !is_flag(next)).cloned();
        flags.push(Flag {
            index,
            name,
            value: inline.or_else(following),
        });
    }
    flags
}

/// What is wrong with a flag, and its full name.
pub(super) fn verdict(flag: &Flag) -> Option<(&'static str, Verdict)> {
    let exact = FLAGS.iter().find(|(name, _)| *name == flag.name);
    // Python's argparse takes an unambiguous beginning for the whole flag.
    let abbreviated = || {
        FLAGS.iter().find(|(name, _)| {
            flag.name.len() > "--xxxx".len() && name.starts_with(flag.name.as_str())
        })
    };
    let (name, verdict) = exact.or_else(abbreviated)?;
    let is_one = flag.value.as_deref() == Some("1");
    match verdict {
        OneOnly { .. } if is_one => None,
        _ => Some((name, *verdict)),
    }
}

/// What to write instead of an environment variable that pegaflow sets.
pub(super) fn owned_env(name: &str) -> Option<&'static str> {
    Some(match name {
        "CUDA_VISIBLE_DEVICES" | "NVIDIA_VISIBLE_DEVICES" => "write `gpus` in the [[node]]",
        "CUDA_DEVICE_ORDER" => "leave it out: GPUs are counted in PCI bus order",
        "PYTHONHASHSEED" => "leave it out: nodes must hash alike",
        "VLLM_PORT" => "leave it out: every node gets a range of its own",
        "VLLM_NIXL_SIDE_CHANNEL_HOST" => "write `side_channel_host` in [kv]",
        "VLLM_NIXL_SIDE_CHANNEL_PORT" => "leave it out: every node gets a port of its own",
        "VLLM_CPU_KVCACHE_SPACE" => "write `kv_cache` in the [[node]]",
        "VLLM_CPU_OMP_THREADS_BIND" => "write `cpus` in the [[node]]",
        "VLLM_API_KEY" => {
            "leave it out: pegaflow gives its nodes a key of their own; write `api_keys` in [router] for clients"
        }
        name if name.starts_with("PEGAFLOW_") => "leave it out",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Vec<Flag> {
        flags(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn all_spellings_of_a_flag_are_one() {
        for args in [
            &["--block-size", "32"][..],
            &["--block_size=32"],
            &["--block-siz", "32"],
        ] {
            let flags = parse(args);
            assert_eq!(flags[0].value.as_deref(), Some("32"), "{args:?}");
            let (name, verdict) = verdict(&flags[0]).unwrap();
            assert_eq!(name, "--block-size");
            assert!(matches!(verdict, Owned { .. }));
        }
        let dotted = &parse(&["--kv-transfer-config.kv_role", "kv_both"])[0];
        assert_eq!(verdict(dotted).unwrap().0, "--kv-transfer-config");
    }

    #[test]
    fn one_is_allowed_and_more_is_not() {
        assert_eq!(verdict(&parse(&["--data-parallel-size", "1"])[0]), None);
        for args in [&["--data-parallel-size=2"][..], &["-dp", "2"], &["-dp"]] {
            assert!(
                matches!(verdict(&parse(args)[0]), Some((_, OneOnly { .. }))),
                "{args:?}"
            );
        }
    }

    #[test]
    fn other_flags_and_values_are_left_alone() {
        let flags = parse(&[
            "--enforce-eager",
            "--model-impl",
            "auto",
            "--seed",
            "-1",
            "--max-num-seqs=8",
        ]);
        assert!(
            flags.iter().all(|flag| verdict(flag).is_none()),
            "{flags:?}"
        );
        assert_eq!(flags.len(), 4);
        assert_eq!(flags[2].value.as_deref(), Some("-1"));
    }
}
