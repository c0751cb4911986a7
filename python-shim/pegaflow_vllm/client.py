"""A session with PegaEngine over its Unix socket: blocking, one thread, every wait bounded, never raising.

    connect --welcome--> live --N timeouts in a row--> cooling --after a pause--> live
       |                  |                               |
       +--refused, error--+------ socket error, bad frame, send that blocks ------> off (for this process)

While cooling, calls answer nothing at once and one-way messages still go out. `off` closes the socket, so the
engine sees the session end and takes back what it held.

The answer of a call that gave up is dropped when it comes, but what it granted is not: those chunks would stay
pending, and everybody who needs them would wait. `take_orphans` hands them out to be discarded.
"""

import array
import mmap
import os
import socket
import time
from dataclasses import dataclass

from pegaflow_vllm import protocol
from pegaflow_vllm.guard import logger, report
from pegaflow_vllm.protocol import Found, Granted, Hello, Message, ProtocolError, Refused, Welcome

HELLO_TIMEOUT = 5.0
SEND_TIMEOUT = 0.25
SEND_BUFFER = 4 * 1024 * 1024
TIMEOUTS_TO_COOL = 3
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
READ_SIZE = 256 * 1024
MAX_FDS = 4


class CallTimeout(Exception):
    """No answer before the deadline."""


@dataclass(frozen=True)
class Session:
    """What the engine granted; `arena` is mapped for a worker only."""

    welcome: Welcome
    arena: mmap.mmap | None


class Client:
    def __init__(self, path: str, call_timeout: float):
        self._path = path
        self._call_timeout = call_timeout
        self._socket: socket.socket | None = None
        self._inbox = bytearray()
        self._seq = 0
        self._timeouts = 0
        self._pause = FIRST_PAUSE
        self._cool_until = 0.0
        self._late: set[int] = set()
        """Calls that gave up and may still be answered."""
        self._orphans = b""
        self.session: Session | None = None

    @property
    def alive(self) -> bool:
        return self._socket is not None

    def connect(self, hello: Hello) -> bool:
        """Opens the session; False (and logged) when the node has to do without the store."""
        deadline = time.monotonic() + HELLO_TIMEOUT
        fds: list[int] = []
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket = sock
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            sock.settimeout(HELLO_TIMEOUT)
            sock.connect(self._path)
            sock.sendall(protocol.frame(hello))
            answer = self._receive(deadline, fds)
            if isinstance(answer, Refused):
                raise ProtocolError(f"refused ({answer.code}): {answer.message}")
            if not isinstance(answer, Welcome):
                raise ProtocolError(f"expected welcome, got {type(answer).__name__.lower()}")
            arena = _map_arena(fds, answer) if hello.kind == "worker" else None
            self.session = Session(answer, arena)
        except (OSError, CallTimeout, ProtocolError, ValueError) as error:
            self._turn_off(f"no session at {self._path}", error)
            return False
        finally:
            for fd in fds:
                os.close(fd)
        logger.info("pegaflow: %s session %d open, %d slots", hello.kind, answer.session, answer.slots)
        return True

    def lookup(self, request: str, handoff: str | None, keys: list[bytes]) -> Found | None:
        """One state and one ref per key, or None when there is no usable answer."""

        def build(seq: int) -> Message:
            joined, size = protocol.join_keys(keys)
            return protocol.Lookup(seq=seq, request=request, handoff=handoff, keys=joined, key_len=size)

        answer = self._call(build, Found)
        if answer is None:
            return None
        if len(answer.states) != len(keys) or len(answer.refs) != protocol.REF_BYTES * len(keys):
            self._turn_off("lookup answer of the wrong size", None)
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
            self._turn_off("store answer of the wrong size", None)
            return None
        return answer

    def send(self, message: Message) -> bool:
        """Sends a one-way message. A peer that does not read for SEND_TIMEOUT ends the session."""
        if self._socket is None:
            return False
        try:
            self._socket.settimeout(SEND_TIMEOUT)
            self._socket.sendall(protocol.frame(message))
        except (OSError, ProtocolError) as error:
            self._turn_off("cannot send", error)
            return False
        return True

    def take_orphans(self) -> bytes:
        """Refs granted to calls that had given up; reads what has come in without waiting."""
        if self._late and self._socket is not None:
            try:
                while self._late:
                    answer = self._receive(time.monotonic())
                    if not self._drop_late(answer):
                        raise ProtocolError(f"unexpected {type(answer).__name__.lower()}")
            except CallTimeout:
                pass
            except (OSError, ProtocolError) as error:
                self._turn_off("session lost", error)
        orphans, self._orphans = self._orphans, b""
        return orphans

    def close(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def _call(self, build, kind: type):
        now = time.monotonic()
        if self._socket is None or now < self._cool_until:
            return None
        deadline = now + self._call_timeout
        self._seq += 1
        try:
            self._socket.settimeout(self._call_timeout)
            self._socket.sendall(protocol.frame(build(self._seq)))
        except (OSError, ProtocolError) as error:
            self._turn_off("cannot send", error)
            return None
        try:
            while True:
                answer = self._receive(deadline)
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
            self._turn_off("session lost", error)
            return None
        self._timeouts = 0
        self._pause = FIRST_PAUSE
        return answer

    def _drop_late(self, answer: protocol.Answer) -> bool:
        seq = getattr(answer, "seq", None)
        if seq not in self._late:
            return False
        self._late.remove(seq)
        if isinstance(answer, Granted):
            self._orphans += answer.refs
        return True

    def _receive(self, deadline: float, fds: list[int] | None = None) -> protocol.Answer:
        sock = self._socket
        assert sock is not None
        while True:
            body = protocol.take_body(self._inbox)
            if body is not None:
                return protocol.decode_answer(body)
            # 0 looks once without waiting.
            sock.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                data = sock.recv(READ_SIZE) if fds is None else _receive_with_fds(sock, fds)
            except (TimeoutError, BlockingIOError):
                raise CallTimeout from None
            if not data:
                raise ConnectionResetError("closed by the engine")
            self._inbox += data

    def _note_timeout(self) -> None:
        self._timeouts += 1
        report("timeout", "no answer within %d ms; continuing without the store", self._call_timeout * 1000)
        if self._timeouts >= TIMEOUTS_TO_COOL:
            self._cool_until = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            # One more timeout after the pause is enough to pause again.
            self._timeouts = TIMEOUTS_TO_COOL - 1

    def _turn_off(self, what: str, error: Exception | None) -> None:
        self.close()
        reason = "" if error is None else f" ({type(error).__name__}: {error})"
        logger.warning("pegaflow: %s%s; this process goes on without the store", what, reason)


def _receive_with_fds(sock: socket.socket, fds: list[int]) -> bytes:
    room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(READ_SIZE, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
            fds.extend(received)
    return data


def _map_arena(fds: list[int], welcome: Welcome) -> mmap.mmap:
    if not fds:
        raise ProtocolError("welcome without the arena's file descriptor")
    if os.fstat(fds[0]).st_size < welcome.arena_bytes:
        raise ProtocolError(f"arena is smaller than the announced {welcome.arena_bytes} bytes")
    return mmap.mmap(fds[0], welcome.arena_bytes)
