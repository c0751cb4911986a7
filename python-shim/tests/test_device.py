"""Copies that end later than they are submitted, over a scripted device. Worker tests run over one, too."""

import itertools
import mmap
import threading
import time

import numpy as np
import pytest
import torch
from fake_device import LIMIT, FakeDevice
from test_worker import blocks, caches, chunks, random_tensor

from conftest import hello
from pegaflow_vllm import device as device_module
from pegaflow_vllm import worker as worker_module
from pegaflow_vllm.arena import Arena
from pegaflow_vllm.client import Client
from pegaflow_vllm.device import PAGE, DeviceCopier, pieces
from pegaflow_vllm.protocol import Commit, Discard, Loaded, Welcome
from pegaflow_vllm.worker import Layout, Worker


class Rig:
    """A worker over one layer of 32 bytes a block, and its device."""

    def __init__(self, engine, **how):
        self.engine = engine
        self.layer = random_tensor(32)
        self.kept = self.layer.clone()
        self.device = FakeDevice(**how)
        layout = Layout(caches([[self.layer]]))
        self.client = Client(engine.path, call_timeout=10.0)
        assert self.client.connect(hello("worker", row_bytes=layout.row_bytes))
        self.worker = Worker(layout, self.client, lambda _, arena: DeviceCopier(self.device, arena))

    def store(self, job: int, source: list[int], slots: list[int]):
        spec = chunks(self.engine, slots)
        assert self.worker.submit_store(job, blocks(source), spec)
        return spec

    def finished(self, count: int) -> list[int]:
        found, end = [], time.monotonic() + LIMIT
        while len(found) < count and time.monotonic() < end:
            found += [result.job_id for result in self.worker.get_finished()]
            time.sleep(0.001)
        return found


@pytest.fixture
def rig(engine):
    made = []

    def make(**how) -> Rig:
        made.append(Rig(engine, **how))
        return made[-1]

    yield make
    for each in made:
        for event in each.device.events:
            event.go.set()
        each.worker.shutdown()


def settle() -> None:
    """Long enough for something wrong to show."""
    time.sleep(0.05)


def test_a_save_is_committed_when_its_copy_is_there_and_not_when_vllm_asks(engine, rig):
    it = rig(hold=True)
    spec = it.store(1, [3, 4], [5, 6])
    settle()
    assert engine.of(Commit) == []
    assert it.worker.get_finished() == []
    it.device.events[0].go.set()
    (commit,) = engine.wait_for(Commit)
    assert (commit.refs, commit.bytes) == (spec.refs, 64)
    assert it.finished(1) == [1]
    assert np.array_equal(it.worker._arena.rows[[5, 6]], it.kept[[3, 4]].numpy())


def test_saves_and_loads_do_not_wait_for_each_other(engine, rig):
    it = rig(hold=True)
    it.device.hold = False
    it.store(1, [3], [5])
    engine.wait_for(Commit)
    it.device.hold = True
    it.store(2, [4], [6])
    it.device.hold = False
    it.layer[7].zero_()
    it.worker.submit_load(3, chunks(engine, [5]), blocks([7]))
    assert it.finished(2) == [1, 3]
    assert torch.equal(it.layer[7], it.kept[3])
    assert it.device.ways == ["save", "save", "load"]
    it.device.events[1].go.set()
    assert it.finished(1) == [2]


def test_saves_keep_their_order(engine, rig):
    it = rig(hold=True)
    specs = [it.store(job, [job], [job]) for job in (1, 2, 3)]
    it.device.events[2].go.set()
    it.device.events[1].go.set()
    settle()
    assert engine.of(Commit) == []
    it.device.events[0].go.set()
    assert [commit.refs for commit in engine.wait_for(Commit, 3)] == [spec.refs for spec in specs]


def test_a_load_that_is_overtaken_while_it_is_copied_fails(engine, rig):
    it = rig(hold=True)
    it.worker.submit_load(4, chunks(engine, [1, 2]), blocks([3, 5]))
    engine.spaces[0].generations[1] = 2
    it.device.events[0].go.set()
    assert it.finished(1) == [4]
    failed = it.worker.take_failures()
    assert (failed.jobs, failed.blocks) == ({4}, {3, 5})
    assert engine.wait_for(Loaded)[0].failed == 2


def test_a_failure_shows_with_its_result_and_not_before(engine, rig):
    it = rig(hold=True)
    it.worker.submit_load(4, chunks(engine, [1], generation=9), blocks([3]))
    # It is over, but vLLM has not been told.
    assert not it.worker.take_failures().jobs
    assert it.finished(1) == [4]
    assert it.worker.take_failures().jobs == {4}


@pytest.mark.parametrize("when", ["submit", "copy"])
def test_what_the_device_refuses_is_discarded_or_failed(engine, rig, when):
    it = rig(hold=True)
    if when == "submit":
        it.device.fail = RuntimeError("CUDA error")
    spec = it.store(1, [3], [5])
    it.worker.submit_load(2, chunks(engine, [6]), blocks([4]))
    for event in it.device.events:
        event.error = RuntimeError("CUDA error")
        event.go.set()
    assert sorted(it.finished(2)) == [1, 2]
    assert it.worker.take_failures().jobs == {2}
    assert engine.wait_for(Discard)[0].refs == spec.refs
    assert engine.of(Commit) == []


def test_blocks_that_are_wanted_back_wait_for_their_copy(engine, rig):
    it = rig(hold=True)
    it.store(1, [3], [5])
    threading.Timer(0.2, it.device.events[0].go.set).start()
    started = time.monotonic()
    it.worker.wait({1, 77})
    assert time.monotonic() - started > 0.15
    it.layer[3].zero_()
    engine.wait_for(Commit)
    assert np.array_equal(it.worker._arena.rows[5], it.kept[3].numpy())


def test_a_copy_that_never_ends_is_never_committed(engine, rig, monkeypatch):
    monkeypatch.setattr(worker_module, "WAIT_LIMIT", 0.05)
    it = rig(hold=True)
    it.store(1, [3], [5])
    it.worker.wait({1})
    assert it.client.off
    it.device.events[0].go.set()
    assert it.finished(1) == [1]
    assert engine.of(Commit) == []
    # vLLM goes on: nothing is saved, and loads fail.
    it.store(2, [3], [5])
    it.worker.submit_load(3, chunks(engine, [5]), blocks([4]))
    assert it.finished(2) == [2, 3]
    assert it.worker.take_failures().jobs == {3}


def test_a_new_life_begins_when_the_copies_of_the_old_one_are_over(engine, rig):
    it = rig(hold=True)
    it.worker.follow(1)
    it.worker.submit_store(1, blocks([3]), with_life(chunks(engine, [5]), 1))
    assert it.device.events
    threading.Timer(0.2, it.device.events[0].go.set).start()
    started = time.monotonic()
    it.worker.follow(2)
    assert time.monotonic() - started > 0.15
    assert it.client.alive
    assert it.finished(1) == [1]


def test_copies_that_do_not_end_keep_the_worker_out_of_a_new_life(engine, rig, monkeypatch):
    monkeypatch.setattr(device_module, "JOIN_LIMIT", 0.05)
    it = rig(hold=True)
    it.worker.follow(1)
    it.worker.submit_store(1, blocks([3]), with_life(chunks(engine, [5]), 1))
    assert it.device.events
    it.worker.follow(2)
    assert it.client.off
    assert it.device.pinned, "what is under way still needs it"


def with_life(spec, life: int):
    spec.life = life
    return spec


def test_the_whole_arena_is_pinned_and_let_go(rig):
    it = rig()
    assert it.device.whole.wait(LIMIT)
    arena = it.worker._arena
    assert sum(it.device.pinned.values()) == arena.size
    assert min(it.device.pinned) == arena.address
    it.worker.shutdown()
    assert it.device.pinned == {}
    assert it.device.entered == {"pegaflow-pin", "pegaflow-save", "pegaflow-load"}


def arena_of(slots: int) -> Arena:
    layout = {"epoch": 1, "session": 1, "slots": slots, "stride": 64, "rank_offset": 0, "header_bytes": PAGE}
    size = PAGE + -(-slots * 64 // PAGE) * PAGE
    return Arena(mmap.mmap(-1, size), Welcome(**layout, arena_bytes=size, checksum_offset=0), 32)


@pytest.mark.parametrize("refuse_from", [1, 2, 3])
def test_where_the_driver_will_not_pin_all_nothing_is_and_copies_go_on(monkeypatch, refuse_from):
    monkeypatch.setattr(device_module, "PIECE", 1)
    arena, device, layer = arena_of(256), FakeDevice(refuse_from=refuse_from), random_tensor(32)
    copier = DeviceCopier(device, arena)
    copier._threads[0].join(LIMIT)
    assert (device.pins, device.pinned) == (refuse_from, {})
    assert not device.whole.is_set()
    errors, over = [], threading.Event()
    pages = Layout(caches([[layer]])).groups[0]
    part = worker_module.Part(pages, np.array([3]), np.array([200]))
    copier.submit("save", [part], lambda error: (errors.append(error), over.set()))
    assert over.wait(LIMIT)
    assert errors == [None]
    assert np.array_equal(arena.rows[200], layer[3].numpy())
    assert copier.close()


def test_what_fails_after_a_copy_does_not_keep_others_waiting():
    copier, over = DeviceCopier(FakeDevice(), arena_of(4)), threading.Event()

    def fails(error) -> None:
        raise RuntimeError("a defect")

    copier.submit("save", [], fails)
    copier.submit("save", [], lambda error: over.set())
    assert over.wait(LIMIT)
    assert copier.close()


@pytest.mark.parametrize("stride", [64, 320, 4096, 73728, (1 << 20) + 64, 3 << 30])
@pytest.mark.parametrize("slots", [1, 7, 5000])
def test_pieces_end_where_rows_and_pages_do(stride, slots):
    header = 3 * PAGE
    size = -(-(header + slots * stride) // PAGE) * PAGE
    cut = pieces(header, stride, size)
    assert cut[0][0] == 0
    assert cut[-1][1] == size
    for (_, end), (start, _) in itertools.pairwise(cut):
        assert end == start
        assert start % PAGE == 0
        assert (start - header) % stride == 0
    assert len(cut) <= size // (1 << 30) + 2


def test_addresses_outside_are_refused_before_anything_is_copied():
    arena = arena_of(4)
    device = FakeDevice()
    copier = DeviceCopier(device, arena)
    pages = Layout(caches([[random_tensor(32)]])).groups[0]
    for wrong in [([99], [0]), ([0], [4]), ([-1], [0]), ([0, 1], [0])]:
        errors = []
        copier.submit("save", [worker_module.Part(pages, *map(np.array, wrong))], errors.append)
        assert isinstance(errors[0], IndexError), wrong
    assert device.events == []
    assert copier.close()
