"""Tensors of the live objects that a restore may read bytes into, instead of copying them there afterwards.

A home is plain: memory of the host, one run, of the stored type and shape, and nobody else's. Whatever is not is restored through a
buffer, as is everything of an object whose own code could look at the values before they are in place.
"""

import ctypes
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from asyncckpt.state.dtypes import BY_NAME, dtype_name

Spec = tuple[str, tuple[int, ...]]
"""dtype by torch's name ("bfloat16") and shape."""


class Homes:
    """Offers, made while state and checkpoint are compared; `handed`: ids of new tensors, which an object may keep."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self._specs = specs
        self._offers: list[tuple[str, torch.Tensor]] = []
        self._missing: list[str] = []
        self._made: list[torch.Tensor] = []  # or their ids could be another tensor's later
        self.handed: set[int] = set()

    def offer(self, path: str, tensor: torch.Tensor) -> None:
        """This tensor will hold what is stored at `path`."""
        self._offers.append((path, tensor))

    def offer_new(self, path: str) -> None:
        """There is no tensor yet, and a new one of host memory may be kept."""
        self._missing.append(path)

    def choose(
        self, paths: Collection[str], real_path: Callable[[str], str], targets: Iterable[tuple[torch.Tensor, str]]
    ) -> dict[str, torch.Tensor]:
        """A home for each of `paths` that has one. `real_path`: of an alias; `targets`: all that is restored, with its path."""
        wanted = set(paths)
        found: dict[str, torch.Tensor] = {}
        spans = {(*_extent(tensor), real_path(path)) for tensor, path in targets if _on_host(tensor)}
        for path, tensor in self._offers:
            real = real_path(path)
            if _on_host(tensor):
                spans.add((*_extent(tensor), real))
            if real in wanted and _is_plain(tensor, self._specs[real]):
                found.setdefault(real, tensor)
        for path in _crowded(spans):
            found.pop(path, None)
        for path in self.wanting(wanted, real_path):
            dtype, shape = self._specs[path]
            found[path] = torch.empty(shape, dtype=BY_NAME[dtype], device="cpu")
            self.hand(found[path])
        return found

    def wanting(self, paths: Collection[str], real_path: Callable[[str], str]) -> set[str]:
        """Those of `paths` that have no tensor yet, and whose new one is kept if it is handed over."""
        offered = {real_path(path) for path, _ in self._offers}
        return {
            path for path in self._missing if path in paths and path not in offered and self._specs[path][0] in BY_NAME
        }

    def hand(self, tensor: torch.Tensor) -> None:
        """Whoever is given this tensor may keep it; only the first one does."""
        self.handed.add(id(tensor))
        self._made.append(tensor)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a home, writable. Autograd and snapshots in flight are told that they change."""
    torch.autograd.graph.increment_version(tensor)
    content: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    content.owner = tensor  # lives as long as any view of its memory
    return memoryview(content).cast("B")


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided and not nn.parameter.is_lazy(tensor)


def _is_plain(tensor: torch.Tensor, spec: Spec) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and _on_host(tensor)
        and (dtype_name(tensor.dtype), tuple(tensor.shape)) == (spec[0], tuple(spec[1]))
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        and tensor.data_ptr() != 0
    )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and the byte behind the last: of the tensor if it is one run, else of its whole storage."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _crowded(spans: Collection[tuple[int, int, str]]) -> set[str]:
    """Paths whose memory overlaps that of another, or only in part their own."""
    crowded: set[str] = set()
    cluster: list[tuple[int, int, str]] = []
    end = 0
    for span in [*sorted(span for span in spans if span[0] < span[1]), (2**64, 2**64, "")]:
        if span[0] >= end:
            if len(cluster) > 1:
                crowded |= {path for _, _, path in cluster}
            cluster = []
        cluster.append(span)
        end = max(end, span[1])
    return crowded
