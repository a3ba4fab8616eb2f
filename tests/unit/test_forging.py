"""A checkpoint that an enemy signed is read, or refused by an error of the family; `python -m tests.forging` goes on for as long as one likes."""

import json
import random
import warnings

import pytest
import torch

import asyncckpt
from asyncckpt import Run, errors
from asyncckpt.format.digest import hexdigest
from asyncckpt.format.frames import compress
from asyncckpt.state.statefile import read_state, write_state
from tests.forging import CODECS, DAMAGE, URL, Forgery, fresh, roads, state_of, try_seed

SEEDS_OF_A_CODEC = 25


@pytest.fixture(scope="module", params=CODECS)
def made(request):
    return Forgery(request.param)


def test_whatever_an_enemy_signs_is_read_or_refused_by_the_family_and_only_damage_falls_back(made, tmp_path, request):
    first = CODECS.index(request.node.callspec.params["made"])
    seeds = range(first, SEEDS_OF_A_CODEC * len(CODECS), len(CODECS))
    assert [line for seed in seeds for line in try_seed(made, seed, tmp_path)] == []


def outcomes(store, folder):
    """What each road to step 2 raises; "" where it reads."""
    found = {}
    for name, road in roads(store, folder).items():
        try:
            road()
            found[name] = ""
        except errors.CheckpointError as error:
            found[name] = type(error).__name__
    return found


def test_the_forgery_itself_is_sound(made, tmp_path):
    store = made.put(made.record, made.index, made.state)
    assert set(outcomes(store, tmp_path).values()) == {""}


def bits(state):
    return {name: value.clone() for name, value in state["model"].state_dict().items()}


@pytest.mark.parametrize("path", ["step", "optimizer/param_groups/#0/lr", "arrays/scalar", "values/set", "rng/python"])
def test_a_value_that_the_state_file_lacks_is_damage_before_anything_is_overwritten(path, tmp_path):
    made = Forgery("none")
    values = read_state(made.state)
    gone = [name for name in values if name == path or name.startswith(f"{path}/")]
    assert gone
    store = made.put(
        made.record, made.index, write_state({name: one for name, one in values.items() if name != gone[0]})
    )
    state = state_of(9)
    before = bits(state)
    with pytest.raises(errors.CorruptCheckpointError, match="lacks the value"):
        asyncckpt.restore(URL, state, step=2, store=store)
    assert all(torch.equal(value, before[name]) for name, value in bits(state).items())
    with pytest.warns(UserWarning, match="passed over"):
        assert asyncckpt.restore(URL, state, store=store).step == 1


def row_of(index, name):
    return next(row for row in index["tensors"] if row[1] == name)


@pytest.mark.parametrize("size", [2**36, 2**42, 2**52])
def test_sizes_beyond_the_objects_are_damage_and_latest_falls_back(size):
    made = Forgery("none")
    index = made.index
    row = row_of(index, "large")
    shard = index["shards"][row[5][0][2]]
    count = min(-(-size // 2**22), 2**18)
    boxes = [[0], [size], row[5][0][2], 2**16, "00" * 32 * count]
    row[2:] = ["uint8", [size], "plain", [boxes]]
    shard["raw_bytes"] = shard["stored_bytes"] = size + 2**17
    index["unknown"] = "".join(map(hexdigest, (str(number).encode() for number in range(10_000))))
    store = made.put(made.record, index, made.state)
    with pytest.raises(errors.CorruptCheckpointError):
        asyncckpt.load(URL, step=2, store=store)
    with pytest.raises(errors.CorruptCheckpointError):
        Run(URL, store=store).get(2).verify()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert asyncckpt.load(URL, store=store)["step"] == 1


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_state_that_an_optimizer_lacks_is_not_made_on_the_word_of_an_index(codec):
    made = Forgery(codec)
    size = 2**38
    row = row_of(made.index, "state/#3/step")
    shard = made.index["shards"][row[5][0][2]]
    chunk = [[0], [size], row[5][0][2], 2**16, "00" * 32 * (size // 2**22)]
    row[2:] = ["uint8", [size], "plain", [chunk]]
    frames = [shard["frames"][0], *[[2**22, 9]] * (size // 2**22 + 1)] if shard["frames"] else []
    shard["frames"] = frames
    shard["raw_bytes"], shard["stored_bytes"] = map(sum, zip(*frames, strict=True)) if frames else (2 * size, 2 * size)
    made.index["unknown"] = random.Random(0).randbytes(2**18).hex()
    index = compress(json.dumps(made.index).encode())
    store = made.put(made.record, index, made.state)
    with pytest.raises(errors.CorruptCheckpointError):
        asyncckpt.restore(URL, fresh(), step=2, store=store)


def test_errors_of_damage_and_of_news_are_no_others():
    assert not any(issubclass(errors.FormatVersionError, kind) for kind in DAMAGE)
