"""What the launcher tells a node through its environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_TIMEOUT_MS = 250


@dataclass(frozen=True)
class Settings:
    socket: str
    token: str
    node: str
    incarnation: int
    weights_id: str
    call_timeout: float
    """Seconds that one scheduler call may take."""
    save_decoded: bool = False
    """Decode nodes save the tokens they generate, for the next turn of the conversation."""

    router_endpoint: str = ""
    """Whom to tell that KV is ready; empty where the engine does that."""
    admin_key: str = field(default="", repr=False)
    """What that router wants to be shown."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings | None":
        """None when no store is configured: the node then serves without one."""
        socket = env.get("PEGAFLOW_KV_SOCKET", "")
        if not socket:
            return None
        return cls(
            socket=socket,
            token=env.get("PEGAFLOW_KV_TOKEN", ""),
            node=env.get("PEGAFLOW_NODE", ""),
            incarnation=_integer(env, "PEGAFLOW_INCARNATION", 0),
            weights_id=env.get("PEGAFLOW_WEIGHTS_ID", ""),
            call_timeout=max(1, _integer(env, "PEGAFLOW_KV_TIMEOUT_MS", DEFAULT_TIMEOUT_MS)) / 1000,
            save_decoded=env.get("PEGAFLOW_KV_SAVE_DECODED", "") == "1",
            router_endpoint=env.get("PEGAFLOW_ROUTER_ENDPOINT", ""),
            admin_key=env.get("PEGAFLOW_ADMIN_KEY", ""),
        )


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    raw = env.get(name, "")
    try:
        return int(raw) if raw else default
    except ValueError:
        raise ValueError(f"{name} is {raw!r}; set it to a whole number") from None
