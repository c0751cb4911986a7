#!/bin/sh
# A streamed chat completion with nothing but curl. BASE defaults to the address of the shipped topologies.
set -eu
BASE=${BASE:-http://127.0.0.1:8000}
MODEL=${MODEL:-tiny}
curl --silent --show-error --no-buffer "$BASE/v1/chat/completions" \
    -H 'Content-Type: application/json' \
    -d "{\"model\": \"$MODEL\", \"stream\": true, \"max_tokens\": 16,
         \"messages\": [{\"role\": \"user\", \"content\": \"The quick brown fox\"}]}"
