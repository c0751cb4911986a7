"""A throw-away engine that speaks docs/protocol.md: enough to run the shim, and to misbehave on demand.

One thread per session. `python toy_engine.py SOCKET SLOTS` serves real nodes.
"""

import array
import contextlib
import mmap
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from pegaflow_vllm import protocol
from pegaflow_vllm.protocol import REF_DTYPE, Found, Granted, Hello, Refused, Welcome

EPOCH = 7


@dataclass
class Chunk:
    slot: int
    generation: int
    missing: int
    """Ranks that have not committed it."""

    @property
    def ref(self) -> bytes:
        return np.array([(self.slot, self.generation)], dtype=REF_DTYPE).tobytes()


@dataclass
class Namespace:
    fields: dict[str, str]
    fd: int
    arena: mmap.mmap
    world: int
    row_bytes: int
    slots: int
    header_bytes: int
    free: list[int]
    chunks: dict[bytes, Chunk] = field(default_factory=dict)

    @property
    def stride(self) -> int:
        return self.row_bytes * self.world

    @property
    def generations(self) -> np.ndarray:
        return np.frombuffer(self.arena, dtype=np.uint32, count=self.slots)


class ToyEngine:
    def __init__(self, path: str, slots: int = 64):
        self.path, self.slots = path, slots
        self.spaces: list[Namespace] = []
        self.heard: list[protocol.Message] = []
        """Everything the clients sent, hello included, in the order it was handled."""
        self.delay: float = 0.0
        """Seconds to sit on every answer."""
        self.lookup_states: dict[bytes, int] = {}
        """Overrides the state of keys."""
        self.refuse_store = False
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    # -- for tests

    def of(self, kind: type) -> list:
        with self._lock:
            return [message for message in self.heard if isinstance(message, kind)]

    def wait_for(self, kind: type, count: int = 1, timeout: float = 20.0) -> list:
        with self._news:
            self._news.wait_for(lambda: sum(isinstance(m, kind) for m in self.heard) >= count, timeout)
            found = [message for message in self.heard if isinstance(message, kind)]
        assert len(found) >= count, f"only {found} of {count} {kind.__name__}"
        return found

    def close(self) -> None:
        # shutdown() also wakes the threads that wait in accept or recv.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        for space in self.spaces:
            os.close(space.fd)
        os.unlink(self.path)

    # -- sessions

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        inbox = bytearray()
        space: Namespace | None = None
        hello: Hello | None = None
        with connection:
            while True:
                try:
                    data = connection.recv(1 << 20)
                except OSError:
                    return
                if not data:
                    return
                inbox += data
                while (body := protocol.take_body(inbox)) is not None:
                    message = protocol.decode_ask(body)
                    if isinstance(message, Hello):
                        hello = message
                        space = self._welcome(connection, message)
                    else:
                        self._handle(connection, space or self._space_of(hello), message)
                    with self._news:
                        self.heard.append(message)
                        self._news.notify_all()

    def _space_of(self, hello: Hello | None) -> Namespace | None:
        with self._lock:
            return next((s for s in self.spaces if hello and s.fields == hello.namespace), None)

    def _welcome(self, connection: socket.socket, hello: Hello) -> Namespace | None:
        if hello.version != protocol.VERSION:
            self._send(connection, Refused(code="version", message="other version"))
            return None
        space = self._space_of(hello)
        if space is None and hello.kind == "worker":
            header = -(-4 * self.slots // 4096) * 4096
            size = header + self.slots * hello.row_bytes * hello.world
            fd = os.memfd_create("toy-arena", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            space = Namespace(
                hello.namespace, fd, mmap.mmap(fd, size), hello.world, hello.row_bytes, self.slots, header,
                list(range(self.slots)),
            )  # fmt: skip
            with self._lock:
                self.spaces.append(space)
        if space is None:
            welcome = Welcome(epoch=0, session=1, slots=0, stride=0, rank_offset=0, header_bytes=0, arena_bytes=0)
        else:
            welcome = Welcome(
                epoch=EPOCH,
                session=1,
                slots=space.slots,
                stride=space.stride,
                rank_offset=hello.rank * space.row_bytes,
                header_bytes=space.header_bytes,
                arena_bytes=len(space.arena),
            )
        rights = []
        if hello.kind == "worker" and space is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [space.fd]))]
        connection.sendmsg([protocol.frame(welcome)], rights)
        return space

    def _handle(self, connection: socket.socket, space: Namespace | None, message: protocol.Message) -> None:
        if isinstance(message, protocol.Lookup):
            self._send(connection, self._lookup(space, message))
        elif isinstance(message, protocol.Store):
            self._send(connection, self._store(space, message))
        elif isinstance(message, protocol.Commit) and space is not None:
            with self._lock:
                named = {chunk.ref: chunk for chunk in space.chunks.values()}
                for ref in protocol.split_refs(message.refs):
                    if ref in named:
                        named[ref].missing -= 1

    def _lookup(self, space: Namespace | None, message: protocol.Lookup) -> Found:
        states, refs = bytearray(), bytearray()
        with self._lock:
            for key in split_keys(message.keys, message.key_len):
                chunk = space.chunks.get(key) if space is not None else None
                state = protocol.MISS if chunk is None else protocol.PENDING if chunk.missing else protocol.HIT
                state = self.lookup_states.get(key, state)
                states.append(state)
                refs += chunk.ref if chunk is not None and state == protocol.HIT else bytes(8)
        return Found(seq=message.seq, states=bytes(states), refs=bytes(refs))

    def _store(self, space: Namespace | None, message: protocol.Store) -> Granted:
        new, refs = [], b""
        if space is None or self.refuse_store:
            return Granted(seq=message.seq, ok=False, new=b"", refs=b"")
        with self._lock:
            for index, key in enumerate(split_keys(message.keys, message.key_len)):
                if key in space.chunks:
                    continue
                slot = space.free.pop(0)
                space.generations[slot] += 1
                space.chunks[key] = Chunk(slot, int(space.generations[slot]), space.world)
                new.append(index)
                refs += space.chunks[key].ref
        return Granted(seq=message.seq, ok=True, new=np.array(new, dtype="<u4").tobytes(), refs=refs)

    def _send(self, connection: socket.socket, message: protocol.Message) -> None:
        if self.delay:
            time.sleep(self.delay)
        with contextlib.suppress(OSError):
            connection.sendall(protocol.frame(message))


def split_keys(keys: bytes, size: int) -> list[bytes]:
    return [keys[at : at + size] for at in range(0, len(keys), size)] if size else []


if __name__ == "__main__":
    engine = ToyEngine(sys.argv[1], int(sys.argv[2]))
    print("serving", flush=True)
    threading.Event().wait()
