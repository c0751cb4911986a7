import os
import socket
import threading
import time

import pytest

from conftest import hello
from pegaflow_vllm import client as client_module
from pegaflow_vllm import protocol
from pegaflow_vllm.client import Client
from pegaflow_vllm.protocol import Found, Lookup, Release, Seal, Welcome

KEYS = [b"key-0001", b"key-0002"]


def found(seq: int, states: bytes = b"\1\0") -> bytes:
    return protocol.frame(Found(seq=seq, states=states, refs=bytes(8 * len(states))))


class Script:
    """A server whose every move a test makes: accepts one client and reads its frames."""

    def __init__(self, path: str):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._inbox = bytearray()
        self.peer: socket.socket | None = None
        self._welcomed = threading.Thread(target=self._welcome)
        self._welcomed.start()

    def _welcome(self) -> None:
        self.peer, _ = self._listener.accept()
        self.peer.settimeout(20)
        self.read()
        welcome = Welcome(
            epoch=3, session=1, slots=8, stride=64, rank_offset=0, header_bytes=64, arena_bytes=576, checksum_offset=0
        )
        self.peer.sendall(protocol.frame(welcome))

    def read(self) -> protocol.Message:
        assert self.peer is not None
        while (body := protocol.take_body(self._inbox)) is None:
            data = self.peer.recv(65536)
            assert data, "client closed"
            self._inbox += data
        return protocol.decode_ask(body)

    def write(self, data: bytes) -> None:
        assert self.peer is not None
        self._welcomed.join()
        self.peer.sendall(data)

    def close(self) -> None:
        self._welcomed.join(20)
        self._listener.close()
        if self.peer is not None:
            self.peer.close()


@pytest.fixture
def script(socket_path):
    script = Script(socket_path)
    yield script
    script.close()


@pytest.fixture
def quick(script, socket_path):
    client = Client(socket_path, call_timeout=0.05)
    assert client.connect(hello())
    yield client
    client.close()


def test_a_worker_maps_the_arena_it_is_given(engine, client):
    before = len(os.listdir("/proc/self/fd"))
    assert client.connect(hello("worker"))
    arena = client.session.arena
    space = engine.spaces[0]
    arena[space.header_bytes] = 42
    assert space.arena[space.header_bytes] == 42
    # The socket, its server end, the memfd and the descriptor mmap keeps: no other stays open.
    assert client.session.welcome.arena_bytes == len(arena)
    assert len(os.listdir("/proc/self/fd")) - before <= 5


def test_a_scheduler_has_no_arena(engine, client):
    assert client.connect(hello())
    assert client.session.arena is None
    assert client.session.welcome.slots == 0


def test_nobody_listening_means_no_store_and_no_exception(socket_path):
    client = Client(socket_path, call_timeout=0.05)
    assert not client.connect(hello())
    assert not client.alive
    assert client.lookup("r", "h", KEYS) is None
    assert client.store("r", "h", KEYS) is None
    assert not client.send(Seal(handoff="h"))


def test_a_refusal_means_no_store(engine, client):
    assert not client.connect(hello(version=99))
    assert not client.alive


def test_a_worker_without_a_descriptor_has_no_store(script, socket_path):
    client = Client(socket_path, call_timeout=0.05)
    assert not client.connect(hello("worker"))
    assert not client.alive


def test_an_answer_that_comes_too_late_is_dropped(script, quick):
    assert quick.lookup("r", "h", KEYS) is None
    first = script.read()
    quick._call_timeout = 20.0
    script.write(found(first.seq, b"\1\1") + found(first.seq + 1, b"\0\1"))
    assert quick.lookup("r", "h", KEYS).states == b"\0\1"
    assert script.read().seq == first.seq + 1


def test_what_a_late_answer_granted_is_handed_out_once(script, quick):
    late = protocol.frame(protocol.Granted(seq=1, ok=True, new=bytes(4), refs=b"REFSREFS"))
    assert quick.store("r", "h", KEYS) is None
    assert quick.take_orphans() == b""
    script.write(late)
    give_up = time.monotonic() + 20
    while (orphans := quick.take_orphans()) == b"" and time.monotonic() < give_up:
        pass
    assert orphans == b"REFSREFS"
    assert quick.take_orphans() == b""
    assert quick.alive


def test_what_a_late_answer_granted_is_kept_by_the_call_that_reads_it(script, quick):
    assert quick.store("r", "h", KEYS) is None
    quick._call_timeout = 20.0
    script.write(protocol.frame(protocol.Granted(seq=1, ok=True, new=bytes(4), refs=b"REFSREFS")) + found(2))
    assert quick.lookup("r", "h", KEYS).states == b"\1\0"
    assert quick.take_orphans() == b"REFSREFS"


def test_an_answer_cut_by_the_deadline_does_not_break_the_stream(script, quick):
    whole = found(1)
    script.write(whole[:7])
    assert quick.lookup("r", "h", KEYS) is None
    quick._call_timeout = 20.0
    script.write(whole[7:] + found(2, b"\0\0"))
    assert quick.lookup("r", "h", KEYS).states == b"\0\0"


def test_after_timeouts_in_a_row_calls_cost_nothing_until_the_pause_is_over(script, quick):
    quick._cooling.pause = 3600.0
    for _ in range(client_module.TIMEOUTS_TO_COOL):
        assert quick.lookup("r", "h", KEYS) is None
    quick._call_timeout = 3600.0
    assert quick.lookup("r", "h", KEYS) is None  # would hang the test if it asked
    assert quick.send(Release(request="r"))
    asked = [script.read() for _ in range(client_module.TIMEOUTS_TO_COOL)]
    assert all(isinstance(message, Lookup) for message in asked)
    assert isinstance(script.read(), Release)

    quick._cooling.until = time.monotonic()
    quick._call_timeout = 20.0
    script.write(found(asked[-1].seq + 1))
    assert quick.lookup("r", "h", KEYS).states == b"\1\0"


@pytest.mark.parametrize(
    "answer",
    [
        found(99),
        found(1, b"\1"),
        protocol.frame(protocol.Granted(seq=1, ok=True, new=b"", refs=b"")),
        protocol.LENGTH.pack(2) + b"\xc1\xc1",
        protocol.LENGTH.pack(protocol.MAX_FRAME + 1),
    ],
    ids=["future seq", "wrong size", "wrong kind", "not msgpack", "oversized"],
)
def test_an_engine_that_makes_no_sense_is_left(script, quick, answer):
    quick._call_timeout = 20.0
    script.write(answer)
    assert quick.lookup("r", "h", KEYS) is None
    assert not quick.alive


def test_a_dead_engine_turns_the_store_off(engine, client):
    assert client.connect(hello())
    engine._connections[0].shutdown(socket.SHUT_RDWR)
    assert client.lookup("r", "h", KEYS) is None
    assert not client.alive


def test_an_engine_that_does_not_read_cannot_block_a_send(script, quick, monkeypatch):
    monkeypatch.setattr(client_module, "SEND_TIMEOUT", 0.05)
    message = protocol.Commit(refs=bytes(1 << 20), bytes=1, micros=1)
    started = time.monotonic()
    while quick.send(message):
        assert time.monotonic() - started < 20
    assert not quick.alive
