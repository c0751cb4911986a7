"""Fixtures of the end-to-end tests: one fleet and one reference node for all of test_e2e.py."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import machine
from pegaflow import BINARY, ROOT, Fleet, Reference
from prompts import ask, prompt

CPU_CONFIG = ROOT / "configs/1p1d-cpu.toml"


def pytest_configure() -> None:
    assert BINARY.exists(), f"{BINARY} is missing: cargo build --release, or set PEGAFLOW_BIN"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A failed test shows what pegaflow said last."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Fleet) and value.process is not None:
                report.sections.append(("pegaflow's last lines", value.tail(100)))
    return report


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory):
    yield from serving(Fleet(CPU_CONFIG, "http://127.0.0.1:8000", tmp_path_factory.mktemp("fleet")))


def serving(fleet: Fleet) -> Iterator[Fleet]:
    """The body of a fixture: ready at first, and nothing left at the end."""
    try:
        print(f"\nready after {fleet.up():.1f} s")
        yield fleet
    finally:
        fleet.close()


def topology(folder: Path, name: str, changes: dict[str, str]) -> tuple[Path, str]:
    """The shipped CPU topology under this name, at a port of its own, with texts replaced; and its URL."""
    port = machine.free_port()
    text = CPU_CONFIG.read_text()
    for old, new in {'listen = "127.0.0.1:8000"': f'listen = "127.0.0.1:{port}"', **changes}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / f"{name}.toml"
    file.write_text(f'name = "{name}"\n{text}')
    return file, f"http://127.0.0.1:{port}"


UNI = ', "--distributed-executor-backend", "uni"'
IN_ENGINE = 'env = { VLLM_ENABLE_V1_MULTIPROCESSING = "0" }\n'


def own_workers(text: str) -> str:
    """The shipped CPU topology with each worker in a process of its own, as on GPUs."""
    assert text.count(UNI) == text.count(IN_ENGINE) == 2
    return text.replace(UNI, "").replace(IN_ENGINE, "")


@pytest.fixture(scope="module")
def reference(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory):
    started = time.monotonic()
    reference = Reference(fleet, tmp_path_factory.mktemp("reference"))
    try:
        reference.wait()
        ask(reference.url, prompt(0, 40), model=served_model(fleet))
        print(f"\nreference ready after {time.monotonic() - started:.1f} s: {reference.python}")
        yield reference
    finally:
        reference.close()


@pytest.fixture(scope="module")
def model(fleet: Fleet) -> str:
    return served_model(fleet)


def served_model(fleet: Fleet) -> str:
    import httpx

    models = httpx.get(f"{fleet.url}/v1/models", timeout=30).json()["data"]
    assert len(models) == 1, models
    return models[0]["id"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")
