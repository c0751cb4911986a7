"""Processes, shared memory and ports, as the operating system shows them."""

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHM = Path("/dev/shm")


def wait_until(condition: Callable[[], object], limit: float, what: str):
    """Polls until the condition is true, and returns its value."""
    end = time.monotonic() + limit
    while True:
        if value := condition():
            return value
        assert time.monotonic() < end, f"not within {limit} s: {what}"
        time.sleep(0.05)


@contextmanager
def later(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    """Acts while the body runs; when the body ends it has happened."""
    timer = threading.Timer(seconds, act)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def free_port() -> int:
    """One that no connection takes for its own end before it is used: Linux gives those from 32768 up."""
    for port in random.sample(range(20_000, 32_768), 100):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise OSError("no free port from 20000 to 32767")


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(pid: int) -> bool:
    stat = _stat(pid)
    return bool(stat) and stat[0] not in "ZX"


def parent(pid: int) -> int | None:
    stat = _stat(pid)
    return int(stat[1]) if stat else None


def tree(root: int) -> set[int]:
    """The process and everything below it."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    parents = {pid: parent(pid) for pid in pids}
    found, open_ = {root}, [root]
    while open_:
        above = open_.pop()
        below = [pid for pid, its_parent in parents.items() if its_parent == above and pid not in found]
        found.update(below)
        open_ += below
    return {pid for pid in found if alive(pid)}


def argv(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().rstrip("\0").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def describe(pids: set[int]) -> str:
    lines = []
    for pid in sorted(pids):
        try:
            lines.append(f"{pid}: {' '.join(argv(pid))[:160]}")
        except OSError:
            lines.append(f"{pid}: gone")
    return "\n".join(lines)


def shm_files() -> set[str]:
    return {entry.name for entry in SHM.iterdir()}


def shm_in_use(pids: set[int] | None = None) -> set[str]:
    """Shared-memory files that these processes, or any, have mapped."""
    names = set()
    for pid in pids if pids is not None else [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        names |= {line.rpartition(f"{SHM}/")[2] for line in maps.splitlines() if f" {SHM}/" in line}
    return names


def shm_left(before: set[str]) -> set[str]:
    """Files that came since and that no living process has mapped."""
    return shm_files() - before - shm_in_use()
