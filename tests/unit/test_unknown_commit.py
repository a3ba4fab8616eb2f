"""A save whose record was sent and never answered: what the training is told, and what stands there in the end."""

import pytest
import torch

from asyncckpt import KeepLast, Run, Saver, errors
from asyncckpt.format import keys
from asyncckpt.store.memory import MemoryStore
from tests.faulty import FaultyStore

STEP = 2
RECORD = keys.record_key(STEP)


class Silent(FaultyStore):
    """The put of one record has no answer; it arrives when `arrive` says so."""

    def __init__(self, inner):
        super().__init__(inner)
        self.under_way = []

    def put(self, key, data, *, if_absent=False):
        if key == RECORD and not self.under_way:
            self.under_way.append(b"".join(bytes(part) for part in data))
            raise errors.DeadlineExceededError("no answer for ten minutes", key=key)
        super().put(key, data, if_absent=if_absent)

    def arrive(self):
        self.inner.put(RECORD, self.under_way, if_absent=True)


def state_of(step):
    return {"w": torch.full((8,), float(step))}


def test_nothing_is_removed_and_the_late_record_is_a_whole_checkpoint():
    store = Silent(MemoryStore())
    with Saver("memory://unused", store=store, keep=[KeepLast(2)]) as saver:
        saver.save(1, state_of(1)).result(30)
        with pytest.raises(errors.CommitUnknownError, match="may still appear") as raised:
            saver.save(STEP, state_of(STEP)).result(30)
        assert raised.value.step == STEP
        store.arrive()
        latest = Run("memory://unused", store=store).latest()
        assert latest.step == STEP
        latest.verify()
        assert saver.save(STEP, state_of(STEP)).result(30).skipped == "the step exists already"
        with pytest.warns(RuntimeWarning, match="step 2 was skipped"):
            saver.save(3, state_of(3)).result(30)
    assert [checkpoint.step for checkpoint in Run("memory://unused", store=store).checkpoints()] == [STEP, 3]


def test_the_step_may_be_saved_again_before_the_record_arrives():
    store = Silent(MemoryStore())
    with Saver("memory://unused", store=store) as saver:
        with pytest.raises(errors.CommitUnknownError):
            saver.save(STEP, state_of(STEP)).result(30)
        assert not saver.save(STEP, state_of(20)).result(30).skipped
    with pytest.raises(errors.ObjectExistsError):
        store.arrive()
    assert Run("memory://unused", store=store).latest().load()["w"][0] == 20


def test_a_save_that_the_store_refuses_leaves_nothing():
    store = FaultyStore(MemoryStore(), {4}, operations={"put"}, error=lambda: errors.StoreAuthError("no"))
    with Saver("memory://unused", store=store) as saver, pytest.raises(errors.StoreAuthError):
        saver.save(STEP, state_of(STEP)).result(30)
    assert list(store.inner.list()) == []
