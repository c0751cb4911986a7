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
    owner: str = ""

    @property
    def ref(self) -> bytes:
        return np.array([(self.slot, self.generation)], dtype=REF_DTYPE).tobytes()


@dataclass
class Namespace:
    fields: dict[str, str]
    fd: int
    arena: mmap.mmap
    writers: int
    """Ranks with a row of their own."""
    row_bytes: int
    slots: int
    header_bytes: int
    free: list[int]
    checksum_offset: int
    chunks: dict[bytes, Chunk] = field(default_factory=dict)

    @property
    def stride(self) -> int:
        return self.row_bytes * self.writers

    @property
    def generations(self) -> np.ndarray:
        return np.frombuffer(self.arena, dtype=np.uint32, count=self.slots)

    def row(self, slot: int, rank: int = 0) -> np.ndarray:
        """A rank's part of a slot: what is written here is damage."""
        start = self.header_bytes + slot * self.stride + rank * self.row_bytes
        return np.frombuffer(self.arena, dtype=np.uint8, count=self.row_bytes, offset=start)


class ToyEngine:
    def __init__(self, path: str, slots: int = 64):
        self.path, self.slots = path, slots
        self.spaces: list[Namespace] = []
        self.heard: list[protocol.Message] = []
        """Everything the clients sent, hello included."""
        self.delay: float = 0.0
        """Seconds to sit on every answer."""
        self.lookup_states: dict[bytes, int] = {}
        """Overrides the state of keys."""
        self.refuse_store = False
        self.verify = False
        """Namespaces to come have room for checksums."""
        self.refuse_hello: str | None = None
        """A code to refuse every hello with."""
        self.epoch = EPOCH
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._connections: list[socket.socket] = []
        self._sessions: list[tuple[Hello, socket.socket]] = []
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

    def cut(self, *kinds: str) -> None:
        """Ends the sessions of these kinds, of all nodes, from the engine's side."""
        with self._lock:
            ended = [session for session in self._sessions if session[0].kind in kinds]
        for _, connection in ended:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._wait_until(lambda: not any(session in self._sessions for session in ended))

    def restart(self) -> None:
        """Comes back empty, in another epoch, as a new process would."""
        self.cut("scheduler", "worker")
        with self._lock:
            spaces, self.spaces = self.spaces, []
            self.epoch += 1
        for space in spaces:
            os.close(space.fd)

    def sessions(self, kind: str) -> int:
        with self._lock:
            return sum(hello.kind == kind for hello, _ in self._sessions)

    def _wait_until(self, condition, timeout: float = 20.0) -> None:
        with self._news:
            assert self._news.wait_for(condition, timeout)

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
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
        with contextlib.suppress(FileNotFoundError):
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
        try:
            self._converse(connection)
        finally:
            with self._news:
                self._end_session(connection)
                self._news.notify_all()

    def _end_session(self, connection: socket.socket) -> None:
        """Like the engine: what the session's node had not committed is gone, and so are its other sessions."""
        node = next((hello.node for hello, other in self._sessions if other is connection), None)
        for space in self.spaces:
            for key, chunk in list(space.chunks.items()):
                if chunk.missing and chunk.owner == node:
                    del space.chunks[key]
        for hello, sibling in self._sessions:
            if hello.node == node:
                with contextlib.suppress(OSError):
                    sibling.shutdown(socket.SHUT_RDWR)
        self._sessions = [session for session in self._sessions if session[0].node != node]

    def _converse(self, connection: socket.socket) -> None:
        inbox = bytearray()
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
                    answered = isinstance(message, Hello | protocol.Lookup | protocol.Store)
                    if answered:
                        self._note(message)
                    if isinstance(message, Hello):
                        hello = message
                        self._welcome(connection, message)
                    else:
                        self._handle(connection, self._space_of(hello), hello, message)
                    if not answered:
                        self._note(message)

    def _note(self, message: protocol.Message) -> None:
        """Who has an answer, or has seen the effect, finds the message in `heard`."""
        with self._news:
            self.heard.append(message)
            self._news.notify_all()

    def _space_of(self, hello: Hello | None) -> Namespace | None:
        with self._lock:
            return next((s for s in self.spaces if hello and s.fields == hello.namespace), None)

    def _welcome(self, connection: socket.socket, hello: Hello) -> None:
        code = "version" if hello.version != protocol.VERSION else self.refuse_hello
        if code is not None:
            self._send(connection, Refused(code=code, message="not you"))
            return
        with self._news:
            same = (hello.node, hello.kind, hello.rank)
            for other, earlier in list(self._sessions):
                if (other.node, other.kind, other.rank) == same:
                    self._end_session(earlier)
            self._sessions.append((hello, connection))
            self._news.notify_all()
        space = self._space_of(hello)
        if space is None and hello.kind == "worker":
            sums = 4 * self.slots if self.verify else 0
            writers = 1 if hello.replicated else hello.world
            header = -(-(4 * self.slots + sums * writers) // 4096) * 4096
            size = header + self.slots * hello.row_bytes * writers
            fd = os.memfd_create("toy-arena", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            space = Namespace(
                hello.namespace, fd, mmap.mmap(fd, size), writers, hello.row_bytes, self.slots, header,
                list(range(self.slots)), sums,
            )  # fmt: skip
            with self._lock:
                self.spaces.append(space)
        if space is None:
            welcome = Welcome(
                epoch=0, session=1, slots=0, stride=0, rank_offset=0, header_bytes=0, arena_bytes=0, checksum_offset=0
            )
        else:
            row = 0 if hello.replicated else hello.rank
            welcome = Welcome(
                epoch=self.epoch,
                session=1,
                slots=space.slots,
                stride=space.stride,
                rank_offset=row * space.row_bytes,
                header_bytes=space.header_bytes,
                arena_bytes=len(space.arena),
                checksum_offset=space.checksum_offset and space.checksum_offset + row * 4 * space.slots,
            )
        rights = []
        if hello.kind == "worker" and space is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [space.fd]))]
        if self.delay:
            time.sleep(self.delay)
        with contextlib.suppress(OSError):
            connection.sendmsg([protocol.frame(welcome)], rights)

    def _handle(
        self, connection: socket.socket, space: Namespace | None, hello: Hello | None, message: protocol.Message
    ) -> None:
        if isinstance(message, protocol.Lookup):
            self._send(connection, self._lookup(space, message))
        elif isinstance(message, protocol.Store):
            self._send(connection, self._store(space, hello.node if hello else "", message))
        elif isinstance(message, protocol.Commit) and space is not None:
            with self._lock:
                named = {chunk.ref: chunk for chunk in space.chunks.values()}
                for ref in protocol.split_refs(message.refs):
                    if ref in named:
                        named[ref].missing -= 1
        elif isinstance(message, protocol.Damaged) and space is not None:
            with self._lock:
                damaged = protocol.split_refs(message.refs)
                space.chunks = {key: chunk for key, chunk in space.chunks.items() if chunk.ref not in damaged}

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

    def _store(self, space: Namespace | None, owner: str, message: protocol.Store) -> Granted:
        new, refs = [], b""
        if space is None or self.refuse_store:
            return Granted(seq=message.seq, ok=False, new=b"", refs=b"")
        with self._lock:
            for index, key in enumerate(split_keys(message.keys, message.key_len)):
                if key in space.chunks:
                    continue
                slot = space.free.pop(0)
                space.generations[slot] += 1
                space.chunks[key] = Chunk(slot, int(space.generations[slot]), space.writers, owner)
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
