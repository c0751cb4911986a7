"""What the Python clients' scripts share: where the fleet is, and one line for each check.

BASE_URL, MODEL and API_KEY come from run.sh.
"""

import os
import re
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from importlib.metadata import version

BASE = os.environ["BASE_URL"]
MODEL = os.environ["MODEL"]
KEY = os.environ["API_KEY"]

MESSAGES = [{"role": "user", "content": "The quick brown fox"}]
PROMPT = "The quick brown fox"
UNKNOWN = "no-such-model"
WRONG_KEY = "wrong-key-of-nobody"
# Of streams that are closed early: far more than can come before the client is gone.
LONG = 1500
# From a closed connection to the router's count of it.
NOTICE_LIMIT = 20


def run(package: str, checks: list[Callable[[], None]]) -> None:
    """Runs all of them, prints a line each, and ends with 1 if one failed."""
    failed = 0
    for check in checks:
        label = f"{package} {version(package)}  {check.__name__.replace('_', ' ')}"
        try:
            check()
            print(f"ok    {label}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL  {label}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
    sys.exit(1 if failed else 0)


def cancelled() -> float:
    """Requests that the router counts as left by their clients."""
    with urllib.request.urlopen(f"{BASE}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    samples = re.findall(r'^pegaflow_router_requests_total\{[^}]*outcome="cancelled"[^}]*\} (\S+)', text, re.MULTILINE)
    return sum(map(float, samples))


def assert_cancelled(before: float) -> None:
    """The router has noticed that one more client went away."""
    end = time.monotonic() + NOTICE_LIMIT
    while (now := cancelled()) < before + 1:
        assert time.monotonic() < end, f"no cancelled request counted {NOTICE_LIMIT} s after the stream was closed"
        time.sleep(0.1)
    assert now == before + 1, f"{now - before} requests were cancelled, not one"


def assert_usage(prompt: int, completion: int, total: int, wanted: int) -> None:
    assert prompt > 0, prompt
    assert completion == wanted, f"{completion} tokens, not {wanted}"
    assert total == prompt + completion, (prompt, completion, total)


def error_of(kind: type[Exception], ask: Callable[[], object]) -> Exception:
    """The client's own exception that asking ends with."""
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def assert_unknown(error: Exception) -> None:
    """The error names what was asked for and what there is."""
    for name in (f"`{UNKNOWN}`", f"`{MODEL}`"):
        assert name in str(error), f"no {name} in the message: {error}"
