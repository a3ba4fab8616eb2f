"""One look at every tensor of a state: what its structure depends on, and what later tells who wrote meanwhile.

A look is bound by memory: the work since the last save has displaced each tensor's metadata, several cache lines of it,
from the caches. So everything is read of a few hundred tensors at a time, while they are near: 9 ms for 20,000 tensors,
where one pass per attribute takes 20.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter, eq, itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int64]
_AT_ONCE = 250
_dtype_of, _device_of, _layout_of = attrgetter("dtype"), attrgetter("device"), attrgetter("layout")
version_of = attrgetter("_version")


@dataclass(frozen=True, slots=True)
class Sight:
    """Of each tensor: the address of its first element and its version (None: it counts none). `contiguous`: all are."""

    addresses: Integers
    versions: list[int | None]
    contiguous: bool

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> "Sight":
        """A look without a comparison."""
        contiguous = all(map(torch.Tensor.is_contiguous, tensors))
        return cls(addresses_of(tensors), versions_of(tensors), contiguous)

    def only(self, members: Sequence[int]) -> "Sight":
        """Of some of the tensors, by position."""
        if len(members) == len(self.versions):
            return self
        versions = (
            list(itemgetter(*members)(self.versions)) if len(members) > 1 else [self.versions[i] for i in members]
        )
        return Sight(self.addresses[list(members)], versions, self.contiguous)

    def chosen(self, flags: Sequence[bool]) -> "Sight":
        """Of the flagged tensors."""
        return Sight(self.addresses[np.array(flags, bool)], list(compress(self.versions, flags)), self.contiguous)


@dataclass(slots=True)
class Makeup:
    """What the plan depends on, of each tensor, when it was last seen."""

    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)
    layouts: list[torch.layout] = field(default_factory=list)
    contiguous: bool = True
    _guard: Any = None

    def look(self, tensors: Sequence[torch.Tensor]) -> tuple[bool, Sight]:
        """Is all as it was? If not, what is seen now is remembered. Either way what was seen of addresses and versions."""
        count = len(tensors)
        guarded = self._guard is not None and count == len(self.dtypes) and self._guard.check(*tensors)
        same = guarded or count == len(self.dtypes)
        contiguous = self.contiguous if guarded else True
        addresses = np.empty(count, np.int64)
        versions: list[int | None] = []
        for start in range(0, count, _AT_ONCE):
            some = tensors[start : start + _AT_ONCE]
            if not guarded:
                same = same and self._as_before(some, start)
                contiguous = contiguous and all(map(torch.Tensor.is_contiguous, some))
            addresses[start : start + _AT_ONCE] = addresses_of(some)
            versions += versions_of(some)
        if not guarded:
            self._remember(tensors, contiguous)
        return same, Sight(addresses, versions, contiguous)

    def _as_before(self, some: Sequence[torch.Tensor], start: int) -> bool:
        stop = start + len(some)
        return (
            list(map(_dtype_of, some)) == self.dtypes[start:stop]
            and all(map(eq, map(torch.Tensor.size, some), self.shapes[start:stop]))
            and list(map(_device_of, some)) == self.devices[start:stop]
            and list(map(_layout_of, some)) == self.layouts[start:stop]
        )

    def _remember(self, tensors: Sequence[torch.Tensor], contiguous: bool) -> None:
        self.dtypes, self.shapes = list(map(_dtype_of, tensors)), [tensor.shape for tensor in tensors]
        self.devices, self.layouts = list(map(_device_of, tensors)), list(map(_layout_of, tensors))
        self.contiguous = contiguous
        self._guard = _guard(tensors)


def _guard(tensors: Sequence[torch.Tensor]) -> Any:
    """torch.compile's own check of kind, dtype, device, sizes and strides: all tensors in one call, 45 ns each instead of 260.

    It holds no reference. None where this torch has it not, or not for these tensors: then Python compares.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards  # noqa: PLC0415 - private: its absence must not matter

        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except Exception:  # noqa: BLE001 - whatever it is, there is another way
        return None


def addresses_of(tensors: Sequence[torch.Tensor]) -> Integers:
    """Where the tensors' bytes begin; 0 for one whose storage was freed."""
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, len(tensors))


def versions_of(tensors: Sequence[Any]) -> list[int | None]:
    """Versions; inference tensors count none."""
    try:
        return list(map(version_of, tensors))
    except RuntimeError:
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]
