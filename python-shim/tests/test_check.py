import json
import subprocess
import sys

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
