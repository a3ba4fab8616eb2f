import gc
import itertools
import weakref
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.errors import CorruptCheckpointError, UnsupportedTensorError
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.state.dtypes import BY_NAME
from asyncckpt.state.tree import Flattener, unflatten
from tests.unit.state.pocket import Pocket, raw, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
NAN_PAYLOADS = 0x7FC12345


def filled(dtype, *shape):
    """Random bytes as a tensor of any dtype; bools are 0 or 1."""
    count = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


SHAPES = {
    "plain": lambda dtype: filled(dtype, 3, 4),
    "0-dim": lambda dtype: filled(dtype, 1)[0],
    "empty": lambda dtype: filled(dtype, 0, 3),
    "non-contiguous": lambda dtype: filled(dtype, 3, 4).t(),
    "view": lambda dtype: filled(dtype, 5, 6)[1:4, 2:4],
    "expanded": lambda dtype: filled(dtype, 3, 1).expand(3, 5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_a_tensor_of_every_dtype_and_layout_comes_back_bit_for_bit(name, shape):
    tensor = SHAPES[shape](BY_NAME[name])
    pocket = Pocket.of({"t": tensor})
    assert snapshot(pocket.load()["t"]) == snapshot(tensor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_a_tensor_of_every_dtype_and_layout_is_restored_in_place(name, shape):
    tensor = SHAPES[shape](BY_NAME[name])
    before = snapshot(tensor)
    pocket = Pocket.of({"t": tensor})
    target = SHAPES[shape](BY_NAME[name])
    pocket.restore({"t": target})
    assert snapshot(target) == before


def test_every_stored_dtype_is_a_dtype_of_this_torch():
    assert set(BY_NAME) == set(DTYPES)


@pytest.mark.parametrize("name", ["complex32", "complex64", "complex128"])
def test_conj_and_neg_bits_are_resolved(name):
    tensor = filled(BY_NAME[name], 2, 3)
    conjugate, negative = tensor.conj(), tensor.conj().imag
    flat = Flattener().flatten({"conj": conjugate, "neg": negative, "plain": tensor})
    assert not any(one.is_conj() or one.is_neg() for one in flat.tensors)
    pocket = Pocket.of({"conj": conjugate, "neg": negative, "plain": tensor})
    loaded = pocket.load()
    assert raw(loaded["conj"]) == raw(conjugate.resolve_conj())
    assert raw(loaded["neg"]) == raw(negative.resolve_neg())
    assert raw(loaded["plain"]) == raw(tensor)


def test_nan_payloads_survive():
    tensor = torch.tensor([NAN_PAYLOADS, -NAN_PAYLOADS], dtype=torch.int32).view(torch.float32)
    assert raw(Pocket.of({"t": tensor}).load()["t"]) == raw(tensor)


VALUES = [
    *(None, True, False, 0, -1, 2**63, -(2**64), 2**2039 - 1, -(2**2039), 1.5, -0.0, float("inf"), 3 - 4j),
    *("", "é\0", "\ud800", b"\x00\xff", "x" * 70000, b"x" * 70000),
    *([], [1, 2.0, None, "x"], (), (1, True), (b"x", 2j), set(), {1, "a", None}),
    *(torch.Size([1, 2]), torch.float8_e4m3fn, torch.device("cpu"), torch.device("cuda", 1)),
    *(np.float32(1.1), np.int64(-3), np.bool_(True), np.complex64(1 + 2j), np.float16("nan"), np.uint64(2**64 - 1)),
    *({}, {"a": {}}, OrderedDict(b=1, a=2), Counter({30: 1, 80: 2}), [[1], (2, [3, {}])], ((), ((),))),
    *({"#": 1, "%": 2, "/": 3, "@": 4, "": 5, 0: 6, -7: 7, "__metadata__": 8, "0": 9, "#0": 10},),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:40])
def test_a_value_comes_back_with_its_exact_type(value):
    assert snapshot(Pocket.of({"v": value}).load()) == snapshot({"v": value})


def test_nan_comes_back():
    assert Pocket.of({"v": float("nan")}).load()["v"] != Pocket.of({"v": 0.0}).load()["v"]


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i8", "u8", "f2", "f4", "f8", "c8", "c16"])
def test_an_array_comes_back_as_an_array(dtype):
    array = np.arange(6).astype(dtype).reshape(2, 3)[:, ::-1]
    loaded = Pocket.of({"a": array, "scalar": np.zeros((), dtype)}).load()
    assert isinstance(loaded["a"], np.ndarray)
    assert loaded["a"].dtype == array.dtype
    assert loaded["a"].tolist() == array.tolist()
    assert loaded["scalar"].shape == ()


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(min_size=1)
)
KEYS = st.text(st.characters(exclude_categories=["Cs"])) | st.integers(-(10**6), 10**6)
TENSORS = st.builds(
    lambda shape: torch.arange(float(np.prod(shape))).reshape(shape), st.lists(st.integers(0, 3), max_size=3)
)
TREES = st.recursive(
    SCALARS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=5))
def test_any_nested_state_comes_back(state):
    flattener = Flattener()
    first, second = flattener.flatten(state), flattener.flatten(state)
    assert first.structure is second.structure
    assert snapshot(Pocket.of(state, flattener).load()) == snapshot(state)


def model(width=4, layers=2):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))


def trained(kind=torch.optim.AdamW, **options):
    module = model()
    optimizer = kind(module.parameters(), lr=0.1, **options)
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return module, optimizer


def names(flat):
    return [flat.structure.path(at) for at in range(len(flat.tensors))]


def test_a_modules_names_are_its_state_dict_keys():
    flat = Flattener().flatten({"model": model()})
    assert names(flat) == [f"model/{name}" for name in model().state_dict()]
    assert [group.key for group in flat.structure.groups] == ["model"]


def test_a_bare_tensor_belongs_to_the_group_state():
    flat = Flattener().flatten({"w": torch.zeros(1), "x": {"w": torch.zeros(2)}})
    assert [(group.key, group.slug) for group in flat.structure.groups] == [(None, "state"), ("x", "x")]
    assert names(flat) == ["w", "x/w"]


def test_the_structure_stays_the_same_object_while_values_and_fresh_tensors_change():
    module, optimizer = trained()
    state = {"m": module, "o": optimizer, "step": 1, "losses": [1.0], "rng": torch.get_rng_state(), "a": np.zeros(3)}
    flattener = Flattener()
    first = flattener.flatten(state)
    optimizer.param_groups[0]["lr"] = 0.5
    state["losses"].append(2.0)
    state |= {"step": 2, "rng": torch.get_rng_state(), "a": np.ones(3)}
    second = flattener.flatten(state)
    assert second.structure is first.structure
    assert second.values["o/param_groups/#0/lr"] == 0.5
    assert second.values["losses"] == [1.0, 2.0]
    assert first.values["losses"] == [1.0]
    assert second.tensors[names(second).index("a")].tolist() == [1.0, 1.0, 1.0]


def changes():
    def data(state):
        state["m"][0].weight.data = torch.zeros(5, 5)

    def dtype(state):
        state["m"][0].weight.data = torch.zeros(4, 4, dtype=torch.bfloat16)

    def layer(state):
        state["m"].append(torch.nn.Linear(1, 1))

    def renamed(state):
        state["n"] = state.pop("m")

    def buffer(state):
        state["m"][0].register_buffer("b", torch.zeros(1))

    def persistent(state):
        state["m"][0].register_buffer("n", torch.zeros(1), persistent=True)

    def kind(state):
        state["v"] = torch.zeros(1)

    def grown(state):
        state["l"].append(torch.zeros(1))

    def container(state):
        state["l"] = tuple(state["l"])

    def ordered(state):
        state["d"] = OrderedDict(state["d"])

    def element(state):
        state["values"][0] = [1]

    def array(state):
        state["v"] = np.zeros(1)

    def tied(state):
        state["m"][0].weight = state["m"][1].weight

    found = [data, dtype, layer, renamed, buffer, persistent, kind, grown, container, ordered, element, array, tied]
    return {change.__name__: change for change in found}


@pytest.mark.parametrize("change", changes())
def test_every_structural_change_is_seen(change):
    module = model()
    module[0].register_buffer("n", torch.zeros(1), persistent=False)
    tensor = torch.zeros(1)
    state = {
        "m": module,
        "v": 1,
        "l": [tensor],
        "d": {"x": 1},
        "values": [1, 2],
        "o": torch.optim.SGD(module.parameters()),
    }
    flattener = Flattener()
    before = flattener.flatten(state)
    changes()[change](state)
    after = flattener.flatten(state)
    assert after.structure is not before.structure
    assert after.structure == Flattener().flatten(state).structure
    assert snapshot(Pocket.of(state, flattener).load()) == snapshot(Pocket.of(state).load())


def test_tied_tensors_are_stored_once_and_named_twice():
    module = model()
    module[1].weight = module[0].weight
    view = module[0].weight.detach()
    flat = Flattener().flatten({"m": module, "v": view, "part": view[0]})
    assert names(flat) == ["m/0.weight", "m/0.bias", "m/1.bias", "part"]
    assert [(flat.structure.groups[g].path(n), at) for g, n, at in flat.structure.aliases] == [
        ("m/1.weight", 0),
        ("v", 0),
    ]


def test_other_views_of_the_same_memory_are_not_tied():
    base = torch.arange(12)
    state = {"flat": base, "a": base.view(3, 4), "b": base.view(4, 3).t(), "c": base[:6], "d": base.view(torch.float64)}
    flat = Flattener().flatten(state)
    assert flat.structure.aliases == ()
    assert snapshot(Pocket.of(state).load()) == snapshot(state)


def test_empty_tensors_are_not_tied_to_each_other():
    state = {"a": torch.empty(0), "b": torch.empty(0)}
    assert Flattener().flatten(state).structure.aliases == ()


def test_a_tie_that_is_cut_through_data_is_seen():
    left = torch.nn.Parameter(torch.zeros(3))
    right = torch.nn.Parameter(left.data)
    state, flattener = {"left": left, "right": right}, Flattener()
    assert len(flattener.flatten(state).tensors) == 1
    right.data = torch.ones(3)
    assert len(flattener.flatten(state).tensors) == 2
    assert Pocket.of(state, flattener).load()["right"].tolist() == [1, 1, 1]


def test_what_only_an_optimizer_changes_is_overlappable():
    module, optimizer = trained()
    module.register_buffer("mean", torch.zeros(1))
    ema = model()
    state = {"m": module, "o": optimizer, "ema": ema, "t": torch.zeros(1), "a": np.zeros(1)}
    flat = Flattener().flatten(state)
    assert flat.has_optimizer
    overlapped = {name for name, flag in zip(names(flat), flat.overlappable, strict=True) if flag}
    parameters = {f"m/{name}" for name, _ in module.named_parameters()}
    moments = {f"o/state/#{at}/{key}" for at in range(4) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert overlapped == parameters | moments


def test_a_learning_rate_that_is_a_tensor_is_not_overlappable():
    module = model()
    flat = Flattener().flatten({"o": torch.optim.SGD(module.parameters(), lr=torch.tensor(0.1))})
    assert names(flat) == ["o/param_groups/#0/lr"]
    assert flat.overlappable == (False,)


def test_nothing_is_overlappable_without_an_optimizer_or_in_inference_mode():
    module = model()
    assert not any(Flattener().flatten({"m": module}).overlappable)
    with torch.inference_mode():
        frozen = torch.zeros(3)
    optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)])
    optimizer.param_groups[0]["params"].append(frozen)
    assert not any(Flattener().flatten({"w": frozen, "o": optimizer}).overlappable)


def test_overlap_follows_the_optimizers_parameters():
    module = model()
    other = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([*module.parameters()])
    state, flattener = {"m": module, "other": other, "o": optimizer}, Flattener()
    assert flattener.flatten(state).overlappable == (True,) * 4 + (False,)
    optimizer.param_groups[0]["params"][0] = other
    assert flattener.flatten(state).overlappable == (False, True, True, True, True)


def test_a_module_whose_state_dict_detaches_is_overlapped_all_the_same():
    class Detached(torch.nn.Linear):
        def state_dict(self):
            return super().state_dict()

    module = Detached(2, 2)
    state, flattener = {"m": module, "o": torch.optim.SGD(module.parameters())}, Flattener()
    first, second = flattener.flatten(state), flattener.flatten(state)
    assert first.overlappable == second.overlappable == (True, True)
    assert first.structure is second.structure


def test_new_optimizer_state_tensors_are_bound_anew():
    module, optimizer = trained()
    state, flattener = {"m": module, "o": optimizer}, Flattener()
    before = flattener.flatten(state)
    optimizer.load_state_dict(Pocket.of({"o": optimizer}).load()["o"])
    after = flattener.flatten(state)
    assert after.structure is before.structure
    assert all(after.overlappable)
    assert after.tensors[-1] is optimizer.state[module[1].bias]["exp_avg_sq"]


def test_the_flattener_keeps_no_tensor_alive():
    state, flattener = {"m": model()}, Flattener()
    flattener.flatten(state)
    seen = weakref.ref(state["m"][0].weight)
    state["m"] = None
    gc.collect()
    assert seen() is None


def test_tensors_may_be_swapped_between_saves():
    module = model()
    state, flattener = {"m": module}, Flattener()
    flattener.flatten(state)
    other = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    torch.utils.swap_tensors(module[0].weight, other)
    assert snapshot(Pocket.of(state, flattener).load()["m"]["0.weight"]) == snapshot(module[0].weight)


def test_the_same_container_twice_is_fine():
    shared = {"w": torch.zeros(2), "n": [1]}
    state = {"a": shared, "b": [shared, shared]}
    assert snapshot(Pocket.of(state).load()) == snapshot(state)


def test_ten_thousand_small_tensors_in_deep_containers_keep_their_order():
    state = {"x": [{"y": ({"z": torch.tensor(at)},)} for at in range(10_000)]}
    loaded = Pocket.of(state).load()
    assert [entry["y"][0]["z"].item() for entry in loaded["x"]] == list(range(10_000))


MALFORMED = [
    {},
    {"a": 1, "b": 2},
    {"deque": []},
    {"dict": []},
    {"list": {}},
    3,
    None,
    "x",
    {"scalar": "object"},
    {"dict": {"%zz": "value"}},
]


@pytest.mark.parametrize("tree", MALFORMED, ids=repr)
def test_a_malformed_tree_is_called_corrupt(tree):
    with pytest.raises(CorruptCheckpointError):
        unflatten(tree, torch.zeros, dict.fromkeys(["", "%zz"], 1))


@pytest.mark.parametrize(
    "stored", [("int8", 300), ("int8", "3"), ("uint64", -1), ("int64", 1.5), ("float16", 1e10), ("float32", [0.5])]
)
def test_a_numpy_scalar_whose_value_is_not_its_exact_number_is_called_corrupt(stored):
    kind, value = stored
    with pytest.raises(CorruptCheckpointError, match=r"no .* at 'x'"):
        unflatten({"dict": {"x": {"scalar": kind}}}, None, {"x": value})


def test_a_bottomless_tree_is_called_corrupt():
    tree = "value"
    for _, kind in zip(range(300), itertools.cycle(["dict", "list"]), strict=False):
        tree = {kind: [tree] if kind == "list" else {"a": tree}}
    with pytest.raises(CorruptCheckpointError):
        unflatten(tree, torch.zeros, {})


@pytest.mark.parametrize("guarded", [True, False])
def test_a_tensor_that_changes_its_makeup_under_the_same_object_is_seen_with_and_without_the_guard(
    guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not guarded:
        monkeypatch.setattr("asyncckpt.state.sight._guard", lambda _: None)
    tensors = [torch.randn(4, 6) for _ in range(600)]
    flattener = Flattener()
    first = flattener.flatten({"model": {str(i): tensor for i, tensor in enumerate(tensors)}}).structure
    changes = [torch.randn(6, 4), torch.randn(4, 6, dtype=torch.float64), tensors[3].data[:2], torch.randn(4, 6)]
    state = {"model": {str(i): tensor for i, tensor in enumerate(tensors)}}
    assert flattener.flatten(state).structure is first
    for at, change in zip((0, 599, 3, 250), changes, strict=True):
        tensors[at].data = change
        flat = flattener.flatten(state)
        assert flat.structure.tensors[at].shape == tuple(change.shape)
        assert flat.structure.tensors[at].dtype == str(change.dtype).removeprefix("torch.")
        assert flat.sight.addresses[at] == change.data_ptr()
        assert flat.sight.versions == [tensor._version for tensor in tensors]
    tensors[7].data = torch.randn(6, 4).t()
    assert not flattener.flatten(state).sight.contiguous


def test_a_look_that_failed_halfway_leaves_nothing_that_is_taken_for_seen():
    many = [torch.randn(4) for _ in range(600)]
    state = {"model": {str(at): tensor for at, tensor in enumerate(many)}}
    flattener = Flattener()
    before = flattener.flatten(state).structure
    many[0].data = torch.randn(9)
    state["model"]["599"] = torch.eye(4).to_sparse()
    with pytest.raises(UnsupportedTensorError):
        flattener.flatten(state)
    state["model"]["599"] = many[599]
    after = flattener.flatten(state).structure
    assert after != before
    assert after.tensors[0].shape == (9,)


def test_a_tie_made_between_two_saves_is_seen():
    state = {"model": torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))}
    flattener = Flattener()
    assert not flattener.flatten(state).structure.aliases
    state["model"][1].weight = state["model"][0].weight
    flat = flattener.flatten(state)
    assert flat.structure == Flattener().flatten(state).structure
    assert len(flat.structure.aliases) == 1


def test_a_refused_tensor_leaves_no_binding_that_is_taken_for_true():
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    state = {"model": torch.nn.ModuleList([first, second])}
    flattener = Flattener()
    flattener.flatten(state)
    first.weight = second.weight
    second.bias = torch.nn.Parameter(torch.zeros(8, device="meta"))
    with pytest.raises(UnsupportedTensorError):
        flattener.flatten(state)
    second.bias = torch.nn.Parameter(torch.zeros(8))
    assert flattener.flatten(state).structure == Flattener().flatten(state).structure
