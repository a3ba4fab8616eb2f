import dataclasses
import datetime as dt
import enum
import pathlib
import types
from collections import defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from asyncckpt.errors import SnapshotError, StateMismatchError, UnsupportedObjectError, UnsupportedTensorError
from asyncckpt.state.tree import Flattener
from tests.unit.state.pocket import Pocket


class Wrapped(torch.Tensor):
    pass


class WrappedParameter(torch.nn.Parameter):
    pass


def fake():
    with FakeTensorMode():
        return torch.zeros(3)


def quantized():
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


def freed():
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


TENSORS = {
    "meta": lambda: torch.zeros(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    "quantized": quantized,
    "mkldnn": lambda: torch.zeros(3).to_mkldnn(),
    "fake": fake,
    "subclass": lambda: torch.zeros(3).as_subclass(Wrapped),
    "parameter subclass": lambda: WrappedParameter(torch.zeros(3)),
    "parameter of a subclass": lambda: torch.nn.Parameter(torch.zeros(3).as_subclass(Wrapped)),
    "lazy": lambda: torch.nn.LazyLinear(3).weight,
    "lazy buffer": torch.nn.UninitializedBuffer,
    "freed": freed,
    "bits": lambda: torch.zeros(3, dtype=torch.uint8).view(torch.bits8),
    "sub-byte": lambda: torch.empty(3, dtype=torch.uint4),
    "object array": lambda: np.array([{}], dtype=object),
    "text array": lambda: np.array(["x"]),
    "time array": lambda: np.array(["2020-01-01"], dtype="M8[D]"),
    "big-endian array": lambda: np.zeros(3, ">f4"),
    "long double array": lambda: np.zeros(3, np.longdouble),
    "record array": lambda: np.zeros(3, [("a", "f4")]),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_cannot_be_stored_is_named_with_a_way_out(name):
    with pytest.raises(UnsupportedTensorError) as caught:
        Flattener().flatten({"ok": torch.zeros(1), "a": {"b": [1, TENSORS[name]()]}})
    assert caught.value.key == "a/b/#1"
    assert "a/b/#1" in str(caught.value)
    assert ";" in str(caught.value) or "view it as" in str(caught.value)


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


class Saves:
    def state_dict(self):
        return {}


class Both(Saves):
    def load_state_dict(self, state):
        pass


class Nests(Both):
    def state_dict(self):
        return {"inner": Both()}


@dataclasses.dataclass
class Data:
    x: int = 1


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - the kind users have

OBJECTS = {
    "enum": Color.RED,
    "int enum": Level.LOW,
    "str subclass": Text("x"),
    "float subclass": type("Float", (float,), {})(1.0),
    "defaultdict": defaultdict(int),
    "deque": deque([1]),
    "namedtuple": Pair(1, 2),
    "dataclass": Data(),
    "class": Data,
    "class with state_dict": torch.nn.Linear,
    "function": quantized,
    "lambda": lambda: 1,
    "path": pathlib.Path("x"),
    "datetime": dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
    "timedelta": dt.timedelta(1),
    "namespace": types.SimpleNamespace(a=1),
    "range": range(3),
    "frozenset": frozenset({1}),
    "bytearray": bytearray(b"x"),
    "mapping proxy": types.MappingProxyType({"a": 1}),
    "generator": torch.Generator(),
    "numpy generator": np.random.default_rng(0),
    "numpy datetime": np.datetime64("2020-01-01"),
    "long double": np.longdouble(1),
    "numpy text": np.str_("x"),
    "memmap": np.ndarray.__new__(np.memmap, (1,)),
    "masked array": np.ma.zeros(3),
    "set of tuples": {(1, 2)},
    "empty bytes": b"",
    "list with empty bytes": [1, b""],
    "huge integer": 2**2039,
    "list with huge integer": [1, -(2**2039) - 1],
    "mixed list with huge integer": ["x", 2**3000],
    "gives no load_state_dict": Saves(),
    "object inside a state dict": Nests(),
    "storage": torch.zeros(1).untyped_storage(),
    "not implemented": NotImplemented,
    "memory format": torch.channels_last,
}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_that_no_reader_may_load_is_named_with_a_way_out(name):
    with pytest.raises(UnsupportedObjectError) as caught:
        Flattener().flatten({"ok": 1, "a": {"b": [torch.zeros(1), OBJECTS[name]]}})
    assert caught.value.key.startswith("a/b/#1")
    assert "a/b/#1" in str(caught.value)
    assert any(word in str(caught.value) for word in ("store", "give it"))


@pytest.mark.parametrize("key", [True, 1.5, None, (1, 2), b"x", Text("x"), "\ud800"], ids=repr)
def test_a_key_that_is_neither_text_nor_integer_is_refused(key):
    with pytest.raises(UnsupportedObjectError):
        Flattener().flatten({"a": {key: 1}})
    with pytest.raises(UnsupportedObjectError):
        Flattener().flatten({key: 1})


def cyclic():
    loop = {"x": torch.zeros(1)}
    loop["again"] = [loop]
    wide = [torch.zeros(1)]
    wide += [wide, wide]
    deep = torch.zeros(1)
    for _ in range(5000):
        deep = [deep]
    return [loop, wide, deep]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_containers_that_hold_themselves_are_refused(number):
    state, flattener = {"a": {}}, Flattener()
    flattener.flatten(state)
    state["a"] = cyclic()[number]
    with pytest.raises(UnsupportedObjectError, match="holds itself"):
        flattener.flatten(state)


@pytest.mark.parametrize(
    "state", [None, 3, [torch.zeros(1)], torch.nn.Linear(1, 1)], ids=lambda state: type(state).__name__
)
def test_a_state_that_is_no_dict_is_refused(state):
    with pytest.raises(UnsupportedObjectError, match="the state is a dict"):
        Flattener().flatten(state)


def test_a_refusal_leaves_the_flattener_usable():
    state, flattener = {"a": torch.zeros(2), "n": 1}, Flattener()
    first = flattener.flatten(state)
    state["n"] = object()
    with pytest.raises(UnsupportedObjectError):
        flattener.flatten(state)
    state["n"] = 2
    assert flattener.flatten(state).structure == first.structure


def test_a_state_dict_that_raises_is_a_snapshot_error():
    class Broken(Both):
        def state_dict(self):
            raise RuntimeError("no")

    flattener, state = Flattener(), {"a": {"b": Both()}, "t": torch.zeros(1)}
    flattener.flatten(state)
    state["a"]["b"] = Broken()
    with pytest.raises(SnapshotError, match=r"'a/b': .*Broken raised RuntimeError\('no'\); leave it out") as caught:
        flattener.flatten(state)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.key == "a/b"
    state["a"]["b"] = Both()
    flattener.flatten(state)


def test_accelerates_loader_without_a_place_is_refused_with_how_to_give_it_one():
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare(torch.utils.data.DataLoader([1, 2]))
    with pytest.raises(SnapshotError, match=r"'data/loader': .*use_stateful_dataloader=True") as caught:
        Flattener().flatten({"data": {"loader": loader}})
    assert caught.value.key == "data/loader"
    with pytest.raises(StateMismatchError, match=r"data/loader: a DataLoaderShard keeps no place.*leave it out"):
        Pocket.of({"data": {"loader": Both()}}).restore({"data": {"loader": loader}})


def test_a_tensor_that_becomes_unsupported_is_seen_by_a_warm_flattener():
    state, flattener = {"a": torch.zeros(2, 2), "b": torch.zeros(1)}, Flattener()
    flattener.flatten(state)
    state["a"] = torch.zeros(2, 2).to_sparse()
    with pytest.raises(UnsupportedTensorError):
        flattener.flatten(state)
    state["a"] = torch.zeros(2, 2, device="meta")
    with pytest.raises(UnsupportedTensorError):
        flattener.flatten(state)


def test_a_tensor_inside_a_transform_is_refused():
    def inside(tensor):
        with pytest.raises(UnsupportedTensorError):
            Flattener().flatten({"a": tensor})
        return tensor

    torch.func.vmap(inside)(torch.zeros(3))


def test_flattening_changes_nothing():
    module = torch.nn.Linear(2, 2)
    before = {name: (id(tensor), tensor._version) for name, tensor in module.state_dict(keep_vars=True).items()}
    Pocket.of({"m": module})
    assert {name: (id(tensor), tensor._version) for name, tensor in module.state_dict(keep_vars=True).items()} == before


def test_a_torch_loader_is_refused_with_what_to_use_instead():
    loader = torch.utils.data.DataLoader([1, 2])
    with pytest.raises(UnsupportedObjectError, match=r"leave it out of the state.*StatefulDataLoader") as caught:
        Flattener().flatten({"loader": loader})
    assert caught.value.key == "loader"
