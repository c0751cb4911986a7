"""Frames of docs/protocol.md over one Unix stream socket. Every wait is bounded by the caller."""

import array
import mmap
import os
import socket
import time

from pegaflow_vllm import protocol
from pegaflow_vllm.protocol import Answer, Message, ProtocolError, Welcome

SEND_BUFFER = 4 * 1024 * 1024
READ_SIZE = 256 * 1024
MAX_FDS = 4


class CallTimeout(Exception):
    """No answer before the deadline."""


class Channel:
    """Owns its socket and whatever descriptors came over it, until `close`."""

    def __init__(self, path: str, timeout: float):
        self._inbox = bytearray()
        self._fds: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            # Waits only while the engine's backlog of connections is full.
            self._socket.settimeout(timeout)
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def send(self, message: Message, timeout: float) -> None:
        self._socket.settimeout(timeout)
        self._socket.sendall(protocol.frame(message))

    def receive(self, deadline: float) -> Answer:
        """The next answer; a deadline in the past looks once without waiting."""
        while True:
            body = protocol.take_body(self._inbox)
            if body is not None:
                return protocol.decode_answer(body)
            self._socket.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                data = self._read()
            except (TimeoutError, BlockingIOError):
                raise CallTimeout from None
            if not data:
                raise ConnectionResetError("closed by the engine")
            self._inbox += data

    def ended(self) -> bool:
        """The engine has closed its end. Never waits."""
        self._socket.settimeout(0.0)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True

    def map_arena(self, welcome: Welcome) -> mmap.mmap:
        """Maps the file that came with `welcome`."""
        if not self._fds:
            raise ProtocolError("welcome without the arena's file descriptor")
        if os.fstat(self._fds[0]).st_size < welcome.arena_bytes:
            raise ProtocolError(f"arena is smaller than the announced {welcome.arena_bytes} bytes")
        return mmap.mmap(self._fds[0], welcome.arena_bytes)

    def close_fds(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def close(self) -> None:
        self.close_fds()
        self._socket.close()

    def _read(self) -> bytes:
        room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
        data, ancillary, _, _ = self._socket.recvmsg(READ_SIZE, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                self._fds.extend(received)
        return data
