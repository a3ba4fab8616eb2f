"""Weights for other libraries: one `.safetensors` file, or a folder that `transformers` loads."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from asyncckpt import errors
from asyncckpt.format import keys
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.index import Index
from asyncckpt.state.dtypes import BY_NAME, dtype_name
from asyncckpt.store.posix import absolute, sync_folder, translated

SHARD_BYTES = 5 * 10**9
"""Most bytes of one file of a Hugging Face folder, as `save_pretrained` cuts them; one larger tensor stands alone."""

Read = Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
"""Fetches tensors by their full paths."""


class ConfigObject(Protocol):
    """What `transformers` keeps as `model.config`."""

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        ...


Config = Mapping[str, Any] | ConfigObject


@dataclass(frozen=True, slots=True)
class Names:
    """What is exported: `paths`, exported name to full path; `sizes`: name to (elements, dtype)."""

    paths: dict[str, str]
    sizes: dict[str, tuple[int, str]]

    @classmethod
    def of(cls, index: Index, every: Sequence[str], *, prefix: str | None, strip: str, step: int) -> "Names":
        """Those of `every` tensor below `prefix`, tied ones once: under the name that stands first in the state."""
        if prefix is None and any(path.startswith("model/") for path in every):
            prefix = "model"
        below = "" if prefix is None else f"{prefix}/"
        paths: dict[str, str] = {}
        targets: set[str] = set()
        for path in every:
            target = index.aliases.get(path, path)
            if not path.startswith(below) or target in targets:
                continue
            targets.add(target)
            name = _name(path[len(below) :]).removeprefix(strip)
            if name in paths:
                raise ValueError(f"two tensors would both be named {name!r}; choose another strip")
            paths[name] = path
        if not paths:
            raise errors.StateMismatchError(f"the checkpoint has no tensor below {prefix!r}", step=step)
        if strip and not any(_name(path[len(below) :]).startswith(strip) for path in paths.values()):
            raise errors.StateMismatchError(f"no tensor below {prefix!r} begins with {strip!r}", step=step)
        sizes = {}
        for name, path in paths.items():
            tensor = index.tensors[index.aliases.get(path, path)]
            sizes[name] = (torch.Size(tensor.shape).numel(), tensor.dtype)
        return cls(paths, sizes)


def export_safetensors(
    read: Read, names: Names, path: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None
) -> None:
    """One file, replaced atomically and durable on return. Host memory: the tensors once, and once more if they are cast."""
    target = absolute(path)
    kind = _cast(dtype)
    with translated("export", str(target)), _draft(target) as draft:
        _write(read, names.paths, draft, kind)
        draft.replace(target)
        sync_folder(target.parent)


def export_huggingface(
    read: Read,
    names: Names,
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    config: Config | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A folder for `from_pretrained`, which appears whole or not at all. Host memory: `shard_bytes`, twice if they are cast."""
    target = absolute(path)
    kind = _cast(dtype)
    sizes = {
        name: count * DTYPES[_stored_dtype(stored, kind)].element_bytes for name, (count, stored) in names.sizes.items()
    }
    with translated("export", str(target)):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise errors.LocalIOError("the folder to export to is not empty", key=str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
    with translated("export", str(target)), _draft(target) as draft:
        draft.mkdir()
        shards = _shards(sizes, shard_bytes)
        weight_map: dict[str, str] = {}
        for number, members in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            _write(read, {name: names.paths[name] for name in members}, draft / file, kind)
            weight_map |= dict.fromkeys(members, file)
        if len(shards) > 1:
            content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(draft / "model.safetensors.index.json", content)
        if config is not None:
            _write_json(draft / "config.json", _config(config, kind))
        sync_folder(draft)
        draft.replace(target)
        sync_folder(target.parent)


def _name(path: str) -> str:
    """A module's own key. Deeper paths stay as they are: nothing else knows them."""
    if "/" in path:
        return path
    try:
        key = keys.unescape(path)
    except (ValueError, errors.ResourceLimitError):  # no tensor of the state: it has a name all the same
        return path
    return path if isinstance(key, int) or key == "__metadata__" else key


def _cast(dtype: str | torch.dtype | None) -> torch.dtype | None:
    kind = BY_NAME.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and (kind is None or not kind.is_floating_point):
        raise ValueError(f"dtype must be a floating type of torch, such as 'bfloat16', not {dtype!r}")
    return kind


def _stored_dtype(stored: str, kind: torch.dtype | None) -> str:
    return dtype_name(kind) if kind is not None and BY_NAME[stored].is_floating_point else stored


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write(read: Read, paths: Mapping[str, str], file: Path, kind: torch.dtype | None) -> None:
    found = read(list(paths.values()))
    tensors = {}
    for name, path in paths.items():
        tensor = found[path]
        tensors[name] = tensor.to(kind) if kind is not None and tensor.is_floating_point() else tensor
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except (KeyError, SafetensorError) as error:
        odd = sorted({dtype_name(tensor.dtype) for tensor in tensors.values()})
        raise errors.UnsupportedTensorError(
            f"safetensors cannot hold these tensors ({', '.join(odd)}): {error}"
        ) from error
    _sync(file)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(file)


def _config(config: Config, kind: torch.dtype | None) -> dict[str, Any]:
    content = dict(config) if isinstance(config, Mapping) else dict(config.to_dict())
    if kind is not None:
        content["torch_dtype" if "torch_dtype" in content else "dtype"] = dtype_name(kind)
    return content


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A name beside the target, gone at the end whatever happens."""
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield draft
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
