"""A vLLM node without a model: vLLM's own scheduler and both halves of PegaConnector in this process.

The pretended model writes a byte per token into the KV cache, and samples from all that the cache holds of the
request: wrong KV gives a wrong token.
"""

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from pegaflow_vllm.connector import PegaConnector
from pegaflow_vllm.protocol import Commit
from toy_engine import ToyEngine

BLOCK = 16
BLOCKS = 64
LAYER = "layers.0.attn"
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}


def config(folder: Path, *, batch: int = 512) -> SimpleNamespace:
    """vLLM's configuration, and how its KV cache is laid out."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    extra = {"spec_name": "PegaSpec", "spec_module_path": "pegaflow_vllm.spec"}
    vllm_config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=batch,
        max_num_seqs=16,
        block_size=BLOCK,
        async_scheduling=False,
        kv_transfer_config={
            "kv_connector": "PegaConnector",
            "kv_connector_module_path": "pegaflow_vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        },
    ).create_engine_config()
    vllm_config.cache_config.num_gpu_blocks = BLOCKS
    vllm_config.cache_config.block_size = BLOCK
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    page = spec.page_size_bytes
    cache = KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[KVCacheTensor(BLOCKS * page, [LAYER], BLOCKS * page, page)],
        kv_cache_groups=[KVCacheGroupSpec([LAYER], spec)],
        hash_block_size=BLOCK,
        cache_hit_alignment_tokens=BLOCK,
    )
    return SimpleNamespace(vllm=vllm_config, cache=cache)


def prompt(seed: int, length: int) -> list[int]:
    return [300 + (seed * 7919 + at * 31 + at * at) % 1500 for at in range(length)]


PROMPT = prompt(1, 5 * BLOCK + 3)


class Node:
    """`name` must be in PEGAFLOW_NODE while it is made. With several ranks, each has the same KV."""

    def __init__(self, config: SimpleNamespace, ranks: int = 1):
        init_none_hash(sha256_cbor)
        # As in vLLM: workers first.
        self.ranks = [Rank(config, rank, ranks) for rank in range(ranks)]
        self.aggregator = KVOutputAggregator(ranks)
        self.worker = self.ranks[0].worker
        config = of_rank(config, 0, ranks)
        self.scheduler = Scheduler(
            config.vllm, config.cache, StructuredOutputManager(config.vllm), block_size=BLOCK, log_stats=True
        )
        self.connector: PegaConnector = self.scheduler.connector
        self.manager = self.connector._manager
        self.answers: dict[str, list[int]] = {}
        self.failed: list[str] = []
        """Requests whose load was reported as failed, each time."""
        self.loads: list[int] = []
        """Chunks of every load that did not fail."""

    def add(self, request_id: str, prompt: list[int], tokens: int = 1, **mark: str) -> None:
        extra = {"kv_transfer_params": {"pegaflow": mark}} if mark else None
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=extra)
        request = Request(request_id, prompt, params, None, block_hasher=get_request_block_hasher(BLOCK, sha256_cbor))
        self.answers[request_id] = []
        self.scheduler.add_request(request)

    def ask(self, request_id: str, prompt: list[int], tokens: int = 1, **mark: str) -> list[int]:
        """A request from beginning to end, with nothing beside it."""
        self.add(request_id, prompt, tokens, **mark)
        return self.finish(request_id)

    def finish(self, request_id: str) -> list[int]:
        for _ in range(200):
            if request_id not in self.scheduler.requests and not self.scheduler.finished_req_ids:
                return self.answers[request_id]
            self.step()
        raise AssertionError(f"{request_id} does not end")

    def step(self, between=None) -> None:
        """One step of the engine; `between` runs when it is scheduled and has not reached the worker."""
        output = self.scheduler.schedule()
        if between is not None:
            between()
        # As between processes.
        connector_meta = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        for rank in self.ranks:
            rank.worker.handle_preemptions(connector_meta)
            rank.worker.bind_connector_metadata(connector_meta)
        sampled = self._forward(output)
        ids = list(sampled)
        results = []
        for rank in self.ranks:
            result = ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={request_id: at for at, request_id in enumerate(ids)},
                sampled_token_ids=[sampled[request_id] for request_id in ids],
                kv_connector_output=rank.results(output.finished_req_ids),
            )
            results.append(pickle.loads(pickle.dumps(result)))
        result = self.aggregator.aggregate(results) if len(results) > 1 else results[0]
        connector_output = result.kv_connector_output
        self.failed += sorted(connector_output.failed_recving)
        for job in connector_meta.load_jobs.values():
            if job.req_id not in connector_output.failed_recving:
                self.loads.append(len(job.src_spec.refs) // 8)
        self.scheduler.update_from_output(output, result)
        for request_id, tokens in sampled.items():
            self.answers[request_id] += tokens

    def _forward(self, output) -> dict[str, list[int]]:
        sampled: dict[str, list[int]] = {}
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            # The scheduler has counted this step's tokens already.
            end = request.num_computed_tokens
            for position in range(end - count, end):
                for rank in self.ranks:
                    rank.kv[blocks[position // BLOCK], :, position % BLOCK] = request.all_token_ids[position] % 251
            if end < request.num_tokens:
                sampled[request_id] = []
                continue
            answers = {rank.sample(blocks, end) for rank in self.ranks}
            assert len(answers) == 1, f"the ranks of {request_id} differ: {answers}"
            sampled[request_id] = [answers.pop()]
        return sampled

    def close(self) -> None:
        for rank in self.ranks:
            rank.worker.shutdown()
        self.scheduler.shutdown()


class Rank:
    """A worker and its KV cache."""

    def __init__(self, config: SimpleNamespace, rank: int, ranks: int):
        config = of_rank(config, rank, ranks)
        self.kv = torch.zeros(BLOCKS, 2, BLOCK, 1, 8, dtype=torch.bfloat16)
        self.worker = PegaConnector(config.vllm, KVConnectorRole.WORKER, config.cache)
        self.worker.register_kv_caches({LAYER: self.kv})

    def results(self, finished: set[str]) -> KVConnectorOutput:
        """What comes after the forward of a step."""
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        output = KVConnectorOutput()
        results = self.worker.get_transfer_results(finished)
        output.finished_sending, output.finished_recving = results.finished_sending, results.finished_recving
        output.failed_recving = results.failed_recving
        output.invalid_block_ids = self.worker.get_block_ids_with_load_errors()
        output.kv_connector_worker_meta = self.worker.build_connector_worker_meta()
        self.worker.clear_connector_metadata()
        return output

    def sample(self, blocks: list[int], end: int) -> int:
        held = [float(self.kv[blocks[at // BLOCK], 0, at % BLOCK, 0, 0]) * (at + 1) for at in range(end)]
        return 300 + int(sum(held)) % 1500


def of_rank(config: SimpleNamespace, rank: int, ranks: int) -> SimpleNamespace:
    if ranks == 1:
        return config
    vllm = copy.copy(config.vllm)
    vllm.parallel_config = copy.copy(vllm.parallel_config)
    vllm.parallel_config.rank = rank
    vllm.parallel_config.world_size = vllm.parallel_config.tensor_parallel_size = ranks
    return SimpleNamespace(vllm=vllm, cache=config.cache)


def hand_off(p: Node, d: Node, engine: ToyEngine, ids: list[int], name: str, tokens: int = 4) -> list[int]:
    commits = len(engine.of(Commit))
    p.ask(f"p-{name}", ids, handoff=name, leg="prefill")
    if len(ids) >= BLOCK:
        engine.wait_for(Commit, commits + 1)
    return d.ask(f"d-{name}", ids, tokens, handoff=name, leg="decode")
