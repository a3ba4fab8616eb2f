"""What stands at a step's record key."""

import torch

from asyncckpt.checkpoints.standing import judge
from asyncckpt.format import keys, limits
from asyncckpt.store.memory import MemoryStore
from tests.counting import CountingStore
from tests.writer import write_checkpoint

RECORD = keys.record_key(10)


def test_a_record_that_becomes_shorter_while_it_is_judged_is_judged_anew_and_not_taken_for_none(monkeypatch):
    """A large damaged one, and a writer that replaces it between the look at its size and the reading of its end."""

    class Replaced(CountingStore):
        def get_into(self, key, start, target):
            store.put(RECORD, [sound])
            super().get_into(key, start, target)

    store = MemoryStore()
    write_checkpoint(store, 10, {"w": torch.ones(8)})
    sound = store.get(RECORD, max_bytes=2**20)
    monkeypatch.setattr(limits, "RECORD_BYTES", len(sound))
    store.put(RECORD, [sound + b" " * 1000])
    standing = judge(Replaced(store), 10)
    assert standing is not None
    assert standing.record is not None


def test_a_record_that_is_removed_while_it_is_judged_is_none(monkeypatch):
    class Removed(CountingStore):
        def get_into(self, key, start, target):
            store.delete([RECORD])
            super().get_into(key, start, target)

    store = MemoryStore()
    store.put(RECORD, [b" " * 1000])
    monkeypatch.setattr(limits, "RECORD_BYTES", 100)
    assert judge(Removed(store), 10) is None
