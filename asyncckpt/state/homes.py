"""Tensors of the live objects that a restore may read bytes into, instead of copying them there afterwards.

A home is plain: memory of the host, one run, of the stored type and shape, and nobody else's. Whatever is not is restored through a
buffer, as is everything of an object whose own code could look at the values before they are in place.
"""

import ctypes
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from asyncckpt.state.dtypes import BY_NAME, dtype_name

Key = TypeVar("Key", int, str)
Spec = tuple[str, tuple[int, ...]]
"""dtype by torch's name ("bfloat16") and shape."""


class Homes:
    """Offers, made while state and checkpoint are compared; `handed`: ids of new tensors, which an object may keep."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self._specs = specs
        self._offers: list[tuple[str, torch.Tensor]] = []
        self._closed: set[str] = set()  # offers that only `crowd` looks at
        self._missing: list[str] = []
        self._made: list[torch.Tensor] = []  # or their ids could be another tensor's later
        self.handed: set[int] = set()
        self.crowded: set[str] = set()

    def offer(self, path: str, tensor: torch.Tensor, *, fillable: bool = True) -> None:
        """This tensor will hold what is stored at `path`. `fillable` False: but bytes must not be read into it."""
        self._offers.append((path, tensor))
        if not fillable:
            self._closed.add(path)

    def offer_new(self, path: str) -> None:
        """There is no tensor yet, and a new one of host memory may be kept."""
        self._missing.append(path)

    def choose(
        self, paths: Collection[str], real_path: Callable[[str], str], targets: Iterable[tuple[torch.Tensor, str]]
    ) -> dict[str, torch.Tensor]:
        """A home for each of `paths` that has one. `real_path`: of an alias; `targets`: all that is restored, with its path."""
        wanted = set(paths)
        if not wanted:
            return {}
        found: dict[str, torch.Tensor] = {}
        spans = {(*_extent(tensor), real_path(path)) for tensor, path in targets if _on_host(tensor)}
        for path, tensor in self._offers:
            real = real_path(path)
            if _on_host(tensor):
                spans.add((*_extent(tensor), real))
            if real in wanted and path not in self._closed and _is_plain(tensor, self._specs[real]):
                found.setdefault(real, tensor)
        for path in _crowded(spans):
            found.pop(path, None)
        found |= {path: self.make(path) for path in self.wanting(wanted, real_path)}
        return found

    def crowd(self, targets: Iterable[tuple[torch.Tensor, str]], values: Mapping[str, int]) -> None:
        """Find the offers whose memory also belongs to something that gets another value: their paths are `crowded` from now on.

        `values`: a number for each path, the same for those that are one tensor in the checkpoint.
        """
        everything = [*self._offers, *((path, tensor) for tensor, path in targets)]
        spans = {
            (*_extent(tensor), values[path]) for path, tensor in everything if path in values and _is_memory(tensor)
        }
        crowded = _crowded(spans)
        self.crowded = {path for path, _ in self._offers if values.get(path) in crowded}

    def wanting(self, paths: Collection[str], real_path: Callable[[str], str]) -> set[str]:
        """Those of `paths` that have no tensor yet, and whose new one is kept (`make`)."""
        offered = {real_path(path) for path, _ in self._offers}
        return {
            path for path in self._missing if path in paths and path not in offered and self._specs[path][0] in BY_NAME
        }

    def make(self, path: str) -> torch.Tensor:
        """A new tensor that whoever asks first for `path` keeps."""
        dtype, shape = self._specs[path]
        with torch.inference_mode(mode=False):
            made = torch.empty(shape, dtype=BY_NAME[dtype], device="cpu")
        self.handed.add(id(made))
        self._made.append(made)
        return made


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a home, writable. Autograd and snapshots in flight are told that they change."""
    torch.autograd.graph.increment_version(tensor)
    content: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    content.owner = tensor  # lives as long as any view of its memory
    return memoryview(content).cast("B")


def _is_memory(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not nn.parameter.is_lazy(tensor)


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and _is_memory(tensor)


def _is_plain(tensor: torch.Tensor, spec: Spec) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and _on_host(tensor)
        and (dtype_name(tensor.dtype), tuple(tensor.shape)) == (spec[0], tuple(spec[1]))
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        and tensor.data_ptr() != 0
    )


def _extent(tensor: torch.Tensor) -> tuple[str, int, int]:
    """Device, first byte and the byte behind the last: of the tensor if it is one run, else of its whole storage."""
    device = str(tensor.device)
    if tensor.is_contiguous():
        return device, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    storage = tensor.untyped_storage()
    return device, storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _crowded(spans: Collection[tuple[str, int, int, Key]]) -> set[Key]:
    """Keys whose memory overlaps that of another, or only in part their own."""
    crowded: set[Key] = set()
    cluster: list[tuple[str, int, int, Key]] = []
    end = ("", 0)
    for span in sorted(span for span in spans if span[1] < span[2]):
        if (span[0], span[1]) >= end:
            cluster = []
        cluster.append(span)
        if len(cluster) > 1:
            crowded |= {key for _, _, _, key in cluster[-2:]}
        end = max(end, (span[0], span[2]))
    return crowded
