"""Verified tensors of a checkpoint: into memory of their own, and from there or straight from the store into live objects."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from asyncckpt import errors, events
from asyncckpt.engine.direct import MIN_BYTES, direct_paths, fill, verify
from asyncckpt.engine.fetch import Progress, claimed, fetch
from asyncckpt.format.index import Index
from asyncckpt.progress import bar
from asyncckpt.state.cuda import page_locked
from asyncckpt.state.dtypes import BY_NAME
from asyncckpt.state.homes import memory_of
from asyncckpt.state.stateful import RestorePlan
from asyncckpt.state.threads import within_idle_cores
from asyncckpt.store.base import Store


def fetch_tensors(
    store: Store,
    index: Index,
    paths: Iterable[str],
    *,
    progress: Progress | None = None,
    map_location: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """Verified tensors by path; tied ones are one object. On the host they are views of one block of memory."""
    tensors, memory = _fetched(store, index, paths, progress)
    location = torch.device(map_location)
    if location.type == "cpu":
        return tensors
    device = location if location.type == "cuda" and torch.cuda.is_available() else None
    once = {id(tensor): tensor for tensor in tensors.values()}
    with page_locked(memory, device), torch.inference_mode(mode=False):
        moved = {number: tensor.to(location) for number, tensor in once.items()}
    return {path: moved[id(tensor)] for path, tensor in tensors.items()}


def _fetched(
    store: Store,
    index: Index,
    paths: Iterable[str],
    progress: Progress | None,
    own: Mapping[str, torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], memoryview]:
    """Verified tensors on the host, and the block of memory that they are views of, but for those of `own`, which are filled."""
    made = dict(own or {})
    places = {path: memory_of(tensor) for path, tensor in made.items()}
    fetched = fetch(store, index, paths, places=places, progress=progress)
    found = {}
    for path, data in fetched.tensors.items():
        target = index.aliases.get(path, path)
        if target not in made:
            with torch.inference_mode(mode=False):
                made[target] = _tensor(data, index.tensors[target].dtype, index.tensors[target].shape)
        found[path] = made[target]
    return found, fetched.memory


def bring(store: Store, index: Index, wanted: RestorePlan, *, step: int, strict: bool, hooks: events.Hooks) -> None:
    """Everything is read and verified, then it enters the objects."""
    with shown_progress(step, hooks) as shown:
        _Bringing(store, index, wanted, shown).run(strict=strict)


@contextmanager
def shown_progress(step: int, hooks: events.Hooks) -> Iterator[Progress]:
    """A bar on a terminal, and events."""
    with bar(0, f"restoring step {step}") as shown:

        def progress(done_bytes: int, total_bytes: int) -> None:
            hooks(events.BytesRestored(step, done_bytes, total_bytes))
            shown.total = total_bytes
            shown.update(done_bytes - shown.n)

        yield progress


class _Bringing:
    """One restore. A tensor goes one of three ways.

    Read into its place, after it was verified in the store. Or into new memory that its object keeps, because it has none yet. Or
    into a buffer, and copied from there.
    """

    def __init__(self, store: Store, index: Index, wanted: RestorePlan, shown: Progress) -> None:
        self._store, self._index, self._wanted, self._shown = store, index, wanted, shown
        real_paths = set(map(self._real, wanted.paths))
        direct = direct_paths(store, index, real_paths)
        with claimed(store, index, direct):
            self._homes = wanted.homes(direct, self._real)
        self._halves_done = 0  # bytes that go into a place are counted twice by half: when verified, and when there
        self._total_bytes = sum(index.tensors[path].raw_bytes for path in real_paths if path in index.tensors)

    def run(self, *, strict: bool) -> None:
        homes = {path: tensor for inner in self._homes.values() for path, tensor in inner.items()}
        tensors = {path: homes[self._real(path)] for path in self._wanted.paths if self._real(path) in homes}
        staged = [path for path in self._wanted.paths if path not in tensors]
        large = [path for path in map(self._real, staged) if self._index.tensors[path].raw_bytes >= MIN_BYTES]
        with claimed(self._store, self._index, large):
            own = {path: self._wanted.make(path) for path in self._wanted.wanting(large, self._real)}
        fetched, memory = _fetched(self._store, self._index, staged, self._first_half, own)
        tensors |= fetched
        if homes:
            with self._half_of(homes.values()) as progress:
                verify(self._store, self._index, homes, progress=progress)
        with within_idle_cores(), page_locked(memory, self._wanted.device):
            self._wanted.apply(tensors.__getitem__, fill=lambda group: self._fill(group, strict=strict))

    def _real(self, path: str) -> str:
        return self._index.aliases.get(path, path)

    def _first_half(self, done_bytes: int, _: int) -> None:
        self._halves_done = 2 * done_bytes
        self._shown(done_bytes, self._total_bytes)

    @contextmanager
    def _half_of(self, tensors: Collection[torch.Tensor]) -> Iterator[Progress]:
        before = self._halves_done

        def progress(done_bytes: int, _: int) -> None:
            self._shown((before + done_bytes) // 2, self._total_bytes)

        yield progress
        self._halves_done = before + sum(tensor.nbytes for tensor in tensors)

    def _fill(self, group: str, *, strict: bool) -> None:
        if group not in self._homes:
            return
        homes = self._homes[group]
        try:
            places = {path: memory_of(tensor) for path, tensor in homes.items()}
            with self._half_of(homes.values()) as progress:
                fill(self._store, self._index, places, progress=progress)
        except errors.CheckpointError as error:
            error.message += "; the state is partly overwritten: restore again, or start anew"
            error.overwritten = True
            if strict:
                raise  # an older checkpoint has every name too, so falling back overwrites all of it
            raise errors.CheckpointError(error.message, key=error.key) from error


def _tensor(data: memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype not in BY_NAME:
        raise errors.StateMismatchError(f"this version of torch ({torch.__version__}) has no dtype {dtype}")
    kind = BY_NAME[dtype]
    return (
        torch.frombuffer(data, dtype=kind).reshape(shape) if len(data) else torch.empty(shape, dtype=kind, device="cpu")
    )
