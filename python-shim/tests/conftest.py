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
