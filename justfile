# `just check` is what CI runs. The longer things are run by hand; their results are committed under docs/.

default:
    @just --list

# Everything that CI checks: format, lints, all tests, the real end-to-end test.
check:
    bash tests/run.sh

# Only what needs no vLLM: a few minutes.
quick:
    bash tests/run.sh quick

# Cold start and TTFT/TPOT/ITL of P/D beside two unified nodes on real vLLM (about 15 minutes).
bench:
    bash benches/run.sh
