"""What makes the bytes of two nodes interchangeable, as a map the engine compares key by key.

Every rank and the scheduler of a node must produce the same map, and so must every node of a pair; so it holds
neither the rank nor the row size, and nothing that may differ between P and D (memory, lengths, ports).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import vllm

from pegaflow_vllm.config import Settings

# Fields of a Hugging Face config that say where it came from, not what the model computes.
_PROVENANCE = ("_name_or_path", "transformers_version", "_commit_hash")


def identity(
    settings: Settings, vllm_config: Any, kv_cache_config: Any, env: Mapping[str, str] = os.environ
) -> dict[str, str]:
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    groups = [_group(group) for group in kv_cache_config.kv_cache_groups]
    fields = {
        "weights": settings.weights_id or f"{model.model}@{getattr(model, 'revision', None)}",
        "vllm": vllm.__version__,
        "model_config": _digest(_hf_config(model)),
        "model_dtype": _plain(model.dtype),
        "quantization": _plain(getattr(model, "quantization", None)),
        "kv_dtype": _plain(cache.cache_dtype),
        "kv_layout": _plain(getattr(cache, "kv_cache_layout", None)),
        "tokens_per_block": ",".join(str(group["tokens"]) for group in groups),
        "blocks_per_chunk": "1",
        "groups": _digest(groups),
        "tp": str(parallel.tensor_parallel_size),
        "pp": str(parallel.pipeline_parallel_size),
        "dcp": str(getattr(parallel, "decode_context_parallel_size", 1)),
        "world": str(parallel.world_size),
        "speculative": _speculative(vllm_config),
        "hash": f"{getattr(cache, 'prefix_caching_hash_algo', None)},seed={env.get('PYTHONHASHSEED', 'random')}",
    }
    return fields


def _hf_config(model: Any) -> dict[str, Any]:
    """The model's config with vLLM's overrides (rope, hf_overrides) already applied."""
    config = model.hf_config.to_dict()
    return {key: value for key, value in config.items() if key not in _PROVENANCE}


def _group(group: Any) -> dict[str, Any]:
    spec = group.kv_cache_spec
    # Workers keep a wrapper of per-layer specs where the scheduler keeps the first of them.
    per_layer = getattr(spec, "kv_cache_specs", None)
    if isinstance(per_layer, dict) and per_layer:
        spec = next(iter(per_layer.values()))
    return {
        "kind": type(spec).__name__,
        "tokens": spec.block_size,
        "window": getattr(spec, "sliding_window", None),
        "dtype": _plain(getattr(spec, "dtype", None)),
        "kv_heads": getattr(spec, "num_kv_heads", None),
        "head_size": getattr(spec, "head_size", None),
    }


def _speculative(vllm_config: Any) -> str:
    config = getattr(vllm_config, "speculative_config", None)
    if config is None:
        return "none"
    method, model = getattr(config, "method", None), getattr(config, "model", None)
    return f"{method},{model},{getattr(config, 'num_speculative_tokens', None)}"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")
