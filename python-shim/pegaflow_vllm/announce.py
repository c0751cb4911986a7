"""Tells a router that this node's KV is ready, where PEGAFLOW_ROUTER_ENDPOINT names one: `POST /kv_ready`.

    opened -> granted.. -> sealed -> every granted chunk stored -> "ready"
       |          |           |
       +----------+-----------+-- failed ----------------------> "failed"

For prefill nodes that pegaflow did not start; about its own the engine speaks to the router itself. A chunk that
another request is writing is not waited for here; decode finds it pending, and waits for that.

Nothing here may hold up the scheduler: words are queued for a thread, and dropped when it does not keep up. Who
waits for a word that does not come has a deadline.
"""

import json
import queue
import threading
import time
import urllib.request
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from pegaflow_vllm.guard import report

Say = Callable[[str, str | None], None]
"""The hand-off, and why it failed; None: it is ready."""

QUEUE = 1024
TIMEOUT = 1.0
TRIES = 2
STALE = 10.0
"""Seconds after which nobody waits for a word any more."""


@dataclass
class _Pending:
    handoff: str
    missing: set[bytes] = field(default_factory=set)
    """Granted, and not stored yet."""
    sealed: bool = False


class Announcements:
    """What is still to be announced. Does nothing without `say`."""

    def __init__(self, say: Say | None):
        self._say = say
        self._pending: dict[str, _Pending] = {}

    def opened(self, request_id: str, handoff: str) -> None:
        if self._say is not None:
            self._pending[request_id] = _Pending(handoff)

    def granted(self, request_id: str, keys: Collection[bytes]) -> None:
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.missing.update(keys)

    def sealed(self, request_id: str) -> None:
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.sealed = True
            self._settle(request_id, pending)

    def stored(self, request_id: str, keys: Collection[bytes]) -> None:
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.missing.difference_update(keys)
            self._settle(request_id, pending)

    def failed(self, request_id: str, why: str) -> None:
        pending = self._pending.pop(request_id, None)
        if pending is not None:
            self.refused(pending.handoff, why)

    def refused(self, handoff: str, why: str) -> None:
        """Of one that was not even opened."""
        if self._say is not None:
            self._say(handoff, why)

    def fail_all(self, why: str) -> None:
        for request_id in list(self._pending):
            self.failed(request_id, why)

    def _settle(self, request_id: str, pending: _Pending) -> None:
        if pending.sealed and not pending.missing:
            del self._pending[request_id]
            if self._say is not None:
                self._say(pending.handoff, None)


class Announcer:
    """The thread that speaks to the router."""

    def __init__(self, endpoint: str, key: str):
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError("PEGAFLOW_ROUTER_ENDPOINT must be a URL, like http://127.0.0.1:8080")
        self._url = f"{endpoint.rstrip('/')}/kv_ready"
        self._key = key
        self._queue: queue.Queue[tuple[float, str, str | None]] = queue.Queue(QUEUE)
        # Whatever proxy this machine has is not for this.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        threading.Thread(target=self._run, name="pegaflow-announcer", daemon=True).start()

    def say(self, handoff: str, failed: str | None) -> None:
        try:
            self._queue.put_nowait((time.monotonic(), handoff, failed))
        except queue.Full:
            report("announce-full", "the router at %s is too slow; KV that is ready is not announced", self._url)

    def _run(self) -> None:
        while True:
            at, handoff, failed = self._queue.get()
            if time.monotonic() - at < STALE:
                self._post({"handoff": handoff} if failed is None else {"handoff": handoff, "failed": failed})

    def _post(self, said: dict[str, str]) -> None:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        for left in reversed(range(TRIES)):
            request = urllib.request.Request(self._url, json.dumps(said).encode(), headers)
            try:
                with self._opener.open(request, timeout=TIMEOUT):
                    return
            except Exception as error:  # Whatever it is, the node goes on.
                if left == 0:
                    report("announce", "cannot announce at %s that KV is ready: %s", self._url, error)
