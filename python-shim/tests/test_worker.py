import mmap

import numpy as np
import pytest
import torch
from fake_device import FakeDevice, waiting
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)

from conftest import hello
from pegaflow_vllm import copy, protocol
from pegaflow_vllm.arena import Arena
from pegaflow_vllm.client import Client
from pegaflow_vllm.device import DeviceCopier
from pegaflow_vllm.manager import ChunkSpec
from pegaflow_vllm.protocol import Commit, Damaged, Discard, Loaded
from pegaflow_vllm.worker import Failures, Layout, Worker, copier_for
from toy_engine import EPOCH

BLOCKS = 12


def random_tensor(size: int, stride: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-128, 128, (BLOCKS, stride or size), dtype=torch.int8, generator=generator)
    return whole[:, :size]


def caches(groups: list[list[torch.Tensor]]) -> CanonicalKVCaches:
    tensors, refs = [], []
    for group in groups:
        refs.append([])
        for tensor in group:
            refs[-1].append(CanonicalKVCacheRef(len(tensors), tensor.shape[1]))
            tensors.append(CanonicalKVCacheTensor(tensor, tensor.shape[1]))
    return CanonicalKVCaches(tensors, refs)


def blocks(*groups: list[int]) -> GPULoadStoreSpec:
    flat = [block for group in groups for block in group]
    return GPULoadStoreSpec(flat, [len(group) for group in groups], [0] * len(groups))


def chunks(engine, slots: list[int], generation: int = 1, epoch: int = EPOCH) -> ChunkSpec:
    for slot in slots:
        if slot < engine.slots:
            engine.spaces[0].generations[slot] = 1
    refs = np.array([(slot, generation) for slot in slots], dtype=protocol.REF_DTYPE).tobytes()
    return ChunkSpec(epoch, refs)


def failures(worker: Worker) -> Failures:
    worker.get_finished()
    return worker.take_failures()


@pytest.fixture(autouse=True, params=["native", "numpy", "device"])
def how(request, native_copy, monkeypatch):
    """Every test holds for all ways of copying."""
    monkeypatch.setattr(copy, "native", native_copy if request.param == "native" else None)
    return request.param


@pytest.fixture
def worker_over(engine, how):
    """Makes a worker, connected as one rank, over KV tensors per group."""
    made = []

    def make(groups, rank: int = 0, world: int = 1) -> Worker:
        layout = Layout(caches(groups))
        client = Client(engine.path, call_timeout=10.0)
        assert client.connect(hello("worker", rank=rank, world=world, row_bytes=layout.row_bytes))
        made.append(client)
        return Worker(layout, client, on_device if how == "device" else copier_for)

    def on_device(_, arena):
        return waiting(DeviceCopier(FakeDevice(), arena))

    yield make
    for client in made:
        client.close()


# Blocks and slots in stretches, alone, backwards.
SHAPES = [([3], [0]), ([2, 3, 4], [5, 6, 7]), ([9, 1, 2, 7], [3, 8, 9, 4]), ([5, 4, 3], [1, 0, 2])]


@pytest.mark.parametrize(("source", "slots"), SHAPES)
@pytest.mark.parametrize("stride", [None, 96], ids=["contiguous", "padded"])
def test_what_was_stored_is_loaded_bit_exact(engine, worker_over, source, slots, stride):
    layers = [random_tensor(32, stride, 1), random_tensor(48, stride, 2)]
    kept = [layer.clone() for layer in layers]
    worker = worker_over([layers])
    assert worker.submit_store(1, blocks(source), chunks(engine, slots))
    assert all(torch.equal(layer, copy) for layer, copy in zip(layers, kept, strict=True))

    for layer in layers:
        layer.zero_()
    target = [(block + 1) % BLOCKS for block in source]
    assert worker.submit_load(2, chunks(engine, slots), blocks(target))
    for layer, stored in zip(layers, kept, strict=True):
        assert torch.equal(layer[target], stored[source])
        others = [block for block in range(BLOCKS) if block not in target]
        assert not layer[others].any()
    assert [(r.job_id, r.success, r.transfer_size) for r in worker.get_finished()] == [
        (1, True, 80 * len(source)),
        (2, True, 80 * len(source)),
    ]
    assert worker.get_finished() == []
    assert not worker.take_failures().jobs


def test_groups_of_unlike_width_share_the_arena(engine, worker_over):
    wide, narrow = [random_tensor(40, seed=1), random_tensor(40, seed=2)], [random_tensor(24, seed=3)]
    worker = worker_over([wide, narrow])
    assert engine.spaces[0].row_bytes == 80
    kept = [tensor.clone() for tensor in wide + narrow]
    worker.submit_store(1, blocks([1, 2], [5, 0, 3]), chunks(engine, [0, 1, 2, 3, 4]))
    for tensor in wide + narrow:
        tensor.zero_()
    # Another request: only the last two chunks of the second group and the first of the first.
    worker.submit_load(2, chunks(engine, [0, 3, 4]), blocks([7], [8, 9]))
    for tensor, stored in zip(wide, kept, strict=False):
        assert torch.equal(tensor[7], stored[1])
    assert torch.equal(narrow[0][[8, 9]], kept[2][[0, 3]])
    worker.submit_load(3, chunks(engine, [2]), blocks([], [4]))
    assert torch.equal(narrow[0][4], kept[2][5])
    assert not failures(worker).jobs


def test_ranks_keep_to_their_own_part_of_a_row(engine, worker_over):
    first, second = random_tensor(32, seed=1), random_tensor(32, seed=2)
    ranks = [worker_over([[first]], 0, 2), worker_over([[second]], 1, 2)]
    for rank in ranks:
        rank.submit_store(1, blocks([4]), chunks(engine, [6]))
    kept = first[4].clone(), second[4].clone()
    for rank in ranks:
        rank.submit_load(2, chunks(engine, [6]), blocks([0]))
    assert torch.equal(first[0], kept[0])
    assert torch.equal(second[0], kept[1])


def test_a_store_is_committed_at_once_and_only_once(engine, worker_over):
    worker = worker_over([[random_tensor(32)]])
    spec = chunks(engine, [1, 2])
    worker.submit_store(1, blocks([3, 4]), spec)
    worker.submit_store(1, blocks([3, 4]), spec)
    worker.submit_load(2, spec, blocks([5, 6]))
    engine.wait_for(Loaded)
    (commit,) = engine.of(Commit)
    assert (commit.refs, commit.bytes) == (spec.refs, 64)
    assert [result.job_id for result in worker.get_finished()] == [1, 2]


@pytest.mark.parametrize("why", ["generation", "epoch", "lost", "count"])
def test_a_load_that_cannot_be_trusted_fails_but_finishes(engine, worker_over, why):
    layer = random_tensor(32)
    worker = worker_over([[layer]])
    kept = layer.clone()
    spec = {
        "generation": lambda: chunks(engine, [1, 2], generation=9),
        "epoch": lambda: chunks(engine, [1, 2], epoch=EPOCH + 1),
        "lost": lambda: chunks(engine, [1, protocol.NO_SLOT]),
        "count": lambda: chunks(engine, [1]),
    }[why]()
    assert worker.submit_load(4, spec, blocks([3, 5]), expedited=False)
    assert torch.equal(layer, kept)
    assert [(result.job_id, result.success) for result in worker.get_finished()] == [(4, True)]
    failed = failures(worker)
    assert (failed.jobs, failed.blocks) == ({4}, {3, 5})
    assert not failures(worker).jobs
    (loaded,) = engine.wait_for(Loaded)
    assert loaded.failed == len(spec.refs) // 8
    assert loaded.chunks == 0


def test_a_slot_that_changes_hands_during_the_copy_fails_the_load(engine, worker_over, monkeypatch):
    layer = random_tensor(32)
    worker = worker_over([[layer]])
    spec = chunks(engine, [1])
    real = worker._by_group

    def overtaken(*args):
        engine.spaces[0].generations[1] = 2
        return real(*args)

    monkeypatch.setattr(worker, "_by_group", overtaken)
    worker.submit_load(4, spec, blocks([3]))
    assert failures(worker).jobs == {4}


def test_a_store_into_slots_of_others_is_discarded(engine, worker_over):
    worker = worker_over([[random_tensor(32)]])
    spec = chunks(engine, [1, 2], generation=9)
    worker.submit_store(1, blocks([3, 4]), spec)
    assert engine.wait_for(Discard)[0].refs == spec.refs
    assert not np.frombuffer(engine.spaces[0].arena, dtype=np.int8)[engine.spaces[0].header_bytes :].any()
    assert [result.success for result in worker.get_finished()] == [True]


def test_orphans_are_discarded(engine, worker_over):
    worker_over([[random_tensor(32)]]).discard(b"REFSREFS")
    assert engine.wait_for(Discard)[0].refs == b"REFSREFS"


def test_without_an_engine_stores_vanish_and_loads_fail(socket_path):
    worker = Worker(Layout(caches([[random_tensor(32)]])), Client(socket_path, 0.05))
    spec = ChunkSpec(EPOCH, bytes(8))
    worker.submit_store(1, blocks([3]), spec)
    worker.submit_load(2, spec, blocks([3]))
    assert [(result.job_id, result.success) for result in worker.get_finished()] == [(1, True), (2, True)]
    assert failures(worker).jobs == {2}


def test_a_tensor_that_is_not_bytes_is_refused():
    kv = CanonicalKVCaches([CanonicalKVCacheTensor(torch.zeros(4, 8), 32)], [[CanonicalKVCacheRef(0, 32)]])
    with pytest.raises(ValueError, match="not supported"):
        Layout(kv)


@pytest.fixture
def verify(engine):
    engine.verify = True


def damage(engine, slot: int, at: int, rank: int = 0) -> None:
    engine.spaces[0].row(slot, rank)[at] ^= 0x10


@pytest.mark.parametrize(("source", "slots"), SHAPES)
def test_checksums_change_nothing_about_what_is_whole(engine, worker_over, verify, source, slots):
    layer = random_tensor(70, 96)
    kept = layer.clone()
    worker = worker_over([[layer]])
    worker.submit_store(1, blocks(source), chunks(engine, slots))
    layer.zero_()
    worker.submit_load(2, chunks(engine, slots), blocks(source))
    assert torch.equal(layer[source], kept[source])
    engine.wait_for(Loaded)
    assert not failures(worker).jobs
    assert engine.of(Damaged) == []


@pytest.mark.parametrize("at", [0, 31, 69])
def test_a_flipped_bit_fails_the_load_and_names_its_chunk(engine, worker_over, verify, at):
    worker = worker_over([[random_tensor(70)]])
    spec = chunks(engine, [4, 2, 7])
    worker.submit_store(1, blocks([1, 2, 3]), spec)
    engine.wait_for(Commit)
    damage(engine, 2, at)
    worker.submit_load(2, spec, blocks([5, 6, 8]))
    failed = failures(worker)
    assert (failed.jobs, failed.blocks) == ({2}, {5, 6, 8})
    (loaded,) = engine.wait_for(Loaded)
    assert (loaded.chunks, loaded.failed) == (0, 3)
    assert engine.of(Damaged) == [Damaged(refs=spec.refs[8:16])]
    # The others can be loaded all the same.
    worker.submit_load(3, chunks(engine, [4, 7]), blocks([5, 8]))
    assert not failures(worker).jobs


def test_a_damaged_checksum_is_damage_too(engine, worker_over, verify):
    worker = worker_over([[random_tensor(32)]])
    spec = chunks(engine, [3])
    worker.submit_store(1, blocks([1]), spec)
    engine.wait_for(Commit)
    worker._arena.sums[3] ^= 1
    worker.submit_load(2, spec, blocks([5]))
    assert engine.wait_for(Damaged) == [Damaged(refs=spec.refs)]


def test_what_overtakes_a_load_is_no_damage(engine, worker_over, verify, monkeypatch):
    worker = worker_over([[random_tensor(32)]])
    spec = chunks(engine, [1, 2])
    worker.submit_store(1, blocks([3, 4]), spec)
    engine.wait_for(Commit)
    real = worker._by_group

    def overtaken(*args):
        engine.spaces[0].generations[1] = 2
        damage(engine, 1, 5)
        return real(*args)

    monkeypatch.setattr(worker, "_by_group", overtaken)
    worker.submit_load(2, spec, blocks([5, 6]))
    assert failures(worker).jobs == {2}
    engine.wait_for(Loaded)
    assert engine.of(Damaged) == []


def test_every_rank_sums_its_own_part_and_every_group_what_it_uses(engine, worker_over, verify):
    wide, narrow = random_tensor(40, seed=1), random_tensor(24, seed=2)
    ranks = [worker_over([[wide], [narrow]], rank, 2) for rank in (0, 1)]
    spec = chunks(engine, [6, 3])
    for rank in ranks:
        rank.submit_store(1, blocks([4], [5]), spec)
    engine.wait_for(Commit, 2)
    # Behind the narrow group's pages nothing is stored.
    damage(engine, 3, 30, rank=0)
    # The wide group's chunk, of the second rank.
    damage(engine, 6, 30, rank=1)
    for rank in ranks:
        rank.submit_load(2, spec, blocks([7], [8]))
    engine.wait_for(Loaded, 2)
    assert [failures(rank).jobs for rank in ranks] == [set(), {2}]
    assert engine.of(Damaged) == [Damaged(refs=spec.refs[:8])]


def test_without_room_for_checksums_damage_goes_unseen(engine, worker_over):
    worker = worker_over([[random_tensor(32)]])
    spec = chunks(engine, [1])
    worker.submit_store(1, blocks([3]), spec)
    engine.wait_for(Commit)
    damage(engine, 1, 5)
    worker.submit_load(2, spec, blocks([5]))
    assert not failures(worker).jobs
    assert worker._arena.sums is None


@pytest.mark.parametrize("offset", [4, 4 * 64 + 2, 4096])
def test_checksums_that_lie_elsewhere_are_refused(offset):
    layout = {"epoch": 1, "session": 1, "slots": 64, "stride": 64, "rank_offset": 0, "header_bytes": 4096}
    welcome = protocol.Welcome(**layout, arena_bytes=8192, checksum_offset=offset)
    with pytest.raises(ValueError, match="does not hold"):
        Arena(mmap.mmap(-1, 8192), welcome, 64)
