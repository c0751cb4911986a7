"""What an open stream on which nothing happens costs the router in memory.

    python3 benches/idle_streams.py target/release/pegaflow --streams 10000

Starts `pegaflow router` in front of a fake prefill and a fake decode node, opens the streams, and waits until each has
its first event and the router has been quiet for some seconds. Prints a Markdown table: the router's resident memory
before and with the streams, and the difference for each of them. Needs no package, but two file descriptors a stream in
the router: the hard limit (`ulimit -Hn`) must allow that, or the script be allowed to raise it.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

EVENT = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" t0"}}]}\n\n'
WHOLE = b'{"id":"x","object":"chat.completion","choices":[],"usage":{"prompt_tokens":300,"completion_tokens":1}}'
MODELS = b'{"data": [{"id": "tiny"}]}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
)
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
DEADLINE_S = 120


class Node(asyncio.Protocol):
    """Answers what is not streamed, and begins what is."""

    def connection_made(self, transport):
        self.transport, self.seen = transport, b""

    def data_received(self, data):
        self.seen += data
        while b"\r\n\r\n" in self.seen:
            head, _, rest = self.seen.partition(b"\r\n\r\n")
            length = LENGTH.search(head)
            length = int(length[1]) if length else 0
            if len(rest) < length:
                return
            body, self.seen = rest[:length], rest[length:]
            if b'"stream":true' in body.replace(b" ", b""):
                self.transport.write(STREAM)
            else:
                reply = WHOLE if body else MODELS
                self.transport.write(HEAD % (len(reply), reply))


def nodes(listeners):
    """Another process: it needs as many descriptors as there are streams."""

    async def serve():
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(Node, sock=listener, backlog=4096) for listener in listeners]
        await asyncio.gather(*(server.serve_forever() for server in servers))

    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(serve())


def listener():
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    found.listen(4096)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def memory_kib(pid):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1])


def cpu_ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


async def quiet(pid, seconds):
    """Until the process has used next to no CPU for this long."""
    since, ticks = time.monotonic(), cpu_ticks(pid)
    while time.monotonic() - since < seconds:
        await asyncio.sleep(0.5)
        if (now := cpu_ticks(pid)) - ticks > 5:
            since, ticks = time.monotonic(), now


async def opened(port, body, at_once):
    async with at_once:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        request = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{request}content-length: {len(body)}\r\n\r\n".encode() + body)
        seen = b""
        while b'"delta"' not in seen:
            piece = await reader.read(4096)
            if not piece:
                raise RuntimeError(f"the router hung up: {seen[:300]!r}")
            seen += piece
        if not seen.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"refused: {seen[:300]!r}")
        return reader, writer


async def measure(args, pid, port):
    prompt = "The quick brown fox jumps over the lazy dog. " * (args.prompt_bytes // 45 + 1)
    messages = [{"role": "user", "content": prompt[: args.prompt_bytes]}]
    body = json.dumps({"model": "tiny", "messages": messages, "max_tokens": 64, "stream": True}).encode()
    # Once around, so that what is made once is there.
    warm = [await opened(port, body, asyncio.Semaphore(1)) for _ in range(20)]
    await quiet(pid, args.settle_s)
    before = memory_kib(pid)
    at_once = asyncio.Semaphore(args.at_once)
    streams = await asyncio.gather(*(opened(port, body, at_once) for _ in range(args.streams)))
    await quiet(pid, args.settle_s)
    during = memory_kib(pid)
    print("| streams | RSS before, MiB | with them, MiB | KiB a stream |")
    print("|---|---|---|---|")
    each = (during - before) / args.streams
    print(f"| {args.streams} | {before / 1024:.1f} | {during / 1024:.1f} | {each:.1f} |", flush=True)
    for _, writer in warm + streams:
        writer.close()


async def ready(pid, port):
    for _ in range(100):
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if b'"splits":true' in answer:
                return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"the router (pid {pid}) did not get ready")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", help="the pegaflow binary, a release build")
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64, help="streams that are opened at the same time")
    parser.add_argument("--prompt-bytes", type=int, default=1024)
    parser.add_argument("--settle-s", type=float, default=6)
    args = parser.parse_args()

    wanted = 2 * args.streams + 500
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(hard, wanted), max(hard, wanted)))
    except (ValueError, PermissionError):
        sys.exit(f"{wanted} file descriptors are needed, and the hard limit is {hard}; take fewer --streams")

    prefill, decode = listener(), listener()
    fakes = multiprocessing.get_context("fork").Process(target=nodes, args=([prefill, decode],), daemon=True)
    fakes.start()
    url = [f"http://127.0.0.1:{fake.getsockname()[1]}" for fake in (prefill, decode)]
    port = free_port()
    limits = ["--max-in-flight", str(args.streams + 100), "--chunk-timeout", "1h"]
    command = [args.program, "router", "--port", str(port), "--prefill", url[0], "--decode", url[1], *limits]
    router = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    async def run():
        await ready(router.pid, port)
        await asyncio.wait_for(measure(args, router.pid, port), DEADLINE_S)

    try:
        asyncio.run(run())
    finally:
        router.terminate()
        try:
            router.wait(15)
        except subprocess.TimeoutExpired:
            router.kill()
        fakes.terminate()


if __name__ == "__main__":
    main()
