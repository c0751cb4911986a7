import json
import logging
import re
import subprocess
import sys

import pytest

from pegaflow_vllm import check


class Base:
    def lookup(self, key, context): ...

    def wait(self, jobs, *, soon=False): ...

    def newer(self): ...


class Fits(Base):
    def lookup(self, key, context, extra=None): ...

    def wait(self, *args, **kwargs): ...

    def our_own(self, anything): ...


def test_what_fits_has_no_problem():
    assert check.against(Fits, Base, ["lookup", "wait"]) == []


def test_every_difference_is_told():
    class Short(Base):
        def lookup(self, key): ...

        def wait(self, jobs): ...

    found = check.against(Short, Base, ["lookup", "gone"])
    assert len(found) == 3
    assert any("no gone()" in text for text in found)
    assert any("Base.lookup()" in text for text in found)
    assert any("Base.wait()" in text and "soon" in text for text in found)


def test_a_class_that_extends_another_is_told():
    assert check.against(Fits, int, []) == ["Fits does not extend vLLM's int"]


def test_this_vllm_has_every_hook():
    done = subprocess.run([sys.executable, "-m", "pegaflow_vllm.check"], capture_output=True, text=True, timeout=300)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["vllm"]
    assert answer["problems"] == []
    assert answer["tested"] == check.TESTED


@pytest.mark.parametrize("old", ["0.25.1", "0.9.2.post2", "0.25.0rc1+cpu"])
def test_a_version_without_the_hooks_is_refused_with_those_that_have_them(monkeypatch, old):
    monkeypatch.setattr(check, "version", lambda: old)
    with pytest.raises(ValueError, match=f"vLLM {re.escape(old)}.*older than 0.26.0.*0.26.0 to 0.32.0.*unified"):
        check.refuse_unsuitable()


def test_a_signature_that_changed_is_refused_at_start(monkeypatch):
    monkeypatch.setattr(check, "problems", lambda: ["vLLM's Base has no wait()"])
    with pytest.raises(ValueError, match=r"no wait\(\).*Tested are"):
        check.refuse_unsuitable()


@pytest.mark.parametrize(
    ("version", "said"), [("0.32.0", False), ("0.33.0", True), ("1.0", True), ("0.1.dev9+g1", False)]
)
def test_a_newer_version_is_let_in_and_said(monkeypatch, caplog, version, said):
    monkeypatch.setattr(check, "version", lambda: version)
    monkeypatch.setattr(check, "problems", lambda: [])
    monkeypatch.setattr(check.logger, "propagate", True)
    for name in ("vllm", "vllm.pegaflow"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    check.refuse_unsuitable()
    assert ("newer" in caplog.text) == said
