"""Wrong KV is never served: a DeepSeek-shaped model on CPU is refused, and so is what it would answer."""

import subprocess
from pathlib import Path

import pytest

import machine
from conftest import CPU_CONFIG, topology
from pegaflow import READY_LIMIT, Fleet, command

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def mla_model(scratch: Path) -> Path:
    prepared = subprocess.run(command("prepare", str(CPU_CONFIG)), check=True, capture_output=True, text=True).stdout
    words = dict(line.split(" ", 1) for line in prepared.splitlines() if " " in line)
    out = scratch / "mla"
    subprocess.run([words["interpreter"], str(HERE / "mla_model.py"), words["model"], str(out)], check=True)
    return out


def with_model(model: Path, scratch: Path, name: str, extra: str = "") -> tuple[Path, str]:
    """The shipped CPU topology with this model."""
    changes = {'model = "builtin:tiny"': f'model = "{model}"', "[kv]": f"[kv]\n{extra}"}
    return topology(scratch, name, changes)


def test_mla_is_refused_at_plan_time(mla_model: Path, scratch: Path, tmp_path: Path):
    file, url = with_model(mla_model, scratch, "mla-refused")
    fleet = Fleet(file, url, tmp_path)
    try:
        fleet.spawn()
        code = fleet.process.wait(timeout=READY_LIMIT)
    finally:
        fleet.close()
    print(fleet.tail())
    assert code == 3, "3: the topology cannot run"
    assert "multi-head latent attention" in fleet.output()
    assert f"{file}:" in fleet.output() or file.name in fleet.output(), "the message names the file"


def test_canary_refuses_mla_when_the_plan_does_not(mla_model: Path, scratch: Path, tmp_path: Path):
    file, url = with_model(mla_model, scratch, "mla-allowed", "allow_unproven_models = true")
    fleet = Fleet(file, url, tmp_path)
    try:
        fleet.spawn()

        def refused() -> bool:
            return fleet.process.poll() is not None

        machine.wait_until(refused, READY_LIMIT, "the canary's verdict")
        code = fleet.process.wait(timeout=120)
        print(fleet.tail())
    finally:
        fleet.close()
    assert code == 1, "1: failed while running"
    assert "give different answers" in fleet.output(), "the reason is said"
    assert "pegaflow is ready" not in fleet.output()
