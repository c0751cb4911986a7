"""The builtin model: the same bytes on every run, since its digest names it in the cache."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "pegaflow_tools" / "tiny_model.py"


def digests(out: Path, seed: str) -> dict[str, str]:
    environment = os.environ | {"PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, SCRIPT, out], env=environment, check=True, timeout=300)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def test_two_runs_make_the_same_bytes(tmp_path: Path):
    one = digests(tmp_path / "one", "1")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= one.keys()
    assert one == digests(tmp_path / "two", "2")
