import threading
from itertools import pairwise

import pytest
import torch

from asyncckpt import errors
from asyncckpt.engine import ranges
from asyncckpt.engine.catalog import read_checkpoint
from asyncckpt.engine.fetch import anonymous_map, default_threads, fetch
from asyncckpt.engine.ranges import ALIGN_BYTES, GAP_BYTES, REQUEST_BYTES, plan_fetch
from asyncckpt.store.base import Store
from asyncckpt.store.memory import MemoryStore
from tests.counting import CountingStore
from tests.faulty import FaultyStore
from tests.writer import tensor_bytes, write_checkpoint

STEP = 7
CODECS = ["planes", "zstd", "none"]


def mixed_state() -> dict[str, torch.Tensor]:
    """Large and small, cut and whole, of several element sizes, empty and 0-dim."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    state = {f"small{n}": normal(n + 1, 33) for n in range(40)}
    state |= {
        "large": normal(700, 900),
        "cut": normal(1, 3000, 1100).to(torch.float64),
        "half": normal(90_001).to(torch.bfloat16),
        "counts": torch.arange(70_000),
        "bytes": torch.arange(100, dtype=torch.uint8),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(3.5),
    }
    return state


def written(state: dict[str, torch.Tensor], **options) -> tuple[CountingStore, dict[str, bytes], object]:
    store = CountingStore(MemoryStore())
    write_checkpoint(store, STEP, {"m": state}, **options)
    _, index = read_checkpoint(store, STEP)
    store.read_bytes, store.gets, store.keys = 0, store.gets.__class__(), []
    return store, {f"m/{name}": tensor_bytes(tensor) for name, tensor in state.items()}, index


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("threads", [1, 5])
def test_all_bytes_come_back_exactly(codec, threads):
    store, expected, index = written(mixed_state(), codec=codec, shard_bytes=8 * 2**20)
    fetched = fetch(store, index, expected, threads=threads)
    assert {name: bytes(view) for name, view in fetched.tensors.items()} == expected
    assert fetched.requested_bytes == store.read_bytes


@pytest.mark.parametrize("codec", CODECS)
def test_only_the_bytes_asked_for_are_read(codec):
    store, expected, index = written(mixed_state(), codec=codec, shard_bytes=8 * 2**20)
    fetched = fetch(store, index, ["m/half"])
    assert bytes(fetched.tensors["m/half"]) == expected["m/half"]
    assert store.read_bytes <= len(expected["m/half"]) + 1000
    assert store.gets["get_into"] == 1


def test_a_block_shared_by_many_small_tensors_is_read_once():
    state = {f"t{n}": torch.randn(100) for n in range(500)}
    store, expected, index = written(state)
    fetched = fetch(store, index, expected)
    assert {name: bytes(view) for name, view in fetched.tensors.items()} == expected
    assert store.gets["get_into"] == 1


@pytest.mark.parametrize("codec", CODECS)
def test_requests_are_bounded_and_neighbours_share_one(codec):
    state = {f"t{n}": torch.randn(300_000) for n in range(12)} | {f"s{n}": torch.randn(20_000) for n in range(50)}
    _, expected, index = written(state, codec=codec, shard_bytes=2**30)
    plan = plan_fetch(index, expected)
    assert all(request.stored_bytes <= REQUEST_BYTES for request in plan.requests)
    assert len(plan.requests) < len(state)
    ranges = sorted((request.key, request.offset, request.offset + request.stored_bytes) for request in plan.requests)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ranges)), "nothing is read twice"


def test_a_gap_is_read_only_if_it_is_small():
    state = {"a": torch.randn(20_000), "hole": torch.randn(1_000_000), "b": torch.randn(20_000)}
    _, _, index = written(state, codec="none", shard_bytes=2**30)
    assert len(plan_fetch(index, ["m/a", "m/b"]).requests) == 2
    state["hole"] = torch.randn(GAP_BYTES // 4 - 100)
    _, _, index = written(state, codec="none", shard_bytes=2**30)
    assert len(plan_fetch(index, ["m/a", "m/b"]).requests) == 1


def test_every_tensor_begins_at_an_aligned_address():
    _, expected, index = written(mixed_state())
    assert all(start % ALIGN_BYTES == 0 for start, _ in plan_fetch(index, expected).tensors.values())


def test_large_tensors_of_codec_none_are_read_without_a_copy():
    _, _, index = written({"t": torch.randn(1_500_000)}, codec="none")
    assert all(request.direct for request in plan_fetch(index, ["m/t"]).requests)


def test_neighbours_of_codec_none_travel_in_one_request_and_are_read_without_a_copy():
    state = {f"t{n:02}": torch.randn(600_000) for n in range(30)}  # 2.4 MB each: three to a request
    store, expected, index = written(state, codec="none", shard_bytes=2**30)
    plan = plan_fetch(index, reversed(list(expected)))
    assert len(plan.requests) == 10
    assert all(request.direct for request in plan.requests)
    fetched = fetch(store, index, expected)
    assert {name: bytes(view) for name, view in fetched.tensors.items()} == expected
    assert store.gets["get_into"] == 10


@pytest.mark.parametrize("codec", CODECS)
def test_some_tensors_may_have_places_of_their_own(codec):
    store, expected, index = written(mixed_state(), codec=codec, shard_bytes=8 * 2**20)
    own = ["m/cut", "m/large", "m/small7", "m/scalar"]
    places = {name: memoryview(bytearray(len(expected[name]))) for name in own}
    fetched = fetch(store, index, expected, places=places)
    assert {name: bytes(view) for name, view in fetched.tensors.items()} == expected
    assert {name: bytes(place) for name, place in places.items()} == {name: expected[name] for name in own}


def test_tied_names_share_one_view_and_one_read():
    shared = torch.randn(50_000)
    store, _, index = written({"a": shared, "b": shared})
    fetched = fetch(store, index, ["m/a", "m/b"])
    assert bytes(fetched.tensors["m/b"]) == bytes(fetched.tensors["m/a"]) == tensor_bytes(shared)
    fetched.tensors["m/a"][0] ^= 1
    assert fetched.tensors["m/b"][0] == fetched.tensors["m/a"][0]
    assert store.gets["get_into"] == 1


def test_the_target_may_be_given():
    memory = bytearray(2**22)
    store, expected, index = written(mixed_state())
    fetched = fetch(store, index, ["m/large"], into=lambda size: memoryview(memory)[:size])
    assert memory[: len(expected["m/large"])] == expected["m/large"] == bytes(fetched.tensors["m/large"])


def test_nothing_asked_for_reads_nothing():
    store, _, index = written(mixed_state())
    assert fetch(store, index, []).tensors == {}
    assert store.read_bytes == 0


def test_a_name_that_the_index_lacks_raises():
    store, _, index = written({"t": torch.ones(3)})
    with pytest.raises(errors.RecordError, match="nope"):
        fetch(store, index, ["m/nope"])


def flip(store: Store, key: str, position: int) -> None:
    data = bytearray(store.get(key, max_bytes=2**30))
    data[position] ^= 0x10
    store.delete([key])
    store.put(key, [data])


@pytest.mark.parametrize("threads", [1, 4])
def test_a_flipped_byte_names_shard_and_tensor(threads):
    store, _, index = written({"t": torch.randn(300_000), "u": torch.randn(30)}, codec="none")
    key = index.shards[0].key
    flip(store.inner, key, index.tensors["m/t"].chunks[0].raw_offset + 77_777)
    with pytest.raises(errors.DigestMismatchError, match="m/t") as caught:
        fetch(store, index, ["m/t", "m/u"], threads=threads)
    assert caught.value.key == key
    assert no_fetch_threads()
    fetch(store, index, ["m/u"])


@pytest.mark.parametrize("codec", ["planes", "zstd"])
def test_a_flipped_byte_in_a_frame_is_corrupt(codec):
    store, expected, index = written({"t": torch.randn(300_000)}, codec=codec)
    key = index.shards[0].key
    flip(store.inner, key, index.shards[0].stored_bytes // 2)
    with pytest.raises(errors.CorruptCheckpointError) as caught:
        fetch(store, index, expected)
    assert caught.value.key == key


@pytest.mark.parametrize("codec", CODECS)
def test_a_missing_shard_is_named(codec):
    store, expected, index = written(mixed_state(), codec=codec, shard_bytes=8 * 2**20)
    gone = index.shards[-1].key
    store.inner.delete([gone])
    with pytest.raises(errors.MissingShardError) as caught:
        fetch(store, index, expected)
    assert caught.value.key == gone
    assert isinstance(caught.value.__cause__, errors.ObjectNotFoundError)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_truncated_shard_is_corrupt(codec, left):
    store, expected, index = written({"t": torch.randn(300_000)}, codec=codec)
    key = index.shards[0].key
    data = store.inner.get(key, max_bytes=2**30)
    store.inner.put(key, [data[: int(len(data) * left)]])
    with pytest.raises(errors.CorruptCheckpointError) as caught:
        fetch(store, index, expected)
    assert caught.value.key == key


def test_swapped_shards_are_noticed():
    state = {"a": torch.randn(300_000), "b": torch.randn(300_000)}
    store, expected, index = written(state, codec="none", shard_bytes=1_200_000)
    first, second = (shard.key for shard in index.shards)
    one, other = (store.inner.get(key, max_bytes=2**30) for key in (first, second))
    store.inner.put(first, [other])
    store.inner.put(second, [one])
    with pytest.raises(errors.DigestMismatchError):
        fetch(store, index, expected)


def test_the_first_error_ends_the_others():
    store, expected, index = written({f"t{n}": torch.randn(300_000) for n in range(60)}, codec="none")
    faulty = FaultyStore(store, {3}, error=lambda: errors.StoreAuthError("no"), operations={"get_into"})
    with pytest.raises(errors.StoreAuthError):
        fetch(faulty, index, expected, threads=2)
    assert len(faulty.calls) <= 4
    assert no_fetch_threads()


def test_an_interrupted_caller_leaves_no_thread():
    store, expected, index = written({f"t{n}": torch.randn(30_000) for n in range(60)}, codec="none")
    holding, held = threading.Event(), threading.Event()

    class SlowStore(CountingStore):
        def get_into(self, key, start, target):
            held.set()
            holding.wait()
            super().get_into(key, start, target)

    def interrupt(done, total):
        assert held.wait(10)
        holding.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(SlowStore(store), index, expected, threads=3, progress=interrupt)
    assert no_fetch_threads()


def test_without_threads_the_caller_does_the_work(monkeypatch):
    store, expected, index = written(mixed_state())

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    fetched = fetch(store, index, expected)
    assert {name: bytes(view) for name, view in fetched.tensors.items()} == expected


def test_progress_comes_on_the_calling_thread_and_ends_at_the_total():
    store, expected, index = written(mixed_state())
    seen = []
    fetch(store, index, expected, progress=lambda done, total: seen.append((threading.get_ident(), done, total)))
    total = sum(map(len, expected.values()))
    assert {thread for thread, _, _ in seen} == {threading.get_ident()}
    assert seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_remote_stores_get_more_connections():
    store = MemoryStore()
    local = default_threads(store)
    store.min_part_bytes = 5 * 2**20
    assert default_threads(store) >= max(16, local)


def test_an_empty_map_can_be_made():
    assert len(anonymous_map(0)) == 0


def no_fetch_threads() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("asyncckpt-fetch")]


def test_many_small_tensors_cost_a_look_each(monkeypatch):
    """Not one a block of their request, for each block: 20,000 of them took seconds."""
    count = 1500
    store, expected, index = written({f"t{n}": torch.full((30,), float(n)) for n in range(count)}, codec="none")
    looks = []
    whole = ranges._as_stored
    monkeypatch.setattr(ranges, "_as_stored", lambda block: looks.append(block) or whole(block))
    fetched = fetch(store, index, expected)
    assert {name: bytes(view) for name, view in fetched.tensors.items()} == expected
    assert len(looks) < 5 * count
