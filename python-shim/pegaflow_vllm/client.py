"""This process's sessions with PegaEngine, one after another: one thread, every wait bounded, never raising.

                +------- after a pause, or when a worker is told to -------+
                v                                                         |
    new --> greeting --welcome--> live --N timeouts in a row--> cooling   |
                |  |               |  ^------ after a pause -------+      |
                |  |               |                               |      |
                |  +-- closed, nonsense, GREETING_LIMIT --> lost <--------+-- socket error, bad frame, a send
                |                                                             that blocks, drop()
                +-- refused: version, token, namespace, row size --> off (for this process)

`greeting`: hello is sent and nobody waits for the answer any longer than the caller said; a later look finds it.
So an engine that is stopped costs one short wait, and is back as soon as it goes on. `cooling`: calls answer
nothing at once, one-way messages still go out. `lost` closes the socket, so the engine sees the session end and
takes back what it held; pauses between attempts double from FIRST_PAUSE to LONGEST_PAUSE.

`life` numbers the sessions of this process. What one life was granted means nothing in the next: the scheduler
forgets its replies and leases, and the workers refuse refs of another life (see worker.py, `follow`). Only the
scheduler's client paces itself; a worker reopens when, and only when, the scheduler has begun another life.

The answer of a call that gave up is dropped when it comes, but what it granted is not: those chunks would stay
pending, and everybody who needs them would wait. `take_orphans` hands them out to be discarded.
"""

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from pegaflow_vllm import protocol
from pegaflow_vllm.channel import CallTimeout, Channel
from pegaflow_vllm.guard import logger, report
from pegaflow_vllm.protocol import Found, Granted, Hello, Message, ProtocolError, Refused, Welcome

HELLO_TIMEOUT = 5.0
GREETING_LIMIT = 60.0
SEND_TIMEOUT = 0.25
TIMEOUTS_TO_COOL = 3
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
# Of all refusals only this one may pass by itself: the engine could not make its arena.
PASSING_REFUSALS = ("capacity",)


class State(Enum):
    NEW = "new"
    GREETING = "greeting"
    LIVE = "live"
    LOST = "lost"
    OFF = "off"


@dataclass(frozen=True)
class Session:
    """What the engine granted; `arena` is mapped for a worker only."""

    welcome: Welcome
    arena: mmap.mmap | None


class Backoff:
    """Pauses that double until `reset`."""

    def __init__(self) -> None:
        self.pause = FIRST_PAUSE
        self.until = 0.0

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def begin(self) -> None:
        self.until = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def reset(self) -> None:
        self.pause = FIRST_PAUSE


class Client:
    def __init__(self, path: str, call_timeout: float):
        self._path = path
        self._call_timeout = call_timeout
        self._hello: Hello | None = None
        self._channel: Channel | None = None
        self._state = State.NEW
        self._since = 0.0
        """When the greeting or the session began."""
        self._retry = Backoff()
        self._cooling = Backoff()
        self._seq = 0
        self._timeouts = 0
        self._late: set[int] = set()
        """Calls that gave up and may still be answered."""
        self._orphans = b""
        self.session: Session | None = None
        """The current or the last one."""
        self.life = 0

    @property
    def alive(self) -> bool:
        return self._state is State.LIVE

    @property
    def off(self) -> bool:
        """There will be no session any more."""
        return self._state is State.OFF or self._hello is None

    # -- sessions

    def connect(self, hello: Hello) -> bool:
        """Opens the first session; False (and logged) when the node has to do without the store for now."""
        self._hello = hello
        return self._open(HELLO_TIMEOUT)

    def check(self) -> bool:
        """Notices, without waiting, that the engine has ended the session; True while it lives."""
        if self._state is State.LIVE and self._channel is not None and self._channel.ended():
            self._lose("session ended by the engine", None)
        return self.alive

    def retry(self) -> bool:
        """The scheduler's way back: tries when the pause is over, and waits for at most the call timeout."""
        if self.check() or self.off:
            return self.alive
        if self._state is State.GREETING:
            return self._await_welcome(0.0)
        return self._retry.over and self._open(self._call_timeout)

    def reopen(self) -> bool:
        """A worker's way into the scheduler's next life: leaves the session it has and asks for another at once."""
        if self.off:
            return False
        # A hello that is under way still holds: nothing was copied since it was sent.
        if self._state is State.GREETING and (not self._await_welcome(self._call_timeout) or self.check()):
            return self.alive
        self._close()
        return self._open(self._call_timeout)

    def drop(self, why: str, *, for_good: bool = False) -> None:
        """Ends the session from this side."""
        if for_good:
            self._turn_off(why)
        elif self._state in (State.LIVE, State.GREETING):
            self._lose(why, None)

    def close(self) -> None:
        self._close()
        self._state = State.OFF

    # -- calls

    def lookup(self, request: str, handoff: str | None, keys: list[bytes]) -> Found | None:
        """One state and one ref per key, or None when there is no usable answer."""

        def build(seq: int) -> Message:
            joined, size = protocol.join_keys(keys)
            return protocol.Lookup(seq=seq, request=request, handoff=handoff, keys=joined, key_len=size)

        answer = self._call(build, Found)
        if answer is None:
            return None
        if len(answer.states) != len(keys) or len(answer.refs) != protocol.REF_BYTES * len(keys):
            self._lose("lookup answer of the wrong size", None)
            return None
        return answer

    def store(self, request: str, handoff: str | None, keys: list[bytes]) -> Granted | None:
        def build(seq: int) -> Message:
            joined, size = protocol.join_keys(keys)
            return protocol.Store(seq=seq, request=request, handoff=handoff, keys=joined, key_len=size)

        answer = self._call(build, Granted)
        if answer is None:
            return None
        if len(answer.new) % 4 or len(answer.refs) != 2 * len(answer.new):
            self._lose("store answer of the wrong size", None)
            return None
        return answer

    def send(self, message: Message) -> bool:
        """Sends a one-way message. A peer that does not read for SEND_TIMEOUT ends the session."""
        if self._state is not State.LIVE or self._channel is None:
            return False
        try:
            self._channel.send(message, SEND_TIMEOUT)
        except (OSError, ProtocolError) as error:
            self._lose("cannot send", error)
            return False
        return True

    def take_orphans(self) -> bytes:
        """Refs granted to calls that had given up; reads what has come in without waiting."""
        if self._late and self.alive and self._channel is not None:
            try:
                while self._late:
                    answer = self._channel.receive(time.monotonic())
                    if not self._drop_late(answer):
                        raise ProtocolError(f"unexpected {type(answer).__name__.lower()}")
            except CallTimeout:
                pass
            except (OSError, ProtocolError) as error:
                self._lose("session lost", error)
        orphans, self._orphans = self._orphans, b""
        return orphans

    # -- inside

    def _open(self, wait: float) -> bool:
        assert self._hello is not None
        self._since = time.monotonic()
        deadline = self._since + wait
        try:
            self._channel = Channel(self._path, wait)
            self._channel.send(self._hello, max(0.0, deadline - time.monotonic()))
        except (OSError, ProtocolError) as error:
            self._lose(f"no session at {self._path}", error)
            return False
        self._state = State.GREETING
        return self._await_welcome(deadline - time.monotonic())

    def _await_welcome(self, wait: float) -> bool:
        assert self._channel is not None
        assert self._hello is not None
        try:
            answer = self._channel.receive(time.monotonic() + wait)
            if isinstance(answer, Refused):
                self._refused(answer)
                return False
            if not isinstance(answer, Welcome):
                raise ProtocolError(f"expected welcome, got {type(answer).__name__.lower()}")
            arena = self._channel.map_arena(answer) if self._hello.kind == "worker" else None
        except CallTimeout:
            if time.monotonic() - self._since >= GREETING_LIMIT:
                self._lose(f"no welcome within {GREETING_LIMIT:.0f} s", None)
            return False
        except (OSError, ProtocolError, ValueError) as error:
            self._lose(f"no session at {self._path}", error)
            return False
        self._channel.close_fds()
        self._begin_life(Session(answer, arena))
        return True

    def _begin_life(self, session: Session) -> None:
        self.session = session
        self.life += 1
        self._state = State.LIVE
        self._since = time.monotonic()
        self._timeouts = 0
        self._cooling = Backoff()
        welcome = session.welcome
        kind = self._hello.kind if self._hello is not None else ""
        logger.info("pegaflow: %s session %d open, %d slots", kind, welcome.session, welcome.slots)

    def _refused(self, answer: Refused) -> None:
        what = f"refused ({answer.code}): {answer.message}"
        if answer.code in PASSING_REFUSALS:
            self._lose(what, None)
        else:
            self._turn_off(what)

    def _call(self, build: Callable[[int], Message], kind: type):
        if self._state is not State.LIVE or self._channel is None or not self._cooling.over:
            return None
        deadline = time.monotonic() + self._call_timeout
        self._seq += 1
        try:
            self._channel.send(build(self._seq), self._call_timeout)
        except (OSError, ProtocolError) as error:
            self._lose("cannot send", error)
            return None
        try:
            while True:
                answer = self._channel.receive(deadline)
                if self._drop_late(answer):
                    continue
                if not isinstance(answer, kind) or answer.seq != self._seq:
                    raise ProtocolError(f"unexpected {type(answer).__name__.lower()}")
                break
        except CallTimeout:
            self._late.add(self._seq)
            self._note_timeout()
            return None
        except (OSError, ProtocolError) as error:
            self._lose("session lost", error)
            return None
        self._timeouts = 0
        self._cooling.reset()
        return answer

    def _drop_late(self, answer: protocol.Answer) -> bool:
        seq = getattr(answer, "seq", None)
        if seq not in self._late:
            return False
        self._late.remove(seq)
        if isinstance(answer, Granted):
            self._orphans += answer.refs
        return True

    def _note_timeout(self) -> None:
        self._timeouts += 1
        report("timeout", "no answer within %d ms; continuing without the store", self._call_timeout * 1000)
        if self._timeouts >= TIMEOUTS_TO_COOL:
            self._cooling.begin()
            # One more timeout after the pause is enough to pause again.
            self._timeouts = TIMEOUTS_TO_COOL - 1

    def _lose(self, what: str, error: Exception | None) -> None:
        if self._state is State.LIVE and time.monotonic() - self._since >= LONGEST_PAUSE:
            self._retry.reset()
        self._close()
        self._state = State.LOST
        self._retry.begin()
        reason = "" if error is None else f" ({type(error).__name__}: {error})"
        report(f"lost {what}", "%s%s; going on without the store until it is back", what, reason)

    def _turn_off(self, what: str) -> None:
        self._close()
        self._state = State.OFF
        logger.warning("pegaflow: %s; this process goes on without the store", what)

    def _close(self) -> None:
        """The engine takes back whatever this session was granted, so late grants are forgotten too."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        self._late.clear()
        self._orphans = b""
