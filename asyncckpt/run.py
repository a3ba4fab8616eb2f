"""The front door to what exists: the checkpoints of a run, and one checkpoint."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, Self

import torch

from asyncckpt import errors
from asyncckpt.checkpoints import leftovers, marks
from asyncckpt.checkpoints.leftovers import Leftovers
from asyncckpt.checkpoints.removal import rewind
from asyncckpt.engine.catalog import find_checkpoints, read_index, read_record
from asyncckpt.engine.resolve import reading
from asyncckpt.engine.verify import verify_objects
from asyncckpt.export import Config, Names, export_huggingface, export_safetensors
from asyncckpt.format import keys
from asyncckpt.format.index import Index
from asyncckpt.format.record import Record
from asyncckpt.lineage import Root, note, root_of
from asyncckpt.options import Best, S3Options
from asyncckpt.restore import load_from, read_values_of, specs_of
from asyncckpt.staging import fetch_tensors
from asyncckpt.state.tree import check_tree, leaves
from asyncckpt.state.walk import BYTES
from asyncckpt.store.base import Store
from asyncckpt.store.opening import open_store
from asyncckpt.telling import warn


class Checkpoint:
    """One checkpoint. Its record and index are read when they are first needed, and kept.

    Every method raises a `CorruptCheckpointError` if it meets damage, and `CheckpointNotFoundError` if the checkpoint was
    removed meanwhile.
    """

    def __init__(self, store: Store, step: int, root: Root | None = None) -> None:
        self.step = step
        """Optimizer steps completed."""
        self._store = store
        self._root = root

    def __repr__(self) -> str:
        return f"<Checkpoint step={self.step}>"

    @cached_property
    def record(self) -> Record:
        """Everything that the record holds."""
        with reading(self._store, self.step):
            return read_record(self._store, self.step)

    @cached_property
    def _index(self) -> Index:
        record = self.record
        with self._reading():
            return read_index(self._store, record)

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self._store, self.step, self.record.attempt)

    @property
    def metrics(self) -> Mapping[str, float]:
        """As given to `save()`."""
        return self.record.metrics

    @property
    def epoch(self) -> int | None:
        """As given to `save()`."""
        return self.record.epoch

    @property
    def tags(self) -> tuple[str, ...]:
        """As given to `save()`."""
        return self.record.tags

    @property
    def config(self) -> Any:
        """As given to the Saver."""
        return self.record.config

    @property
    def time(self) -> float:
        """When it was saved, in unix seconds."""
        return self.record.time

    def names(self) -> list[str]:
        """Full paths of all tensors, tied ones included; long `bytes` are none."""
        index = self._index
        values = set(leaves(index.tree, kinds={BYTES}))
        return [path for path in (*index.tensors, *index.aliases) if path not in values]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by its full path, such as `model/layers.0.weight`; only its bytes are downloaded."""
        if name not in self._index.tensors and name not in self._index.aliases:
            raise errors.StateMismatchError(f"the checkpoint has no tensor {name!r}; see names()", step=self.step)
        return self._tensors([name])[name]

    def load(self, prefix: str | None = None, *, map_location: str | torch.device = "cpu") -> Any:
        """The state, or the part below `prefix`, as nested containers; see `asyncckpt.load`."""
        index = self._index
        with self._reading():
            loaded = load_from(self._store, self.record, index, prefix, map_location=map_location)
        if self._root is not None:
            note(self._root, self.record.lineage, restored=self.step)
        return loaded

    def verify(self, *, unmark: bool = False) -> None:
        """Read every byte that is stored, and check it; returns if all is well. Memory is bounded, not the state's size.

        `unmark`: if all is well, also remove the mark that set the checkpoint aside as damaged, so that it is `latest` and `best` again.
        """
        index = self._index
        with self._reading():
            check_tree(index.tree, specs_of(index), read_values_of(self._store, self.record))
            verify_objects(self._store, index, keys.folder(self.step, self.record.attempt))
        if unmark:
            marks.unmark(self._store, self.step)

    def export(
        self,
        path: str | os.PathLike[str],
        format: Literal["safetensors", "huggingface"] = "safetensors",  # noqa: A002 - the word that users know
        *,
        dtype: str | torch.dtype | None = None,
        prefix: str | None = None,
        strip: str = "",
        config: Config | None = None,
    ) -> None:
        """Write tensors for other libraries: one `.safetensors` file, or a folder that `transformers` loads.

        Args:
            path: The file, which is replaced atomically, or the folder, which must not exist or be empty.
            format: Which of the two.
            dtype: Cast floating tensors, e.g. `"bfloat16"`; None keeps them as they are.
            prefix: The part of the state to write, e.g. `"model"`, which does not become part of the names. None: `model` if there
                is such a group, else everything.
            strip: Taken off the beginning of every name that has it, such as `"module."`.
            config: `config.json` of the folder: a dict, or an object with `to_dict()`, such as `model.config`.

        Tied tensors are written once. Nothing is left at `path` if it fails.
        """
        names = Names.of(self._index, self.names(), prefix=prefix, strip=strip, step=self.step)
        with self._reading():
            if format == "safetensors":
                export_safetensors(self._tensors, names, path, dtype=dtype)
            elif format == "huggingface":
                export_huggingface(self._tensors, names, path, dtype=dtype, config=config)
            else:
                raise ValueError(f'format is "safetensors" or "huggingface", not {format!r}')

    def _tensors(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        index = self._index
        with self._reading():
            return fetch_tensors(self._store, index, paths)


class Run:
    """The checkpoints below one URL. `store`: `S3Options`, or a Store of your own."""

    def __init__(self, url: str | os.PathLike[str], *, store: S3Options | Store | None = None) -> None:
        self.url = os.fspath(url)
        self._own = not isinstance(store, Store)
        self._root = root_of(url, store)
        self._store = store if isinstance(store, Store) else open_store(self.url, store)

    def __repr__(self) -> str:
        return f"<Run {self.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give connections back. Checkpoints of this run cannot be read afterwards."""
        if self._own:
            self._store.close()

    def checkpoints(self) -> list[Checkpoint]:
        """All that are not marked as damaged, by step. One LIST; records are read when they are asked for."""
        return [Checkpoint(self._store, step, self._root) for step in find_checkpoints(self._store).good]

    def latest(self) -> Checkpoint | None:
        """The one with the highest step, or None."""
        return next(reversed(self.checkpoints()), None)

    def best(self, metric: str, mode: Literal["min", "max"] = "min") -> Checkpoint | None:
        """The one with the best metric; without it or with NaN a checkpoint does not compete, ties go to the newest.

        A damaged record is passed over with a warning. One of a newer asyncckpt raises `FormatVersionError`: nobody knows its metrics here.
        """
        choice = Best(metric, mode)
        ranked = [checkpoint for checkpoint in self._readable() if choice.rank(checkpoint.metrics) is not None]
        return min(ranked, key=lambda one: (choice.rank(one.metrics), -one.step), default=None)

    def get(self, step: int) -> Checkpoint:
        """The one of this step, also if it is marked as damaged; `CheckpointNotFoundError` if there is none."""
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"get() takes a step's number, not {step!r}; latest() and best() choose one")
        checkpoint = Checkpoint(self._store, step, self._root)
        _ = checkpoint.record
        return checkpoint

    def rewind(self, step: int) -> list[int]:
        """Delete every checkpoint newer than `step`, for good, newest first; the steps that were removed.

        Damaged ones, those of newer formats and what failed saves left at these steps go too; what a remaining checkpoint needs stays.
        Raises `CheckpointNotFoundError`, and deletes nothing, if `step` does not exist. No Saver may be writing.
        """
        self.get(step)
        return rewind(self._store, step)

    def collect_garbage(
        self, older_than: timedelta = timedelta(seconds=leftovers.IDLE_S), *, dry_run: bool = False
    ) -> Leftovers:
        """Delete what writers that died left: folders that no checkpoint needs, and uploads that nobody ended. What was removed.

        Only what nobody touched for `older_than`, by the store's clock: take less than a day only while no Saver is writing there. A Saver does
        this once by itself, with a day. With `dry_run` nothing is deleted, and what would be is returned. One listing of everything; records are
        read only if something seems left over. Folders at and below a step whose record is damaged, or of a newer format, stay (`.undecided`).

        Raises the first `StoreError` after everything else was tried; its notes say what was removed all the same.
        """
        if not isinstance(older_than, timedelta):
            raise TypeError(f"older_than is a datetime.timedelta, such as timedelta(days=1), not {older_than!r}")
        if older_than < timedelta(0):
            raise ValueError(f"older_than is a time that has passed, not {older_than}")
        done = leftovers.collect(self._store, older_than_s=older_than.total_seconds(), dry_run=dry_run)
        if done.failures:
            found = done.leftovers
            error = done.failures[0]
            error.add_note(
                f"{len(done.failures)} removal(s) failed; removed were {len(found.folders)} folder(s), {len(found.uploads)} upload(s)"
            )
            raise error
        return done.leftovers

    def _readable(self) -> Iterator[Checkpoint]:
        for checkpoint in self.checkpoints():
            try:
                _ = checkpoint.record
            except errors.CheckpointNotFoundError:
                continue
            except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
                warn(
                    f"checkpoint {checkpoint.step} cannot be read and was passed over: {type(error).__name__}: {error}",
                    stacklevel=4,
                )
                continue
            yield checkpoint
