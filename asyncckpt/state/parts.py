"""How a state is cut for copying: what at once, what behind the caller's back, on which device, and to where."""

import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from operator import itemgetter, mul
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncckpt.engine.arena import Arena
from asyncckpt.errors import TornSnapshotError
from asyncckpt.state.cuda import Lane
from asyncckpt.state.dtypes import BY_NAME
from asyncckpt.state.sight import Integers, Sight
from asyncckpt.state.witness import Ahead, Layout, Witnesses

if TYPE_CHECKING:  # annotations only: these pull in the format's dependencies
    from asyncckpt.format.plan import Plan
    from asyncckpt.state.tree import Flat

Tensors = Sequence[torch.Tensor]
_ORDERED_STORES = frozenset({"x86_64", "AMD64", "i686"})


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that are copied in one call. `members`: their positions in the state; none of them is empty."""

    members: tuple[int, ...] = ()
    positions: Integers = field(init=False, repr=False, compare=False)  # the same

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", np.array(self.members, np.int64))

    def of(self, tensors: Tensors) -> list[torch.Tensor]:
        """The members of a list of all tensors."""
        if len(self.members) == len(tensors):
            return list(tensors)
        return list(itemgetter(*self.members)(tensors)) if len(self.members) > 1 else [tensors[i] for i in self.members]


@dataclass(frozen=True, slots=True)
class LanePart:
    """What one CUDA device has: `now` must not be overlapped, `later` may."""

    device: torch.device
    now: Part
    later: Part


@dataclass(frozen=True, slots=True)
class Parts:
    """A state, cut. `now` is copied before `copy()` returns, `later` and the lanes' `later` overlap.

    `watched`: what nobody may write meanwhile: all that overlaps or, where nothing does, all of host memory, which other
    threads might write. `layout` of it, for the witness words, if it is in host memory.
    """

    now: Part
    later: Part
    lanes: tuple[LanePart, ...]
    watched: Part
    layout: Layout | None

    @property
    def overlaps(self) -> bool:
        """Whether anything is left to copy behind the caller's back."""
        return bool(self.later.members) or any(lane.later.members for lane in self.lanes)


_HOST_ONLY = not (torch.backends.cuda.is_built() or torch.backends.mps.is_built() or torch.xpu._is_compiled())


def devices_of(tensors: Tensors) -> list[int]:
    """Device numbers, -1 for host memory: what `cut` depends on besides the plan. Empty if torch knows no other memory."""
    return [] if _HOST_ONLY else list(map(torch.Tensor.get_device, tensors))


def cut(flat: "Flat", plan: "Plan", *, overlap: bool) -> Parts:
    """Overlapped is what only an optimizer step changes; with CUDA tensors in the state, of these alone.

    Host tensors beside them (AdamW's `step`) are small, and an optimizer step does not wait for the host.
    """
    now: list[int] = []
    later: list[int] = []
    lanes: dict[torch.device, tuple[list[int], list[int]]] = {}
    has_cuda = any(tensor.is_cuda for tensor in flat.tensors)
    for i, tensor in enumerate(flat.tensors):
        if tensor.numel() == 0:
            continue
        overlaps = overlap and flat.overlappable[i]
        if tensor.is_cuda:
            lanes.setdefault(tensor.device, ([], []))[overlaps].append(i)
        elif overlaps and not has_cuda and tensor.is_cpu:
            later.append(i)
        else:
            now.append(i)
    cut_lanes = tuple(LanePart(device, Part(tuple(at)), Part(tuple(then))) for device, (at, then) in lanes.items())
    on_lanes = [i for lane in cut_lanes for i in lane.later.members]
    watched = on_lanes or later or [i for i in now if flat.tensors[i].is_cpu]
    layout = None if on_lanes or not watched else _layout(plan, watched)
    return Parts(Part(tuple(now)), Part(tuple(later)), cut_lanes, Part(tuple(watched)), layout)


Marks = Sequence[tuple[int, torch.Tensor]]
"""Where in a list of members the arena's counter is written, with the tensor to write: so many shards are filled by then."""


@dataclass(slots=True)
class MarkPlaces:
    """The marks of the last plans; two, since a Saver may measure two codecs in turns."""

    _known: list[tuple["Plan", Part, Marks]] = field(default_factory=list)

    def of(self, plan: "Plan", later: Part) -> Marks:
        """Behind which of `later` how many shards, counted from the first, are filled."""
        for known_plan, known_part, marks in self._known:
            if known_plan is plan and known_part is later:
                return marks
        made = _marks(plan, later.members)
        self._known = [*self._known[-1:], (plan, later, made)]
        return made


@dataclass(frozen=True, slots=True)
class Announced:
    """A copy whose arena is read while it is filled. `counter`: of the arena; `begins`: called before the first byte is copied."""

    counter: torch.Tensor
    marks: Callable[[], Marks]
    begins: Callable[[], None]


def shows_stores_in_order() -> bool:
    """Whether who sees the counter sees the bytes it speaks of: x86 promises that, others would need a barrier between them."""
    return platform.machine() in _ORDERED_STORES


def _marks(plan: "Plan", later: Sequence[int]) -> Marks:
    position = {tensor: number for number, tensor in enumerate(later, 1)}
    counts: dict[int, int] = {}
    behind = 0
    for filled, shard in enumerate(plan.shards, 1):
        behind = max(behind, *(position.get(chunk.tensor, 0) for chunk in shard.chunks))
        counts[behind] = filled
    return tuple((behind, torch.tensor([filled], dtype=torch.int64)) for behind, filled in counts.items())


def _layout(plan: "Plan", members: Iterable[int]) -> Layout:
    members = list(members)
    specs = [plan.structure.tensors[i] for i in members]
    return Layout.of(
        shapes=[spec.shape for spec in specs],
        offsets=[plan.tensor_offsets[i] for i in members],
        element_bytes=[BY_NAME[spec.dtype].itemsize for spec in specs],
    )


@dataclass(slots=True)
class Work:
    """What one copy reads and writes; dropped with its references when it is done."""

    parts: Parts
    tensors: Tensors
    targets: Tensors
    arena: Arena
    lanes: list[Lane]
    path: Callable[[int], str]
    events: list[tuple[Lane, torch.cuda.Event]] = field(default_factory=list)
    witnesses: Witnesses | None = None
    storages: list[torch.UntypedStorage] = field(default_factory=list)  # of the watched, which may get others meanwhile
    before_copy: Callable[[], None] | None = None
    announced: Announced | None = None
    afterwards: Callable[[], None] | None = None  # holds none of the sources

    def start(self) -> None:
        """Copy what must not be overlapped, and order the lanes behind the caller's streams."""
        for lane, part in zip(self.lanes, self.parts.lanes, strict=True):
            lane.start(part.now.of(self.targets), part.now.of(self.tensors), alone=not self.parts.overlaps)
        self._copy_host(self.parts.now)

    def watch(self, sight: Sight, ahead: Ahead) -> None:
        """Take the witnesses."""
        watched, layout = self.parts.watched, self.parts.layout
        seen = sight.only(watched.members, watched.positions)
        self.witnesses = Witnesses(watched.of(self.tensors), seen, layout, ahead)
        if layout is not None and seen.contiguous:
            self.afterwards = partial(ahead.draw, layout, seen.addresses)

    def copy(self) -> None:
        """Copy the rest: host memory now, devices into their lanes."""
        if self.before_copy is not None:
            self.before_copy()
        self.storages = list(map(torch.Tensor.untyped_storage, self.parts.watched.of(self.tensors)))
        for lane, part in zip(self.lanes, self.parts.lanes, strict=True):
            event = lane.finish(part.later.of(self.targets), part.later.of(self.tensors))
            self.events.append((lane, event))
        self._copy_host(self.parts.later, self.announced)

    def synchronize(self) -> None:
        """Return when every byte is in the arena. Memory that an owner freed meanwhile may have been somebody else's when it was copied."""
        for _, event in self.events:
            event.synchronize()
        for member, storage in zip(self.parts.watched.members, self.storages, strict=True) if self.lanes else ():
            if not storage.nbytes():
                raise TornSnapshotError(
                    "the storage of this tensor was freed while the snapshot copied it from its device; nothing of this save is stored. "
                    "Call wait_staged() before it is resized",
                    key=self.path(member),
                )

    def settle(self) -> None:
        """It failed: return when no device writes into the arena any more."""
        for lane in self.lanes:
            with suppress(RuntimeError):  # the device itself has failed: it does not write either
                lane.synchronize()

    def _copy_host(self, part: Part, announced: Announced | None = None) -> None:
        if not part.members:
            return
        targets, sources = part.of(self.targets), part.of(self.tensors)
        if announced is not None:
            self.arena.reset_counter()
            for behind, filled in reversed(announced.marks()):  # in the list itself: one call copies in its order
                targets.insert(behind, announced.counter)
                sources.insert(behind, filled)
            announced.begins()
        torch._foreach_copy_(targets, sources)


@dataclass(slots=True)
class Views:
    """Tensors that stand for the bytes of arenas, as a plan lays them out; kept for the last layout of each arena.

    They do not keep the map open: using one after `arena.close()` is a segmentation fault, so `forget` it before.
    """

    _known: dict[int, tuple[Arena, tuple[int, ...], list[torch.Tensor]]] = field(default_factory=dict)
    _counters: dict[int, torch.Tensor] = field(default_factory=dict)

    def of(self, arena: Arena, plan: "Plan") -> list[torch.Tensor]:
        """One view for each tensor of the plan's structure."""
        known = self._known.get(arena.address)
        offsets = plan.tensor_offsets
        if known is None or known[0] is not arena or known[1] is not offsets:
            self._counters[arena.address] = _counter(arena)  # first: an interrupt may come between the two
            known = self._known[arena.address] = (arena, offsets, _views(arena, plan))
        return known[2]

    def counter(self, arena: Arena) -> torch.Tensor:
        """The counter of an arena that has views: one int64."""
        return self._counters[arena.address]

    def forget(self, arena: Arena) -> None:
        """Drop the views of an arena."""
        self._known.pop(arena.address, None)
        self._counters.pop(arena.address, None)

    def arenas(self) -> list[Arena]:
        """Arenas that have views."""
        return [arena for arena, _, _ in self._known.values()]


def _views(arena: Arena, plan: "Plan") -> list[torch.Tensor]:
    """About a microsecond a tensor. Never inference tensors: those could not be written outside that mode."""
    if plan.arena_bytes > arena.bytes:
        raise ValueError(f"the plan needs {plan.arena_bytes} bytes, the arena has {arena.bytes}")
    with torch.inference_mode(mode=False), torch.no_grad():
        flat = torch.frombuffer(arena.buffer, dtype=torch.uint8, count=arena.bytes)
        typed = {name: flat.view(BY_NAME[name]) for name in {spec.dtype for spec in plan.structure.tensors}}
        return [
            typed[spec.dtype].as_strided(spec.shape, _strides(spec.shape), offset // typed[spec.dtype].itemsize)
            for spec, offset in zip(plan.structure.tensors, plan.tensor_offsets, strict=True)
        ]


def _counter(arena: Arena) -> torch.Tensor:
    with torch.inference_mode(mode=False), torch.no_grad():
        return torch.frombuffer(arena.buffer, dtype=torch.int64, count=1, offset=arena.counter_offset)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1][: len(shape)] if shape else ()
