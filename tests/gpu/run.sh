#!/usr/bin/env bash
# What can only be seen on a real GPU. Needs no network; prints Markdown, and one JSON line per check.
#
#     PYTHON=/venv/bin/python bash tests/gpu/run.sh [--dry-run]
#
# PYTHON has vLLM for CUDA. PEGAFLOW_BIN is the binary (target/release/pegaflow). MODEL is a directory of weights for
# the whole fleet; without it one with random weights of about a billion parameters is made. OUT gets the logs.
# --dry-run needs no GPU: it runs the copies' checks in host memory and shows the other commands.
set -euo pipefail
cd "$(dirname "$0")/../.."

dry=""
[ "${1:-}" = "--dry-run" ] && dry=yes
binary=${PEGAFLOW_BIN:-target/release/pegaflow}
python=${PYTHON:?the interpreter of an environment with vLLM for CUDA}
out=${OUT:-target/gpu}
model=${MODEL:-$out/model}
mkdir -p "$out"
failed=0

step() {
    printf '\n## %s\n\n' "$1"
}

# Runs a command, or shows it; a failure is told at the end and stops nothing.
run() {
    printf '    %s\n\n' "$*"
    [ -n "$dry" ] && return 0
    "$@" || {
        echo "FAILED with $?: $*"
        failed=1
    }
}

step "Which GPU"
run nvidia-smi --query-gpu=index,name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max --format=csv

step "NVML: what is there, and the plan"
if [ ! -d "$model" ]; then
    run env PYTHONPATH=python-shim "$python" benches/larger_model.py "$model" --layers 16 --hidden 2048
fi
for name in shared shared-unified; do
    sed "s#@MODEL@#$(realpath -m "$model")#; s#@PYTHON@#$python#" "tests/gpu/$name.toml" > "$out/$name.toml"
    if [ -n "$dry" ]; then
        # 4: all is well but for the GPU that is not here. 3 would be a mistake in the topology.
        code=0
        "$binary" plan "$out/$name.toml" || code=$?
        [ "$code" = 0 ] || [ "$code" = 4 ] || failed=1
    else
        run "$binary" plan "$out/$name.toml"
    fi
done

step "cudarc: context, peer access, bandwidth, registration"
run "$binary" doctor "$out/shared.toml"

step "The shim's copies"
check=(env "PYTHONPATH=python-shim:python-shim/tests" "$python" tests/gpu/worker.py)
if [ -n "$dry" ]; then
    "${check[@]}" --device fake --gib 0.125
else
    run "${check[@]}"
fi

step "Prefill and decode on one GPU: the same bits as a node without connector"
run env "PEGAFLOW_BIN=$binary" "TOPOLOGY=$out/shared.toml" "$python" tests/gpu/fleet.py

step "Beside two unified nodes"
run "$binary" bench compare "$out/shared.toml" "$out/shared-unified.toml" --input 4000 --output 200 --rate 1,2 \
    --html "$out/compare.html"

[ "$failed" = 0 ] && echo "all done" || echo "some FAILED"
exit "$failed"
