"""What the scheduler and the workers tell each other inside the messages that vLLM sends between them each step."""

from dataclasses import dataclass, fields
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata

_STEP = "pegaflow_step"


@dataclass(frozen=True)
class Step:
    """From the scheduler."""

    life: int
    """Of its session; 0 when it has none. Workers follow it."""
    orphans: bytes = b""
    """Refs that were granted too late to be written: only workers may discard."""


def attach(connector_meta: Any, step: Step) -> None:
    setattr(connector_meta, _STEP, step)


def attached(connector_meta: Any) -> Step:
    return getattr(connector_meta, _STEP, None) or Step(0)


@dataclass(frozen=True)
class Stray:
    """From a worker that has no session in the scheduler's life."""

    life: int
    for_good: bool
    """It will have none in a later life either."""


class WorkerMeta(OffloadingWorkerMetadata):
    """Stock metadata that may also carry a Stray, of any of the ranks."""

    stray: Stray | None = None

    @classmethod
    def of(cls, stock: OffloadingWorkerMetadata, stray: Stray | None) -> "WorkerMeta":
        # They differ between versions of vLLM.
        meta = cls(**{field.name: getattr(stock, field.name) for field in fields(stock)})
        meta.stray = stray
        return meta

    def aggregate(self, other: Any) -> "WorkerMeta":
        strays = [meta.stray for meta in (self, other) if getattr(meta, "stray", None) is not None]
        strays.sort(key=lambda stray: (stray.for_good, stray.life))
        return WorkerMeta.of(super().aggregate(other), strays[-1] if strays else None)
