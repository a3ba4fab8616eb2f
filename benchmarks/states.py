"""The states that are saved: a module, and AdamW where it is trained, with given tensor count and bytes.

"1 GB, 150 tensors in a module with AdamW" is read twice: 50 parameters whose weights and two moments are 150 tensors of 6.7 MB
(`FEW`), and 150 parameters, so 450 tensors of 2.2 MB (`DENSE`). AdamW's step counts, 4 bytes each, come on top, here and in "20,000
tensors of 10 kB": 6,667 parameters, 20,001 tensors. Values are those of `trained.py`, repeated as often as needed.

bf16 with AdamW means bf16 moments: what `torch.optim.AdamW` makes of bf16 parameters.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.devices import synchronize
from benchmarks.trained import Trained, trained


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Recipe of a state. `raw_bytes`: all tensors but the step counts, in `parameters` equal parts.

    `adamw` False: weights alone. `frozen`: share of the bytes, and of the parameters, that the optimizer does not know and that
    never change.
    `repeated` False: the trained model as it is, 4.8 M parameters, whatever `raw_bytes` and `parameters` say.
    """

    name: str
    raw_bytes: int = 0
    parameters: int = 0
    dtype: str = "float32"
    adamw: bool = True
    frozen: float = 0.0
    repeated: bool = True

    def resized(self, factor: float) -> "StateSpec":
        """The same number of tensors with `factor` times the bytes."""
        return replace(self, raw_bytes=int(self.raw_bytes * factor))


GB = 10**9
FEW = StateSpec("1 GB in 150 tensors", GB, 50)
DENSE = StateSpec("dense fp32 + AdamW", GB, 150)
DENSE_BF16 = StateSpec("dense bf16 + AdamW in bf16", GB, 150, dtype="bfloat16")
WEIGHTS_BF16 = StateSpec("bf16 weights", GB, 150, dtype="bfloat16", adamw=False)
SMALL = StateSpec("20,000 tensors of 10 kB", 20_001 * 10_000, 6_667)
MANY = StateSpec("100,000 tensors of 2 kB", 100_002 * 2_000, 33_334)
LARGE = StateSpec("one tensor of 2 GiB", 2 * 2**30, 1, adamw=False)
FROZEN = StateSpec("90 % frozen, the rest with AdamW", GB, 150, frozen=0.9)
SERIAL = StateSpec("100 MB fp32 + AdamW", GB // 10, 150)
TRAINED = StateSpec("trained model, fp32 + AdamW", repeated=False)
TRAINED_BF16 = StateSpec("trained model, bf16 weights", dtype="bfloat16", adamw=False, repeated=False)
TRAINED_BF16_ADAMW = StateSpec("trained model, bf16 + AdamW in bf16", dtype="bfloat16", repeated=False)


ENDS = 64


class State:
    """What a training loop would hand to `save()`. `objects`: by name."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objects: dict[str, Any] = {"model": model}
        if optimizer is not None:
            self.objects["optimizer"] = optimizer
        self.raw_bytes = sum(tensor.nbytes for tensor in self.tensors())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def tensors(self) -> list[torch.Tensor]:
        """The live tensors as they are now: an optimizer's `load_state_dict` puts new ones in their places."""
        return _leaves(self.state_dicts())

    def state_dicts(self) -> dict[str, Any]:
        """Plain dicts of the live tensors (not copies), for those who take no objects."""
        return {name: held.state_dict() for name, held in self.objects.items()}

    @torch.no_grad()
    def advance(self) -> None:
        """Change the bytes of every tensor that training would: all signs flip, so neither size nor compressibility drifts."""
        frozen = {parameter.data_ptr() for parameter in self.model.parameters() if not parameter.requires_grad}
        tensors = [tensor for tensor in self.tensors() if tensor.data_ptr() not in frozen]
        torch._foreach_neg_([tensor for tensor in tensors if tensor.is_floating_point()])

    def ends(self) -> list[torch.Tensor]:
        """First and last element of up to `ENDS` tensors, as views: what `poke` writes."""
        tensors = [tensor.view(-1) for tensor in self.tensors() if tensor.numel()]
        chosen = tensors[:: -(-len(tensors) // ENDS)]
        return [end for tensor in chosen for end in (tensor[:1], tensor[-1:])]

    @torch.no_grad()
    def scrub(self) -> None:
        """Make sure that nothing correct is left before a restore."""
        for tensor in self.tensors():
            tensor.view(-1).view(torch.uint8).fill_(0x5A)

    def twin(self) -> "State":
        """A state of the same structure in memory of its own, as a restored run would build it."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return State(model, optimizer)

    @torch.no_grad()
    def copy_from(self, other: "State") -> None:
        """The values of a state of the same structure."""
        torch._foreach_copy_(self.tensors(), other.tensors())

    def settle(self) -> None:
        """Whatever was launched on the state's device is done; nothing to wait for on the CPU."""
        synchronize(self.device)

    def held(self) -> list[dict[str, torch.Tensor]]:
        """The optimizer's state of each parameter, as it is now."""
        return [] if self.optimizer is None else [dict(held) for held in self.optimizer.state.values()]

    def hold(self, held: list[dict[str, torch.Tensor]]) -> None:
        """Give the optimizer these tensors again: torch's own `load_state_dict` left views of the loaded file in their places."""
        if self.optimizer is not None:
            for parameter, own in zip(list(self.optimizer.state), held, strict=True):
                self.optimizer.state[parameter] = dict(own)

    def differs_from(self, other: "State") -> list[int]:
        """Positions of the tensors whose bits differ."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return [number for number, (mine, theirs) in enumerate(pairs) if not _same_bits(mine, theirs)]


@torch.no_grad()
def poke(ends: list[torch.Tensor], value: float) -> None:
    """Write one value to all of them: half a millisecond."""
    torch._foreach_copy_(ends, [end.new_full((1,), value) for end in ends])


def build(spec: StateSpec) -> State:
    """Make the state, filled with trained values."""
    if not spec.repeated:
        return as_trained(spec.dtype, adamw=spec.adamw)
    source = trained()
    dtype = getattr(torch, spec.dtype)
    frozen = round(spec.parameters * spec.frozen)
    learning = spec.parameters - frozen
    weights = _Tape([p.detach() for p in source.model.parameters()])
    parts = [weights.take(_shape(spec.raw_bytes * spec.frozen / frozen, dtype)).to(dtype) for _ in range(frozen)]
    shape = _shape(spec.raw_bytes * (1 - spec.frozen) / learning / (3 if spec.adamw else 1), dtype)
    model = _Tensors(parts + [weights.take(shape).to(dtype) for _ in range(learning)])
    for parameter in list(model.parameters())[:frozen]:
        parameter.requires_grad_(False)
    if not spec.adamw:
        return State(model)
    tapes = {name: _Tape(moments) for name, moments in _moments(source).items()}
    tracked = list(model.parameters())[frozen:]
    optimizer = torch.optim.AdamW(tracked)
    for parameter in tracked:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(source.steps)),
            **{name: tape.take(shape).to(dtype) for name, tape in tapes.items()},
        }
    return State(model, optimizer)


def as_trained(dtype: str, *, adamw: bool) -> State:
    """The trained model itself, nothing repeated; `dtype` other than float32 is a cast of its weights and moments."""
    source = trained()
    kind = getattr(torch, dtype)
    model = _Tensors([p.detach().to(kind) for p in source.model.parameters()])
    if not adamw:
        return State(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for mine, theirs in zip(model.parameters(), source.model.parameters(), strict=True):
        held = source.optimizer.state[theirs]
        optimizer.state[mine] = {name: t if name == "step" else t.to(kind) for name, t in held.items()}
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


def _shape(size_bytes: float, dtype: torch.dtype) -> tuple[int, ...]:
    elements = size_bytes / dtype.itemsize
    columns = 1024 if elements >= 65_536 else 50
    return (max(1, round(elements / columns)), columns)


def _leaves(node: Any) -> list[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return [node.detach()]
    children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return [leaf for child in children for leaf in _leaves(child)]


def _same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(mine.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))
