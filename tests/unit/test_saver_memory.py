"""Where a Saver's restore puts the bytes while it verifies them: the memory that its saves use anyway."""

import pytest
import torch

import asyncckpt
from asyncckpt import Saver, errors


def state_of(value):
    return {"model": {"weight": torch.full((300, 1000), float(value)), "bias": torch.full((7,), float(value))}}


def arenas(saver):
    return [(arena.number, arena.bytes) for arena in saver._launcher._arenas.all()]


def test_a_restore_and_the_first_save_after_it_share_one_arena(tmp_path):
    with Saver(tmp_path) as saver:
        saver.save(1, state_of(1))
    state = state_of(0)
    with Saver(tmp_path) as saver:
        assert saver.restore(state).step == 1
        made = arenas(saver)
        assert len(made) == 1
        saver.save(2, state).result()
        assert arenas(saver) == made
        state["model"]["weight"].zero_()  # the restored tensors are no views of it
        assert saver.restore(state).step == 2
        assert arenas(saver) == made
    assert torch.equal(state["model"]["weight"], state_of(1)["model"]["weight"])


def test_a_restore_while_every_arena_is_in_flight_and_one_that_does_not_fit_take_memory_of_their_own(tmp_path):
    small = {"few": torch.arange(5.0)}
    with Saver(tmp_path) as saver:
        saver.save(1, state_of(1)).result()
    with Saver(tmp_path) as saver:
        saver.save(2, small).result()
        made = arenas(saver)
        state = state_of(0)
        assert saver.restore(state, step=1).step == 1
        assert arenas(saver) == made
        arena, _ = saver._launcher._arenas.take(1)
        assert saver.restore({"few": torch.zeros(5)}, step=2).step == 2
        saver._launcher._arenas.give_back(arena)
    assert torch.equal(state["model"]["weight"], state_of(1)["model"]["weight"])


def test_a_restore_that_fails_and_whose_error_is_kept_leaves_a_saver_that_saves_and_closes(tmp_path):
    with Saver(tmp_path) as saver:
        saver.save(1, state_of(1)).result()
    for path in tmp_path.rglob("*.safetensors*"):
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)
    state = state_of(0)
    with Saver(tmp_path) as saver:
        with pytest.raises(errors.CorruptCheckpointError) as kept:
            saver.restore(state, step=1)
        saver.save(2, state_of(2)).result()
        assert len(arenas(saver)) == 1
    assert kept.value.__traceback__ is not None
    assert not state["model"]["weight"].any()
    assert asyncckpt.Run(tmp_path).latest().step == 2
