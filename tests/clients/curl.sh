#!/usr/bin/env bash
# curl: what a client's HTTP may look like. BASE_URL, MODEL and API_KEY come from run.sh.
set -uo pipefail
: "${BASE_URL:?}" "${MODEL:?}" "${API_KEY:?}"
version=$(curl --version | awk 'NR == 1 { print $2 }')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

ask() { # PATH BODY [curl's flags]; the answer's body, then a line with its status
    local path=$1 body=$2
    shift 2
    curl --silent --show-error --max-time 120 --write-out '\nstatus %{http_code}\n' "$BASE_URL$path" \
        -H "Authorization: Bearer $API_KEY" -H 'Content-Type: application/json' --data-binary "$body" "$@"
}

chat() { # TOKENS [more of the JSON]
    printf '{"model": "%s", "max_tokens": %s, "temperature": 0, "ignore_eos": true%s,
        "messages": [{"role": "user", "content": "The quick brown fox"}]}' "$MODEL" "$1" "${2:-}"
}

has() { # FILE PATTERN...: each pattern is in the file
    local file=$1 pattern
    shift
    for pattern in "$@"; do
        grep -Eq -- "$pattern" "$file" || { echo "no /$pattern/ in: $(head -c 600 "$file")"; return 1; }
    done
}

check() { # NAME FUNCTION
    local said
    if said=$("$2" 2>&1); then
        echo "ok    curl $version  $1"
    else
        echo "FAIL  curl $version  $1: $said"
        failed=1
    fi
}

plain() {
    ask /v1/chat/completions "$(chat 8)" >"$work/out" || return
    has "$work/out" '^status 200' '"finish_reason": ?"length"' '"completion_tokens": ?8'
}

completion() {
    ask /v1/completions "{\"model\": \"$MODEL\", \"prompt\": \"The quick\", \"max_tokens\": 8, \"ignore_eos\": true}" \
        >"$work/out" || return
    has "$work/out" '^status 200' '"text_completion"' '"completion_tokens": ?8'
}

streamed() {
    ask /v1/chat/completions "$(chat 8 ', "stream": true, "stream_options": {"include_usage": true}')" --no-buffer \
        "$@" >"$work/out" || return
    has "$work/out" '^status 200' '^data: \{' '"completion_tokens": ?8' '^data: \[DONE\]'
}

old_http() {
    ask /v1/chat/completions "$(chat 8)" --http1.0 >"$work/out" || return
    has "$work/out" '^status 200' '"completion_tokens": ?8'
}

# HTTP/1.0 knows no chunks: the stream ends with the connection.
old_http_streamed() { streamed --http1.0; }

# JSON may have any number of spaces.
expect_continue() {
    { chat 8; printf '%1300000s' ''; } >"$work/body"
    ask /v1/chat/completions "@$work/body" -H 'Expect: 100-continue' --expect100-timeout 60 --verbose \
        >"$work/out" 2>"$work/wire" || return
    has "$work/out" '^status 200' '"completion_tokens": ?8'
    has "$work/wire" '^> Expect: 100-continue' '^< HTTP/1.1 100 Continue' '^> Content-Length: 13[0-9]{5}'
}

chunked() {
    { chat 8; printf '%100000s' ''; } >"$work/body"
    ask /v1/chat/completions @- -H 'Transfer-Encoding: chunked' --verbose <"$work/body" >"$work/out" 2>"$work/wire" ||
        return
    has "$work/out" '^status 200' '"completion_tokens": ?8'
    has "$work/wire" '^> Transfer-Encoding: chunked'
}

unknown_model() {
    ask /v1/chat/completions "$(MODEL=no-such-model chat 8)" >"$work/out" || return
    has "$work/out" '^status 404' 'no-such-model' "\`$MODEL\`"
}

cancelled() {
    curl --silent --show-error --max-time 30 "$BASE_URL/metrics" |
        awk '/^pegaflow_router_requests_total\{.*outcome="cancelled"/ { sum += $NF } END { print sum + 0 }'
}

closed_early() {
    local before
    before=$(cancelled)
    # curl ends by itself once nobody reads what it writes.
    ask /v1/chat/completions "$(chat 1500 ', "stream": true')" --no-buffer 2>/dev/null | head -n 3 >"$work/out"
    has "$work/out" '^data: \{' || return
    for _ in $(seq 100); do
        [ "$(cancelled)" -gt "$before" ] && return
        sleep 0.2
    done
    echo "no cancelled request counted after the stream was closed"
    return 1
}

wrong_key() {
    curl --silent --show-error --max-time 30 --write-out '\nstatus %{http_code}\n' "$BASE_URL/v1/models" \
        -H 'Authorization: Bearer wrong-key-of-nobody' >"$work/out" || return
    has "$work/out" '^status 401' 'invalid_api_key'
}

check "chat" plain
check "completion" completion
check "streamed chat" streamed
check "HTTP/1.0" old_http
check "HTTP/1.0, streamed" old_http_streamed
check "Expect: 100-continue, 1.3 MB" expect_continue
check "chunked upload" chunked
check "unknown model is 404" unknown_model
check "stream closed early" closed_early
check "wrong API key is 401" wrong_key
exit "$failed"
