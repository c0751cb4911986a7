#!/usr/bin/env bash
# Every figure of docs/performance-store.md, on this machine, as Markdown: bash benches/store.sh [--quick] > figures.md
# Needs what tests/run.sh needs. The peers are measured if redis-server is on the PATH (or REDIS_SERVER is set) and
# the runtime's interpreter finds the package of benches/peers-requirements.txt (PYTHONPATH).
# Leave the machine alone meanwhile: all of it is timing.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=10 mib=(128 512) rounds=9
if [ "${1:-}" = --quick ]; then seconds=2 mib=(128) rounds=3; fi
cargo build --locked --release --bin pegaflow --example store-engine >&2
cargo bench --locked --no-run --bench store --bench store_load >&2
python=$(target/release/pegaflow prepare configs/1p1d-cpu.toml | sed -n 's/^interpreter //p')
export PEGAFLOW_STORE_ENGINE=$PWD/target/release/examples/store-engine

echo "- commit \`$(git rev-parse --short HEAD)\`, $(date -u +%F)"
echo "- $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(free -g | awk '/^Mem/ {print $2}') GiB, kernel $(uname -r), $(ldd --version | head -1)"
echo "- load average before: $(cut -d' ' -f1-3 /proc/loadavg)"
for size in "${mib[@]}"; do
    printf '\n### Copies, %s MiB a transfer\n\n' "$size"
    "$python" benches/copy_bandwidth.py --mib "$size" --rounds "$rounds"
done
printf '\n### Copies without the native library, 128 MiB\n\n'
PEGAFLOW_COPY=numpy "$python" benches/copy_bandwidth.py --mib 128 --rounds "$rounds"
printf '\n### Checksums, 128 MiB a transfer\n\n'
"$python" benches/checksums.py --rounds "$rounds"

printf '\n### Calls, Rust (Criterion: low, middle, high estimate)\n\n'
cargo bench --locked --bench store 2>/dev/null | grep -E '^(lookup|store|message)|time:' | sed 's/^ */    /'
printf '\n### Under load, and from Python\n\n| what | saves GB/s | samples | p50 us | p99 us | max us |\n|---|---|---|---|---|---|\n'
{
    cargo bench --locked --bench store_load -- "$seconds" 2>/dev/null
    "$python" benches/store_latency.py --seconds "$seconds"
} | "$python" -c '
import json, sys
for line in sys.stdin:
    if line.startswith("{"):
        r = json.loads(line)
        print("| {name} | {saves} | {samples} | {p50_us:.0f} | {p99_us:.0f} | {max_us:.0f} |".format(saves=r.pop("saves_gb_s", 0), **r))
'
if command -v "${REDIS_SERVER:-redis-server}" >/dev/null && "$python" -c 'import redis' 2>/dev/null; then
    printf '\n### Beside peers\n\n'
    "$python" benches/peers.py --rounds "$rounds"
else
    printf '\nPeers were left out: no redis-server, or no Python package redis.\n'
fi
echo "- load average after: $(cut -d' ' -f1-3 /proc/loadavg)"
