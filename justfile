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

# Clients that nobody here wrote (openai, anthropic, litellm, langchain, vllm bench serve, curl), against real vLLM.
clients *which:
    cargo build --locked --release
    tests/clients/run.sh {{which}}

# What takes longer than CI may: property tests with many more cases, a thousand kills at the store and a thousand of
# nodes, ten minutes of all faults at once under 200 requests a second, the whole fault matrix, real vLLM with a store
# that is too small, with failing loads and cut connections, and the fault tests on the fake, round after round.
soak rounds="20":
    PROPTEST_CASES=20000 cargo test --locked --lib
    cargo test --locked --test engine_crash -- --ignored --nocapture
    cargo build --locked --examples
    cargo test --locked --test up_fake -- --ignored --nocapture --test-threads 1
    cargo test --locked --test up_matrix -- --ignored --nocapture
    cargo build --locked --release
    target/test-venv/bin/python -m pytest -q -m soak tests/real
    for round in $(seq {{rounds}}); do echo "round $round"; cargo test --locked --test up_fake --test supervise_guard --test supervise_run || exit 1; done

# Coverage-guided fuzzing of the store's socket (needs a C++ compiler).
fuzz seconds="300":
    fuzz/run.sh {{seconds}}

# The pure parts of the store under Miri (needs a nightly toolchain with the miri component).
miri:
    PROPTEST_CASES=4 MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --lib -- engine::index engine::handoffs engine::store engine::protocol --skip cost --skip traces
