"""Every system of the benchmark saves, restores bit for bit, and reads one tensor, on every kind of place that it says it can."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.peers.base import Peer
from benchmarks.states import State, _Tensors
from benchmarks.stores import Place
from benchmarks.stores.s3 import SinkStore

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("default")]  # what others warn of is not ours
S3_ONLY = [name for name in peers.NAMES if name.startswith("s3torchconnector") or name.endswith("boto3")]
KINDS = {
    "folder": [name for name in peers.NAMES if name not in S3_ONLY],
    "s3": [*(name for name in peers.NAMES if name.startswith("asyncckpt")), *S3_ONLY],
}
READS_NO_SINGLE_TENSOR = {"torch.save+boto3"}
BLOCKING = {"torch.save", "safetensors", "dcp.save", "s3torchconnector-save"}
LEAST_BYTES = 0.5  # of the state's: some compress


@pytest.fixture(scope="module")
def sink() -> Iterator[SinkStore]:
    with SinkStore("sink") as store:
        yield store


@pytest.fixture
def state() -> State:
    """Three parameters with AdamW after a step, 12 MB: more than one part of an upload."""
    torch.manual_seed(1)
    model = _Tensors([torch.randn(1000, 997), torch.randn(997), torch.randn(3)])
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return State(model, optimizer)


@pytest.fixture
def twin(state: State) -> State:
    """The same structure, other bytes."""
    found = state.twin()
    found.scrub()
    return found


@pytest.fixture(params=[(name, kind) for kind, names in KINDS.items() for name in names], ids="-".join)
def peer(request: pytest.FixtureRequest, sink: SinkStore, tmp_path: Path) -> Iterator[Peer]:
    name, kind = request.param
    place = Place(name, folder=tmp_path) if kind == "folder" else sink.place(name)
    try:
        opened = peers.open_peer(name, place)
    except ImportError as error:
        pytest.skip(str(error))
    try:
        yield opened
    finally:
        opened.close()


def test_what_a_peer_saves_it_restores(peer: Peer, state: State, twin: State) -> None:
    peer.prepare(state)
    peer.save(1, state).wait_durable()
    state.advance()
    saving = peer.save(2, state)
    saving.wait_durable()
    assert 0 < saving.staged_s <= saving.durable_s
    assert peer.stored_bytes(2) > LEAST_BYTES * state.raw_bytes
    peer.restore(2, twin)
    assert state.differs_from(twin) == []
    twin.scrub()
    for index in (0, 5):
        found = peer.read_one(2, index, twin)
        assert (found is None) == (peer.name in READS_NO_SINGLE_TENSOR)
        assert found is None or torch.equal(found, state.tensors()[index])
    peer.forget(2)
    assert peer.stored_bytes(1) > 0
    state.advance()
    peer.restore(1, twin)
    assert state.differs_from(twin) == []


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_peer_says_where_and_how_it_saves(name: str) -> None:
    try:
        peer = peers.peer_type(name)
    except ImportError as error:
        pytest.skip(str(error))
    assert peer.name == name
    assert peer.stores == {kind for kind, names in KINDS.items() if name in names}
    assert peer.asynchronous == (name not in BLOCKING)


def test_a_place_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot save"):
        peers.open_peer("torch.save", Place("torch.save", url="s3://bucket/prefix"))


def test_an_option_that_a_peer_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        peers.open_peer("torch.save", Place("torch.save", folder=tmp_path), codec="none")


def test_a_peer_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_checkpointing", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.torch_checkpointing", raising=False)
    with pytest.raises(ImportError, match=r"\.\[bench\]"):
        peers.open_peer("torch_checkpointing", Place("x", folder=tmp_path))
