"""Builds the native library for the shim's tests and for benchmarks; what pegaflow ships is built by build.rs alike."""

import subprocess
import tempfile
from pathlib import Path

OPTIONS = ["--edition=2024", "--crate-type=cdylib", "--crate-name=pegaflow_copy", "-Copt-level=3", "-Cpanic=abort"]


def build(*more: str) -> Path:
    """The library; `more` are further options of rustc."""
    source = Path(__file__).with_name("copy.rs")
    library = Path(tempfile.mkdtemp(prefix="pegaflow-copy-")) / "pegaflow_copy.so"
    subprocess.run(["rustc", *OPTIONS, *more, "-o", str(library), str(source)], check=True)
    return library
