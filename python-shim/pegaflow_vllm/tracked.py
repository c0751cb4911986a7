"""What the manager knows of a request that takes part in a hand-off."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pegaflow_vllm import protocol
from pegaflow_vllm.guard import report


class Leg(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Handoff:
    id: str
    leg: Leg

    @classmethod
    def of(cls, kv_transfer_params: Any) -> "Handoff | None":
        """The hand-off that a request's kv_transfer_params mark it for; None for all other requests."""
        mark = kv_transfer_params.get("pegaflow") if isinstance(kv_transfer_params, dict) else None
        if not isinstance(mark, dict):
            return None
        handoff, leg = mark.get("handoff"), mark.get("leg")
        if not isinstance(handoff, str) or not handoff or leg not in ("prefill", "decode"):
            report("mark", "ignoring malformed kv_transfer_params.pegaflow %r", mark)
            return None
        return cls(handoff, Leg(leg))


@dataclass
class Reply:
    """The engine's answer for all keys of a prompt; its hits are leased to the request."""

    positions: dict[bytes, int]
    """Where a key's state and ref are."""
    states: bytes
    """A byte per key."""
    refs: bytes
    """REF_BYTES per key."""
    at: float
    waits: bool = True
    """What is Pending is worth waiting for."""

    def state(self, key: bytes) -> int:
        position = self.positions.get(key)
        state = protocol.MISS if position is None else self.states[position]
        return protocol.MISS if state == protocol.PENDING and not self.waits else state

    def ref(self, key: bytes) -> bytes:
        """Of a hit; LOST_REF for any other key."""
        position = self.positions.get(key)
        if position is None or self.states[position] != protocol.HIT:
            return protocol.LOST_REF
        start = position * protocol.REF_BYTES
        return self.refs[start : start + protocol.REF_BYTES]


@dataclass
class Tracked:
    """A request that takes part in a hand-off."""

    id: str
    handoff: Handoff
    prompt_tokens: int
    reply: Reply | None = None
    asked: bool = False
    """`reply` belongs to the current attempt."""
    pending_until: float | None = None
    loading: bool = False
    load_failed: bool = False
    recomputed: bool = False
    """Parts of the prompt were not in the store when it was asked."""
    storing: bool = field(init=False)
    """More chunks may be offered to the hand-off; ends with the seal, a refusal or an abort."""
    saving: bool = False
    """Chunks without a hand-off may be offered; ends with a refusal."""
    finished: bool = False

    def __post_init__(self) -> None:
        self.storing = self.handoff.leg is Leg.PREFILL
