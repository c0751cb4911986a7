import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pegaflow_vllm import announce
from pegaflow_vllm.announce import Announcements, Announcer


class Told:
    def __init__(self):
        self.words: list[tuple[str, str | None]] = []

    def __call__(self, handoff: str, failed: str | None) -> None:
        self.words.append((handoff, failed))


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def announcements(told):
    return Announcements(told)


def test_ready_is_said_once_when_all_that_was_granted_is_stored_and_nothing_more_will_come(announcements, told):
    announcements.opened("r", "h")
    announcements.granted("r", [b"a", b"b"])
    announcements.stored("r", [b"a"])
    announcements.granted("r", [b"c"])
    announcements.sealed("r")
    announcements.stored("r", [b"b"])
    assert told.words == []
    announcements.stored("r", [b"c"])
    assert told.words == [("h", None)]
    announcements.stored("r", [b"c"])
    announcements.sealed("r")
    announcements.failed("r", "aborted")
    assert told.words == [("h", None)]


def test_a_prompt_that_is_stored_already_is_ready_when_it_is_sealed(announcements, told):
    announcements.opened("r", "h")
    announcements.sealed("r")
    assert told.words == [("h", None)]


def test_what_is_stored_before_the_seal_waits_for_it(announcements, told):
    announcements.opened("r", "h")
    announcements.granted("r", [b"a"])
    announcements.stored("r", [b"a"])
    assert told.words == []
    announcements.sealed("r")
    assert told.words == [("h", None)]


def test_a_failure_is_the_last_word(announcements, told):
    for n in range(3):
        announcements.opened(f"r{n}", f"h{n}")
    announcements.failed("r0", "no_space")
    announcements.sealed("r0")
    announcements.fail_all("producer_died")
    announcements.sealed("r1")
    announcements.refused("h9", "engine_down")
    expected = [("h0", "no_space"), ("h1", "producer_died"), ("h2", "producer_died"), ("h9", "engine_down")]
    assert told.words == expected


def test_without_a_router_nothing_is_kept():
    silent = Announcements(None)
    silent.opened("r", "h")
    silent.sealed("r")
    silent.refused("h", "engine_down")
    assert silent._pending == {}


class Router(ThreadingHTTPServer):
    """Keeps what it is told; refuses the first `refuse` times."""

    def __init__(self, refuse: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse, self.words = refuse, queue.Queue()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.refuse > 0:
            self.server.refuse -= 1
            self.send_response(503)
        else:
            self.server.words.put((self.path, self.headers["authorization"], body))
            self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_the_router_is_told_with_the_key_and_told_again_if_it_refuses():
    router = Router(refuse=1)
    announcer = Announcer(router.url + "/", "secret")
    announcer.say("h1", None)
    announcer.say("h2", "no_space")
    words = [router.words.get(timeout=10) for _ in range(2)]
    assert words == [
        ("/kv_ready", "Bearer secret", {"handoff": "h1"}),
        ("/kv_ready", "Bearer secret", {"handoff": "h2", "failed": "no_space"}),
    ]
    router.shutdown()


def test_a_router_that_does_not_answer_holds_nobody_up_and_the_key_is_not_logged(caplog, monkeypatch):
    monkeypatch.setattr(announce, "QUEUE", 2)
    # Nobody listens there.
    announcer = Announcer("http://127.0.0.1:9", "secret")
    for n in range(50):
        announcer.say(f"h{n}", None)
    assert announcer._queue.qsize() <= 2
    assert "secret" not in caplog.text


def test_an_endpoint_that_is_no_url_is_refused():
    with pytest.raises(ValueError, match="PEGAFLOW_ROUTER_ENDPOINT"):
        Announcer("router:8080", "")
