"""Keeps failures of the store out of vLLM: an exception in EngineCore or a worker would kill the node."""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

# Below "vllm", so that vLLM's own handlers and level apply.
logger = logging.getLogger("vllm.pegaflow")

QUIET_SECONDS = 30.0
_last: dict[str, float] = {}


def report(kind: str, message: str, *args: object, exc_info: bool = False) -> None:
    """Logs a warning, at most once per kind in QUIET_SECONDS."""
    now = time.monotonic()
    if now - _last.get(kind, float("-inf")) < QUIET_SECONDS:
        return
    _last[kind] = now
    logger.warning("pegaflow: " + message, *args, exc_info=exc_info)


def guarded(fallback: Callable[[], Any] = lambda: None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A hook that never raises: on any exception it reports and returns `fallback()`."""

    def wrap(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception:
                report(hook.__qualname__, "%s failed; the store is skipped here", hook.__qualname__, exc_info=True)
                return fallback()

        return call

    return wrap
