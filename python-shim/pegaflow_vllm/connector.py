"""PegaConnector: vLLM's offloading connector with hand-offs, stores submitted at once, and failed loads reported."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from pegaflow_vllm.guard import guarded
from pegaflow_vllm.manager import Manager
from pegaflow_vllm.spec import building
from pegaflow_vllm.worker import Worker

# From 0.30 on a worker names the requests whose load failed; before that it names blocks.
_TransferResults = getattr(base, "KVConnectorTransferResults", None)

_ORPHANS = "pegaflow_orphans"
"""Attribute on a step's connector metadata."""


class PegaConnector(OffloadingConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
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

    # -- scheduler

    def on_new_request(self, request: Any) -> None:
        self._begin(request)
        super().on_new_request(request)

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
        meta = super().build_connector_meta(scheduler_output)
        self._seal(scheduler_output)
        self._pass_orphans(meta)
        return meta

    def update_connector_output(self, connector_output: Any) -> None:
        failed = self._failed_requests(connector_output)
        super().update_connector_output(connector_output)
        if failed and self._manager is not None:
            self._manager.loads_failed(failed)

    def request_finished(self, request: Any, block_ids: Any) -> Any:
        if self._manager is not None:
            self._manager.ending(request.request_id)
        return super().request_finished(request, block_ids)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        if self._manager is not None:
            self._manager.ending(request.request_id)
        return super().request_finished_all_groups(request, block_ids)

    # -- worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._discard_orphans()
        super().start_load_kv(forward_context, **kwargs)

    def wait_for_save(self) -> None:
        """Saves what this step computed now: the stock connector waits for the next step to begin."""
        super().wait_for_save()
        self._submit_stores()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        failed = self._take_failed_requests()
        sent, received = self.get_finished(finished_req_ids)
        received = set(received or ())
        return _TransferResults(
            finished_sending=set(sent or ()), finished_recving=received, failed_recving=failed & received
        )

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
    def _pass_orphans(self, meta: Any) -> None:
        """Only workers may discard, so the refs travel with the step's metadata."""
        if orphans := self._manager.take_orphans():
            setattr(meta, _ORPHANS, orphans)

    @guarded()
    def _discard_orphans(self) -> None:
        if orphans := getattr(self._connector_metadata, _ORPHANS, b""):
            self._worker.discard(orphans)

    @guarded(set)
    def _failed_requests(self, output: Any) -> set[str]:
        failed = set(getattr(output, "failed_recving", None) or ())
        if not failed and getattr(output, "invalid_block_ids", None):
            # Blocks only: blame every load that completes with them.
            meta = output.kv_connector_worker_meta
            jobs = self.connector_scheduler._jobs
            for job_id in getattr(meta, "completed_jobs", ()):
                job = jobs.get(job_id)
                if job is not None and not job.is_store:
                    failed.add(job.req_id)
        return failed

    @guarded(set)
    def _take_failed_requests(self) -> set[str]:
        loads = self.connector_worker._load_jobs
        return {loads[job] for job in self._worker.take_failures().jobs if job in loads}

    @guarded()
    def _submit_stores(self) -> None:
        jobs = self.connector_worker._unsubmitted_store_jobs
        while jobs:
            job_id, source, target = jobs.pop(0)
            self._worker.submit_store(job_id, source, target)
