"""Builds copy.rs for the shim's tests and for benchmarks; what pegaflow ships is built by build.rs in the same way."""

import subprocess
import tempfile
from pathlib import Path

OPTIONS = ["--edition=2024", "--crate-type=cdylib", "--crate-name=pegaflow_copy", "-Copt-level=3", "-Cpanic=abort"]


def build() -> Path:
    source = Path(__file__).with_name("copy.rs")
    library = Path(tempfile.mkdtemp(prefix="pegaflow-copy-")) / "pegaflow_copy.so"
    subprocess.run(["rustc", *OPTIONS, "-o", str(library), str(source)], check=True)
    return library
