"""What each of several ranks has of its own is refused before anything starts; what is the same everywhere passes."""

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

import asyncckpt
from asyncckpt import RNG, Replicated
from asyncckpt.errors import UnsupportedObjectError
from asyncckpt.state import replicas
from asyncckpt.state.ranks import rank, world_size
from asyncckpt.state.tree import Flattener
from tests.unit.state.pocket import Pocket, snapshot


class Kept:
    """Anything with a state dict."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Stream(Kept, IterableDataset):
    def __iter__(self):
        return iter(())


class Positioned(Kept, DataLoader):
    def __init__(self):
        DataLoader.__init__(self, [1])
        object.__setattr__(self, "value", 0)


Node = type("Node", (Kept,), {"__module__": "torchdata.nodes.base_node"})
Shard = type("DataLoaderShard", (Kept,), {"__module__": "accelerate.data_loader"})
Foreign = type("IterableDataset", (Kept,), {"__module__": "datasets.iterable_dataset"})

OWN = [RNG, Stream, Positioned, Node, Shard, Foreign, lambda: RandomSampler([1]), lambda: BatchSampler([1], 1, False)]


@pytest.fixture
def ranks(monkeypatch):
    """As a launcher says it, before torch.distributed is initialised."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    replicas._warned.clear()


@pytest.mark.parametrize("said", ["", "1", "0", "x", "-3", None])
def test_one_rank_is_what_no_launcher_says_otherwise(monkeypatch, said):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if said is not None:
        monkeypatch.setenv("WORLD_SIZE", said)
    assert (rank(), world_size()) == (0, 1)
    replicas.check({"rng": RNG()}, "save")


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("make", OWN, ids=range(len(OWN)))
def test_what_each_rank_has_of_its_own_is_refused_anywhere_and_nothing_is_called(tmp_path, make, monkeypatch):
    thing = make()
    if hasattr(type(thing), "state_dict"):
        monkeypatch.setattr(type(thing), "state_dict", None)
    states = {
        "x": {"x": thing},
        "a/#1/b": {"a": [1, {"b": thing}]},
        "a/#0": {"a": OrderedDict({0: thing})},
        "t%2Fu/#0": {"t/u": (thing,)},
    }
    with asyncckpt.Saver(tmp_path) as saver:
        for path, state in states.items():
            for call in (
                lambda state=state: saver.save(1, state),
                lambda state=state: saver.prepare(state),
                lambda state=state: saver.restore(state),
                lambda state=state: asyncckpt.restore(tmp_path, state),
            ):
                with pytest.raises(UnsupportedObjectError, match=r"Replicated.*end the others too") as raised:
                    call()
                assert raised.value.key == path
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("ranks")
def test_modules_optimizers_schedulers_and_scalers_pass_in_silence():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    state = {"m": model, "o": [optimizer], "s": plateau, "g": torch.amp.GradScaler("cpu"), "x": {"n": 1, "t": {1, 2}}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replicas.check(state, "save")
        replicas.check({"k": Replicated(Kept()), "r": Replicated({"deep": [RNG()]})}, "restore")


@pytest.mark.usefixtures("ranks")
def test_any_other_object_passes_with_one_warning():
    state = {"a": Kept(), "b": [Kept()]}
    with pytest.warns(UserWarning, match="rank 0's 'a', 'b/#0' is stored for all 4 ranks") as warned:
        replicas.check(state, "save")
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replicas.check(state, "save")


@pytest.mark.parametrize(
    "make",
    [
        Kept,
        lambda n: nn.Linear(2, n),
        lambda n: {"a": torch.full((2,), float(n)), "n": n},
        lambda n: [n, Kept(n)],
        lambda n: n,
    ],
    ids=range(5),
)
def test_replicated_leaves_no_trace_both_ways(make):
    bare, wrapped = (
        Pocket.of({"x": make(3), "in": [make(3)]}),
        Pocket.of({"x": Replicated(make(3)), "in": [Replicated(make(3))]}),
    )
    assert wrapped.tree == bare.tree
    assert wrapped.values == bare.values
    assert list(wrapped.specs) == list(bare.specs)
    torch.manual_seed(0)
    for pocket, wrap in ((wrapped, lambda x: x), (bare, Replicated)):
        held = make(3)
        target = {"x": wrap(held), "in": [wrap(make(3))]}
        pocket.restore(target)
        value = target["x"].value if wrap is Replicated else target["x"]
        assert type(value) is type(held)
        if not isinstance(held, int):
            assert value is held
        again = Pocket.of(target)
        assert (again.tree, again.values) == (bare.tree, bare.values)


def test_replicated_values_are_replaced_inside_their_wrapper():
    target = {"n": Replicated(0), "m": Replicated(nn.Linear(1, 1))}
    source = {"n": 7, "m": nn.Linear(1, 1)}
    Pocket.of(source).restore(target)
    assert target["n"] == Replicated(7)
    assert snapshot(target["m"].value.state_dict()) == snapshot(source["m"].state_dict())


@pytest.mark.usefixtures("ranks")
def test_a_state_that_holds_itself_is_left_to_the_walk():
    state = {"a": {}}
    state["a"]["again"] = state["a"]
    replicas.check(state, "save")
    with pytest.raises(UnsupportedObjectError, match="holds itself"):
        Flattener().flatten(state)
