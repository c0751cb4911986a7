#!/usr/bin/env bash
# Coverage-guided fuzzing on stable Rust: the flags are those that cargo-fuzz sets, without a sanitizer
# (there is no unsafe code on this path). Needs a C++ compiler, for libFuzzer.
#   fuzz/run.sh [seconds]      fuzz; new inputs go to the corpus, a crash to fuzz/artifacts
#   fuzz/run.sh minimize       keep only what adds coverage
set -euo pipefail
cd "$(dirname "$0")"
export CARGO_TARGET_DIR=../target/fuzz
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
host=$(rustc -vV | sed -n 's/^host: //p')
# With a target given, build scripts and macros are not instrumented.
cargo build --locked --target "$host" --bin frames
frames=$CARGO_TARGET_DIR/$host/debug/frames
mkdir -p corpus/frames artifacts
common=(-entropic=0 -artifact_prefix=artifacts/ -max_len=512 -timeout=60 -rss_limit_mb=2048)
if [ "${1:-}" = minimize ]; then
    rm -rf corpus/minimized && mkdir corpus/minimized
    "$frames" "${common[@]}" -merge=1 corpus/minimized corpus/frames
    rm -rf corpus/frames && mv corpus/minimized corpus/frames
else
    exec "$frames" "${common[@]}" -max_total_time="${1:-60}" corpus/frames
fi
