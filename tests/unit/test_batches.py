"""`saver.batches(loader)`: a resumed run draws the numbers that the uninterrupted one drew."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import asyncckpt


class Noisy(Dataset):
    """Draws in `__getitem__`, as augmentation does."""

    def __init__(self, *, augment):
        self.augment = augment

    def __len__(self):
        return 24

    def __getitem__(self, at):
        return torch.arange(8.0) + at + (torch.rand(8) if self.augment else 0)


class Order:
    """A sampler that knows its place; a batch counts when it was trained on."""

    def __init__(self):
        self.epoch = self.done = 0

    def __len__(self):
        return 24

    def __iter__(self):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter(order[self.done :])

    def trained(self, count):
        self.done += count
        if self.done == 24:
            self.epoch, self.done = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.epoch, self.done = state["epoch"], state["done"]


def losses(url, seed, *, save_at=None, until=18, augment=True, workers=0, plain=False):
    """Six batches an epoch, with dropout. `plain`: shuffled by the loader itself, which has no place."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    order = Order()
    chosen = {"shuffle": True} if plain else {"sampler": order}
    loader = DataLoader(Noisy(augment=augment), batch_size=4, num_workers=workers, **chosen)
    state = {"model": model, "optimizer": optimizer, "order": order, "rng": asyncckpt.RNG()}
    found = {}
    with asyncckpt.Saver(url, engine="inline") as saver:
        restored = saver.restore(state)
        step = restored.step if restored else 0
        while step < until:
            for batch in saver.batches(loader):
                loss = model(batch).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                order.trained(len(batch))
                found[step] = loss.item().hex()
                if step == save_at:
                    saver.save(step, state)
                    return found
    return found


@pytest.mark.parametrize("save_at", [4, 6, 9])
@pytest.mark.parametrize("augment", [False, True])
def test_a_run_resumed_within_an_epoch_or_between_two_draws_the_same_numbers(tmp_path, save_at, augment):
    whole = losses(tmp_path / "whole", 1, augment=augment)
    losses(tmp_path / "halves", 1, save_at=save_at, augment=augment)
    rest = losses(tmp_path / "halves", 99, augment=augment)
    assert rest == {step: loss for step, loss in whole.items() if step > save_at}


@pytest.mark.parametrize("augment", [False, True])
def test_a_run_resumed_between_two_epochs_shuffles_as_the_uninterrupted_one(tmp_path, augment):
    """The loader has no place of its own: an epoch begins anew, in the order that the saved numbers give."""
    whole = losses(tmp_path / "whole", 1, augment=augment, plain=True)
    losses(tmp_path / "halves", 1, save_at=12, augment=augment, plain=True)
    rest = losses(tmp_path / "halves", 99, augment=augment, plain=True)
    assert rest == {step: loss for step, loss in whole.items() if step > 12}


@pytest.mark.slow
def test_workers_that_draw_nothing_change_nothing(tmp_path):
    whole = losses(tmp_path / "whole", 1, until=8, augment=False, workers=2)
    losses(tmp_path / "halves", 1, save_at=4, augment=False, workers=2)
    rest = losses(tmp_path / "halves", 99, until=8, augment=False, workers=2)
    assert rest == {step: whole[step] for step in rest}
    assert set(rest) >= set(range(5, 9))


def test_without_it_the_numbers_differ_so_the_test_above_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(asyncckpt.Saver, "batches", lambda _, loader: iter(loader))
    whole = losses(tmp_path / "whole", 1, until=6)
    losses(tmp_path / "halves", 1, save_at=4, until=6)
    rest = losses(tmp_path / "halves", 99, until=6)
    assert all(rest[step] != whole[step] for step in (5, 6))


def test_the_numbers_go_back_once_and_only_after_a_restore(tmp_path):
    loader = DataLoader([1, 2, 3])
    state = {"deep": [asyncckpt.RNG()], "w": torch.ones(1)}
    with asyncckpt.Saver(tmp_path, engine="inline") as saver:
        torch.manual_seed(1)
        assert saver.restore(state) is None
        assert [int(one) for one in saver.batches(loader)] == [1, 2, 3]
        under_way = saver.batches(loader)
        assert int(next(under_way)) == 1
        saver.save(1, state).result()
        want = torch.rand(2).tolist()
        saver.restore({"w": torch.zeros(1)})
        before = torch.get_rng_state()
        saver.batches([1])
        assert torch.equal(torch.get_rng_state(), before)
        saver.restore(state)
        torch.rand(5)
        batches = saver.batches(loader)
        assert torch.rand(2).tolist() == want
        assert len(list(batches)) == 3
        torch.manual_seed(3)
        want = torch.rand(1)
        torch.manual_seed(3)
        saver.batches([1])
        assert torch.equal(torch.rand(1), want)


def test_a_loader_whose_iter_is_a_generator_is_warned_of_after_a_restore_alone(tmp_path):
    class Lazy:
        def __iter__(self):
            yield from (1, 2)

    state = {"rng": asyncckpt.RNG()}
    with asyncckpt.Saver(tmp_path, engine="inline") as saver, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(saver.batches(Lazy())) == [1, 2]
        saver.save(1, state).result()
        saver.restore(state)
        assert list(saver.batches(Lazy())) == [1, 2], "saved between two epochs, so both runs draw behind it"
        under_way = saver.batches(Lazy())
        assert next(under_way) == 1
        saver.save(2, state).result()
        saver.restore(state)
        with pytest.warns(UserWarning, match="Lazy is a generator"):
            assert list(saver.batches(Lazy())) == [1, 2]
        assert list(itertools.chain(saver.batches(Lazy()), saver.batches([3]))) == [1, 2, 3]


def test_accelerates_loader_is_warned_of(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.data_loader.prepare_data_loader(DataLoader([1, 2]), num_processes=1, process_index=0)
    with asyncckpt.Saver(tmp_path, engine="inline") as saver:
        saver.save(1, {"rng": asyncckpt.RNG()}).result()
        saver.restore({"rng": asyncckpt.RNG()})
        with pytest.warns(UserWarning, match="generator"):
            assert len(list(saver.batches(loader))) == 2
