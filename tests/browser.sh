#!/usr/bin/env bash
# The dashboard: its page is built again and compared with the one that is committed, and tried in a real browser,
# against a scripted back-end and against real fleets of the fake vLLM.
# Needs Node 20 with npm, Chromium (CHROMIUM names another one than /usr/bin/chromium), and the binaries of `cargo build`
# and `cargo build --examples`. SCREENSHOTS=DIR keeps pictures.
set -euo pipefail
cd "$(dirname "$0")/.."
web=src/dashboard/web
for file in target/debug/pegaflow target/debug/examples/fake-vllm; do
    [ -x "$file" ] || { echo "$file is missing: cargo build, and cargo build --examples" >&2; exit 2; }
done
npm ci --prefix "$web" --silent --no-audit --no-fund
npm run --prefix "$web" --silent check
kept=$(mktemp -d)
trap 'rm -rf "$kept"' EXIT
cp -r src/dashboard/dist/. "$kept"
npm run --prefix "$web" --silent build
diff -r "$kept" src/dashboard/dist || { echo "src/dashboard/dist is not what src/dashboard/web builds: commit it" >&2; exit 1; }
npm test --prefix "$web" --silent
