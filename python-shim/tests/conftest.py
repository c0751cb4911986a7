import ctypes
import runpy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pegaflow_vllm import copy, guard
from pegaflow_vllm.client import Client
from pegaflow_vllm.protocol import VERSION, Hello
from toy_engine import ToyEngine


def hello(kind: str = "scheduler", **changes) -> Hello:
    fields = {
        "version": VERSION,
        "token": "t",
        "node": "p0",
        "incarnation": 1,
        "kind": kind,
        "rank": 0,
        "world": 1,
        "replicated": False,
        "namespace": {"model": "tiny"},
        "row_bytes": 64 if kind == "worker" else 0,
        "pid": 1,
    }
    return Hello(**{**fields, **changes})


@pytest.fixture(scope="session")
def native_copy() -> ctypes.CDLL:
    """The library that pegaflow puts beside the shim, built from the same file."""
    native = Path(__file__).parent.parent / "native"
    library = copy.load_library(Path(runpy.run_path(str(native / "build.py"))["build"]()))
    assert library is not None
    return library


@pytest.fixture(autouse=True)
def _every_report_is_logged():
    guard._last.clear()


@pytest.fixture
def socket_path() -> Iterator[str]:
    # Short: a Unix socket's path is limited to about 100 bytes.
    folder = tempfile.mkdtemp(prefix="pf")
    yield f"{folder}/s"
    shutil.rmtree(folder)


@pytest.fixture
def engine(socket_path: str) -> Iterator[ToyEngine]:
    engine = ToyEngine(socket_path)
    yield engine
    engine.close()


@pytest.fixture
def client(engine: ToyEngine) -> Iterator[Client]:
    client = Client(engine.path, call_timeout=10.0)
    yield client
    client.close()


@pytest.fixture(scope="session")
def configs(tmp_path_factory):
    # Not at the top: vLLM takes long to import.
    from node import config

    return {batch: config(tmp_path_factory.mktemp("model"), batch=batch) for batch in (512, 32)}


@pytest.fixture
def make(engine, configs, monkeypatch):
    """Makes nodes of the toy engine."""
    from node import Node

    made = []

    def build(name: str, batch: int = 512, timeout_ms: int = 10_000, ranks: int = 1, **env: str) -> "Node":
        settings = {"SOCKET": engine.path, "TOKEN": "t", "TIMEOUT_MS": str(timeout_ms)} | env
        for key, value in settings.items():
            monkeypatch.setenv(f"PEGAFLOW_KV_{key}", value)
        monkeypatch.setenv("PEGAFLOW_NODE", name)
        monkeypatch.setenv("PEGAFLOW_INCARNATION", "1")
        made.append(Node(configs[batch], ranks))
        return made[-1]

    yield build
    for node in made:
        node.close()


@pytest.fixture
def expected(make):
    """The answer of a node that uses no store."""
    alone = make("alone", SOCKET="")

    def ask(ids: list[int], tokens: int = 4) -> list[int]:
        return alone.ask(f"{len(alone.answers)}", ids, tokens)

    return ask
