"""PegaSpec: what vLLM's offloading connector asks for its manager and its worker."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.v1.kv_offload.base import OffloadingManager, OffloadingSpec, OffloadingWorker

from pegaflow_vllm import namespace, protocol
from pegaflow_vllm.announce import Announcer, Say
from pegaflow_vllm.client import Client
from pegaflow_vllm.config import Settings
from pegaflow_vllm.guard import logger, report
from pegaflow_vllm.manager import Manager
from pegaflow_vllm.worker import Layout, Worker

_building: ContextVar[tuple[Any, Any]] = ContextVar("pegaflow_building")


@contextmanager
def building(vllm_config: Any, kv_cache_config: Any) -> Iterator[None]:
    """Hands the full configuration to the PegaSpec made inside: vLLM passes it a digest only."""
    token = _building.set((vllm_config, kv_cache_config))
    try:
        yield
    finally:
        _building.reset(token)


class PegaSpec(OffloadingSpec):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.blocks_per_chunk != 1:
            raise ValueError(
                f"pegaflow needs blocks_per_chunk 1, not {self.blocks_per_chunk}: remove 'block_size' and "
                "'blocks_per_chunk' from kv_connector_extra_config"
            )
        self._vllm_config, self._kv_cache_config = _building.get()
        self._settings = Settings.from_env()
        if self._settings is None:
            logger.warning("pegaflow: PEGAFLOW_KV_SOCKET is not set; this node serves without the store")
        # Ranks that have the same KV (MLA): the stock worker stores from rank 0 only, where it knows of this.
        self.replicated_layout = _replicated(self.config)
        # vLLM offers generated tokens only when told so; the manager takes them from decode legs.
        self.offload_prompt_only = not self._save_decoded

    def get_manager(self) -> OffloadingManager:
        return Manager(self._connect("scheduler", 0), save_decoded=self._save_decoded, say=self._say())

    def _say(self) -> Say | None:
        settings = self._settings
        if settings is None or not settings.router_endpoint:
            return None
        return Announcer(settings.router_endpoint, settings.admin_key).say

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        layout = Layout(kv_caches)
        return Worker(layout, self._connect("worker", layout.row_bytes))

    @property
    def _save_decoded(self) -> bool:
        return self._settings is not None and self._settings.save_decoded

    def _connect(self, kind: str, row_bytes: int) -> Client:
        settings = self._settings
        if settings is None:
            return Client("", 0.0)
        client = Client(settings.socket, settings.call_timeout)
        try:
            hello = self._hello(settings, kind, row_bytes)
        except Exception as error:
            report("identity", "cannot tell what this node computes (%r); it serves without the store", error)
            return client
        client.connect(hello)
        return client

    def _hello(self, settings: Settings, kind: str, row_bytes: int) -> protocol.Hello:
        parallel = self._vllm_config.parallel_config
        return protocol.Hello(
            version=protocol.VERSION,
            token=settings.token,
            node=settings.node,
            incarnation=settings.incarnation,
            kind=kind,
            rank=parallel.rank if kind == "worker" else 0,
            world=parallel.world_size,
            replicated=self.replicated_layout,
            namespace=namespace.identity(settings, self._vllm_config, self._kv_cache_config),
            row_bytes=row_bytes,
            pid=os.getpid(),
        )


def _replicated(config: Any) -> bool:
    """Whether all ranks have the same pages; older versions do not say, and each rank keeps its own then."""
    return bool(getattr(config, "replicated_layout", False)) and not getattr(config, "canonical_layout", False)
