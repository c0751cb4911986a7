#!/usr/bin/env bash
# The tables of docs/performance.md, on this machine. Needs what tests/run.sh needs, and a free port 8000.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --locked --release
[ -x target/test-venv/bin/python ] || python3 -m venv target/test-venv
target/test-venv/bin/pip install --quiet --disable-pip-version-check -r tests/real/requirements.txt
exec target/test-venv/bin/python benches/compare.py \
    configs/1p1d-cpu.toml configs/unified2-cpu.toml --cold --rounds "${ROUNDS:-3}" "$@"
