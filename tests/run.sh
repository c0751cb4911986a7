#!/usr/bin/env bash
# Every check of the project. `tests/run.sh quick` leaves out what needs a real vLLM.
# Needs: Rust with clippy and rustfmt, a C compiler, Python 3.11+ with pip and venv, Node 20+ with npm, Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-all}
step() { printf '\n=== %s (%ss)\n' "$1" "$SECONDS"; }

step "format and lints"
cargo fmt --check
cargo clippy --locked --all-targets -- -D warnings

step "unit, property and fault tests (fake vLLM)"
cargo test --locked

step "the dashboard in a real browser"
cargo build --locked --examples
bash tests/browser.sh

step "python tools"
python3 -m venv target/test-venv
target/test-venv/bin/pip install --quiet --disable-pip-version-check -r tests/real/requirements.txt
target/test-venv/bin/ruff check python-shim tests examples benches
target/test-venv/bin/ruff format --check python-shim tests examples benches

if [ "$mode" = quick ]; then
    step "done (quick: real vLLM was left out)"
    exit 0
fi

step "release build"
cargo build --locked --release
export PEGAFLOW_BIN=$PWD/target/release/pegaflow

step "end to end on real vLLM"
target/test-venv/bin/python -m pytest -q tests/real

step "the shim's own tests, inside the managed runtime"
interpreter=$("$PEGAFLOW_BIN" prepare configs/1p1d-cpu.toml | sed -n 's/^interpreter //p')
# pytest alone, beside the runtime: nothing else of the test environment may shadow vLLM's packages.
target/test-venv/bin/pip install --quiet --disable-pip-version-check --upgrade --target target/shim-tools \
    "$(grep '^pytest==' tests/real/requirements.txt)"
PYTHONPATH=$PWD/python-shim:$PWD/target/shim-tools "$interpreter" -m pytest -q python-shim/tests
step "what a GPU's checks would do, in host memory"
PYTHON=$interpreter OUT=target/gpu-dry bash tests/gpu/run.sh --dry-run
step "all checks passed"
