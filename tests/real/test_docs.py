"""The guide for machines without a GPU, typed in as it stands: every block of its commands, in their order."""

import os
import pathlib
import re
import subprocess

from machine import free_port
from pegaflow import BINARY, ROOT

GUIDE = ROOT / "docs" / "getting-started-cpu.md"
MINUTES = 60.0


def test_the_guide_does_what_it_says(tmp_path):
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8, "a block was added or removed: look at what is asserted below"
    # Built already, perhaps elsewhere; and whatever runs at port 8000 is left alone.
    binary = pathlib.Path(BINARY).resolve()
    port = free_port()
    script = "\n".join(f"echo '=== block {number}'\n{block}" for number, block in enumerate(blocks[1:], 1))
    script = script.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    listen = f"--set router.listen=127.0.0.1:{port}"
    script = script.replace("up -d configs/1p1d-cpu.toml", f"up -d configs/1p1d-cpu.toml {listen}")
    script = script.replace("doctor configs/1p1d-cpu.toml", f"doctor configs/1p1d-cpu.toml {listen}")
    for name in ("run", "state"):
        (tmp_path / name).mkdir(mode=0o700)
    environment = os.environ | {
        "PATH": f"{binary.parent}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "NO_COLOR": "1",
    }
    try:
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20 * MINUTES,
        )
    finally:
        # It has ended it itself, unless it failed.
        subprocess.run(
            [binary, "down", "1p1d-cpu", "--force"], env=environment, capture_output=True, timeout=2 * MINUTES
        )
    assert run.returncode == 0, run.stdout + run.stderr
    said = dict(re.findall(r"=== block (\d+)\n(.*?)(?==== block|\Z)", run.stdout, re.DOTALL))
    for block, expected in {
        "2": "pegaflow is ready",
        "3": '"finish_reason":',
        "4": "#key=",
        "5": "20 answers in",
    }.items():
        assert expected in said[block], said[block]
    assert "data: [DONE]" in said["3"]
    assert "pegaflow_router_ttft_seconds_bucket" in said["4"]
    assert "0 failed" in said["5"]
    assert not list((tmp_path / "run" / "pegaflow").glob("*")), "an instance was left"
