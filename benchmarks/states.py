"""The states that are saved: a module, and AdamW where it is trained, with given tensor count and bytes.

"1 GB, 150 tensors in a module with AdamW" is read as: a module of 150 parameters, and 1 GB is all of them and both moments of
each, so 450 tensors of 2.2 MB (and 150 step counts of 4 bytes). "20,000 tensors of 10 kB" likewise: 6,667 parameters, so 20,001
tensors of 10 kB and 6,667 step counts. Values are those of `trained.py`, repeated as often as needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.trained import Trained, trained


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Scenario of a state. `raw_bytes`: all tensors but the step counts. `adamw` False: weights alone."""

    name: str
    raw_bytes: int
    parameters: int
    dtype: str = "float32"
    adamw: bool = True

    def resized(self, factor: float) -> "StateSpec":
        """The same number of tensors with `factor` times the bytes."""
        return StateSpec(self.name, int(self.raw_bytes * factor), self.parameters, self.dtype, self.adamw)


FEW = StateSpec("1 GB in 150 tensors", raw_bytes=10**9, parameters=50)  # weights and both moments; AdamW's steps beside
DENSE = StateSpec("dense fp32 + AdamW", raw_bytes=10**9, parameters=150)
SMALL = StateSpec("20,000 tensors of 10 kB", raw_bytes=20_001 * 10_000, parameters=6_667)
SERIAL = StateSpec("100 MB fp32 + AdamW", raw_bytes=10**8, parameters=150)


class State:
    """What a training loop would hand to `save()`. `objects`: by name."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objects: dict[str, Any] = {"model": model}
        if optimizer is not None:
            self.objects["optimizer"] = optimizer
        self.raw_bytes = sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """The live tensors as they are now: an optimizer's `load_state_dict` puts new ones in their places."""
        return _leaves(self.state_dicts())

    def state_dicts(self) -> dict[str, Any]:
        """Plain dicts of the live tensors (not copies), for those who take no objects."""
        return {name: held.state_dict() for name, held in self.objects.items()}

    @torch.no_grad()
    def advance(self) -> None:
        """Change the bytes of every tensor: all signs flip, so neither size nor compressibility drifts over many saves."""
        torch._foreach_neg_([tensor for tensor in self.tensors() if tensor.is_floating_point()])

    @torch.no_grad()
    def scrub(self) -> None:
        """Make sure that nothing correct is left before a restore."""
        for tensor in self.tensors():
            tensor.view(-1).view(torch.uint8).fill_(0x5A)

    def twin(self) -> "State":
        """A state of the same structure in memory of its own, as a restored run would build it."""
        model = _Tensors([torch.empty_like(p) for p in self.model.parameters()])
        if self.optimizer is None:
            return State(model)
        optimizer = torch.optim.AdamW(model.parameters())
        for mine, theirs in zip(model.parameters(), self.model.parameters(), strict=True):
            held = self.optimizer.state[theirs]
            optimizer.state[mine] = {name: torch.empty_like(tensor) for name, tensor in held.items()}
        return State(model, optimizer)

    def differs_from(self, other: "State") -> list[int]:
        """Positions of the tensors whose bits differ."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return [number for number, (mine, theirs) in enumerate(pairs) if not _same_bits(mine, theirs)]


def build(spec: StateSpec) -> State:
    """Make the state of a scenario, filled with trained values."""
    source = trained()
    dtype = getattr(torch, spec.dtype)
    kinds = 3 if spec.adamw else 1
    element_bytes = torch.empty(0, dtype=dtype).element_size()
    elements = round(spec.raw_bytes / spec.parameters / kinds / element_bytes)
    shape = _shape(elements)
    weights = _Tape([p.detach() for p in source.model.parameters()])
    model = _Tensors([weights.take(shape).to(dtype) for _ in range(spec.parameters)])
    if not spec.adamw:
        return State(model)
    tapes = {name: _Tape(moments) for name, moments in _moments(source).items()}
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(source.steps)),
            **{name: tape.take(shape).to(dtype) for name, tape in tapes.items()},
        }
    return State(model, optimizer)


def as_trained(dtype: str, *, adamw: bool) -> State:
    """The trained model itself, nothing repeated; `dtype` other than float32 is a cast of its weights."""
    source = trained()
    model = _Tensors([p.detach().to(getattr(torch, dtype)) for p in source.model.parameters()])
    if not adamw:
        return State(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for mine, theirs in zip(model.parameters(), source.model.parameters(), strict=True):
        optimizer.state[mine] = dict(source.optimizer.state[theirs])
    return State(model, optimizer)


class _Tensors(nn.Module):
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            self.register_parameter(f"layer_{number:05d}", nn.Parameter(tensor))


class _Tape:
    """Values of many tensors, one behind the other, repeated without end."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._values = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._at = 0

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        out = torch.empty(shape)
        flat, done = out.view(-1), 0
        while done < len(flat):
            piece = self._values[self._at : self._at + len(flat) - done]
            flat[done : done + len(piece)] = piece
            done += len(piece)
            self._at = (self._at + len(piece)) % len(self._values)
        return out


def _moments(source: Trained) -> dict[str, list[torch.Tensor]]:
    held = [source.optimizer.state[p] for p in source.model.parameters()]
    return {name: [state[name] for state in held] for name in ("exp_avg", "exp_avg_sq")}


def _shape(elements: int) -> tuple[int, ...]:
    columns = 1024 if elements >= 65_536 else 50
    return (max(1, round(elements / columns)), columns)


def _leaves(node: Any) -> list[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return [node.detach()]
    children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return [leaf for child in children for leaf in _leaves(child)]


def _same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(mine.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))
