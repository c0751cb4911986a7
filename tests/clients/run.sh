#!/usr/bin/env bash
# Clients that nobody here wrote, against a fleet; one line for each client and check, and exit code 1 if one failed.
#
#     tests/clients/run.sh [CLIENT...]          all of them without one: see `all` below
#
# Starts configs/1p1d-cpu.toml on real vLLM, with an API key, and ends it afterwards. TOPOLOGY names another one,
# PEGAFLOW_BIN another binary than target/release/pegaflow. With BASE_URL (http://HOST:PORT, no /v1), MODEL and API_KEY
# it uses a fleet that runs; that one must have API keys, serve /metrics there, and nobody else meanwhile.
# Needs: Python 3.11+ with venv, Node 20+ with npm, curl; the packages come from their registries.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/clients
all=(curl openai-python openai-node anthropic litellm langchain vllm-bench)
chosen=("$@")
[ $# -gt 0 ] || chosen=("${all[@]}")
for client in "${chosen[@]}"; do
    [[ " ${all[*]} " == *" $client "* ]] || { echo "no client '$client'; there are: ${all[*]}" >&2; exit 2; }
done
wants() { [[ " ${chosen[*]} " == *" $1 "* ]]; }

pegaflow=${PEGAFLOW_BIN:-target/release/pegaflow}
config=${TOPOLOGY:-configs/1p1d-cpu.toml}
work=$(mktemp -d)
fleet=
finish() {
    if [ -n "$fleet" ]; then
        kill -INT "$fleet" 2>/dev/null || true
        wait "$fleet" || echo "the fleet ended with $?" >&2
    fi
    rm -rf "$work"
}
trap finish EXIT

if [ -z "${BASE_URL:-}" ]; then
    [ -x "$pegaflow" ] || { echo "$pegaflow is missing: cargo build --release, or set PEGAFLOW_BIN" >&2; exit 2; }
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    mkdir "$work/run" "$work/state"
    XDG_RUNTIME_DIR=$work/run XDG_STATE_HOME=$work/state NO_COLOR=1 PEGAFLOW_API_KEYS=key-of-the-tests \
        "$pegaflow" up "$config" --set 'name="clients"' --set "router.listen=\"127.0.0.1:$port\"" \
        >"$work/fleet.log" 2>&1 </dev/null &
    fleet=$!
    BASE_URL=http://127.0.0.1:$port MODEL=tiny API_KEY=key-of-the-tests
fi
export BASE_URL MODEL="${MODEL:-tiny}" API_KEY="${API_KEY:?the key of the fleet at BASE_URL}"

# While the fleet starts.
if wants openai-python || wants anthropic || wants litellm || wants langchain; then
    python3 -m venv target/clients/venv
    target/clients/venv/bin/pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
fi
if wants openai-node; then
    # Modules are looked for beside the script and above it.
    mkdir -p target/clients/node
    cp "$here/package.json" "$here/package-lock.json" "$here/openai_client.mjs" target/clients/node/
    npm ci --prefix target/clients/node --silent --no-audit --no-fund
fi
if wants vllm-bench; then
    prepared=$("$pegaflow" prepare "$config" 2>"$work/prepare.log") || { cat "$work/prepare.log" >&2; exit 1; }
    INTERPRETER=$(sed -n 's/^interpreter //p' <<<"$prepared")
    TOKENIZER=${TOKENIZER:-$(sed -n 's/^model //p' <<<"$prepared")}
    export INTERPRETER TOKENIZER
fi

if [ -n "$fleet" ]; then
    # The first start may have to install vLLM.
    until grep -q 'pegaflow is ready' "$work/fleet.log"; do
        if ! kill -0 "$fleet" 2>/dev/null || [ "$SECONDS" -gt 900 ]; then
            tail -n 60 "$work/fleet.log" >&2
            echo "the fleet did not become ready in ${SECONDS} s" >&2
            exit 1
        fi
        sleep 1
    done
fi

failed=()
for client in "${chosen[@]}"; do
    case $client in
        curl) run=(bash "$here/curl.sh") ;;
        openai-python) run=(target/clients/venv/bin/python "$here/openai_client.py") ;;
        openai-node) run=(node target/clients/node/openai_client.mjs) ;;
        anthropic | litellm | langchain) run=(target/clients/venv/bin/python "$here/${client}_client.py") ;;
        vllm-bench) run=(bash "$here/vllm_bench.sh") ;;
    esac
    timeout 900 "${run[@]}" || failed+=("$client")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    [ -z "$fleet" ] || tail -n 40 "$work/fleet.log" >&2
    exit 1
fi
echo "all passed: ${chosen[*]}"
