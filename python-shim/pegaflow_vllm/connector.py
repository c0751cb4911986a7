"""PegaConnector: vLLM's offloading connector with hand-offs, stores submitted at once, and failed loads reported."""

from typing import Any

from pegaflow_vllm import check

try:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

    from pegaflow_vllm import meta
    from pegaflow_vllm.guard import guarded
    from pegaflow_vllm.manager import Manager
    from pegaflow_vllm.spec import building
    from pegaflow_vllm.worker import Worker
except ImportError as missing:
    raise ImportError(check.message([str(missing)])) from missing

# From 0.30 on a worker names the requests whose load failed; before that it names blocks.
_TransferResults = getattr(base, "KVConnectorTransferResults", None)

_LIMIT = "max_offload_tokens"
"""Where vLLM keeps how many tokens of a request it offers at most; absent from older versions, which then offer
generated tokens as they come."""


class PegaConnector(OffloadingConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        check.refuse_unsuitable()
        groups = len(kv_cache_config.kv_cache_groups)
        if _TransferResults is None and groups > 1:
            raise ValueError(
                f"this model has {groups} KV cache groups; this vLLM cannot survive a failed load of such a "
                "model: use vLLM 0.30 or newer"
            )
        with building(vllm_config, kv_cache_config):
            super().__init__(vllm_config, role, kv_cache_config)
        manager = self._manager
        if manager is not None:
            manager.keys_of = self._keys_of
            manager.generated_of = self._generated_of

    # -- scheduler

    def on_new_request(self, request: Any) -> None:
        self._begin(request)
        super().on_new_request(request)
        self._save_when_finished(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        manager = self._manager
        assert manager is not None
        manager.begin_attempt(request.request_id)
        matched = super().get_num_new_matched_tokens(request, num_computed_tokens)
        manager.end_attempt(request.request_id, matched[0])
        return matched

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> Any:
        if num_external_tokens == 0 and self._manager is not None:
            self._manager.unused(request.request_id)
        return super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        connector_meta = super().build_connector_meta(scheduler_output)
        self._seal(scheduler_output)
        if self._manager is not None:
            meta.attach(connector_meta, self._manager.step())
        return connector_meta

    def update_connector_output(self, connector_output: Any) -> None:
        failed = self._failed_requests(connector_output)
        super().update_connector_output(connector_output)
        if failed and self._manager is not None:
            self._manager.loads_failed(failed)
        self._note_stray(connector_output)

    def request_finished(self, request: Any, block_ids: Any) -> Any:
        self._ending(request)
        return super().request_finished(request, block_ids)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        self._ending(request)
        return super().request_finished_all_groups(request, block_ids)

    # -- worker

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        # Comes first in a step, and may store.
        self._follow(kv_connector_metadata)
        super().handle_preemptions(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._follow(self._connector_metadata)
        self._discard_orphans()
        super().start_load_kv(forward_context, **kwargs)

    def wait_for_save(self) -> None:
        """Saves what this step computed now: the stock connector waits for the next step to begin."""
        super().wait_for_save()
        self._submit_stores()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        # get_finished forgets whose they are, and decides which failures can be taken.
        loads = dict(self.connector_worker._load_jobs)
        sent, received = self.get_finished(finished_req_ids)
        received = set(received or ())
        failed = self._take_failed_requests(loads)
        return _TransferResults(
            finished_sending=set(sent or ()), finished_recving=received, failed_recving=failed & received
        )

    def build_connector_worker_meta(self) -> Any:
        stock = super().build_connector_worker_meta()
        worker = self._worker
        stray = worker.stray() if worker is not None else None
        if stock is None and stray is None:
            return None
        return meta.WorkerMeta.of(stock or meta.OffloadingWorkerMetadata(), stray)

    def get_block_ids_with_load_errors(self) -> set[int]:
        if _TransferResults is not None:
            return set()
        worker = self._worker
        return worker.take_failures().blocks if worker is not None else set()

    # -- inside

    @property
    def _manager(self) -> Manager | None:
        scheduler = self.connector_scheduler
        return scheduler.manager if scheduler is not None else None

    @property
    def _worker(self) -> Worker | None:
        worker = self.connector_worker
        return worker.worker if worker is not None else None

    @guarded()
    def _begin(self, request: Any) -> None:
        tokens = request.num_prompt_tokens
        chunks = sum(tokens // group.tokens_per_chunk for group in self._groups())
        self._manager.begin(request.request_id, request.kv_transfer_params, tokens, chunks)

    def _groups(self) -> Any:
        return self.connector_scheduler.config.kv_group_configs

    def _keys_of(self, request_id: str) -> list[bytes]:
        status = self.connector_scheduler._req_status.get(request_id)
        if status is None:
            return []
        return [key for state in status.group_states for key in state.offload_keys]

    def _generated_of(self, request_id: str) -> list[bytes]:
        status = self.connector_scheduler._req_status.get(request_id)
        if status is None:
            return []
        prompt = status.req.num_prompt_tokens
        groups = zip(self._groups(), status.group_states, strict=True)
        return [key for group, state in groups for key in state.offload_keys[prompt // group.tokens_per_chunk :]]

    @guarded()
    def _save_when_finished(self, request: Any) -> None:
        """Generated tokens are offered once, at the end: nothing happens between two tokens."""
        status = self.connector_scheduler._req_status.get(request.request_id)
        if self._manager.saves_generated(request.request_id) and getattr(status, _LIMIT, 0) is None:
            setattr(status, _LIMIT, request.num_prompt_tokens)

    @guarded()
    def _ending(self, request: Any) -> None:
        self._manager.ending(request.request_id)
        status = self.connector_scheduler._req_status.get(request.request_id)
        if self._manager.saves_generated(request.request_id) and hasattr(status, _LIMIT):
            params = request.kv_transfer_params or {}
            setattr(status, _LIMIT, params.get(_LIMIT))

    @guarded()
    def _seal(self, scheduler_output: Any) -> None:
        """Seals every hand-off whose prompt is computed when this step ends: all its keys have been offered."""
        scheduled = scheduler_output.num_scheduled_tokens
        for request_id, prompt_tokens in self._manager.unsealed():
            tokens = scheduled.get(request_id)
            status = self.connector_scheduler._req_status.get(request_id)
            if tokens and status is not None and status.req.num_computed_tokens + tokens >= prompt_tokens:
                self._manager.seal(request_id)

    @guarded()
    def _note_stray(self, output: Any) -> None:
        stray = getattr(output.kv_connector_worker_meta, "stray", None)
        if stray is not None:
            self._manager.strayed(stray)

    @guarded()
    def _follow(self, connector_meta: Any) -> None:
        self._worker.follow(meta.attached(connector_meta).life)

    @guarded()
    def _discard_orphans(self) -> None:
        if orphans := meta.attached(self._connector_metadata).orphans:
            self._worker.discard(orphans)

    @guarded(set)
    def _failed_requests(self, output: Any) -> set[str]:
        failed = set(getattr(output, "failed_recving", None) or ())
        if not failed and getattr(output, "invalid_block_ids", None):
            # Blocks only: blame every load that completes with them.
            done = getattr(output.kv_connector_worker_meta, "completed_jobs", ())
            jobs = self.connector_scheduler._jobs
            for job_id in done:
                job = jobs.get(job_id)
                if job is not None and not job.is_store:
                    failed.add(job.req_id)
        return failed

    @guarded(set)
    def _take_failed_requests(self, loads: dict[int, str]) -> set[str]:
        return {loads[job] for job in self._worker.take_failures().jobs if job in loads}

    @guarded()
    def _submit_stores(self) -> None:
        jobs = self.connector_worker._unsubmitted_store_jobs
        while jobs:
            job_id, source, target = jobs.pop(0)
            self._worker.submit_store(job_id, source, target)
