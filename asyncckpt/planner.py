"""Plans of states, made once for each structure and codec, and ahead of the save that needs them."""

import collections
import contextlib
import dataclasses
import itertools
import mmap
from collections.abc import Callable
from dataclasses import dataclass

from asyncckpt.engine.choice import CodecChoice
from asyncckpt.errors import UnsupportedObjectError
from asyncckpt.format import limits
from asyncckpt.format.digest import DIGEST_BYTES
from asyncckpt.format.plan import SHARD_BYTES, Plan, Structure, plan
from asyncckpt.options import StoredCodec

_MAX_PLANS = 16


@dataclass(frozen=True, slots=True)
class Planned:
    """A structure under one codec. `number`: by which the engine knows it."""

    number: int
    structure: Structure
    plan: Plan


class Planner:
    """Keeps the last plans. `forgotten` is called with one that is kept no longer.

    Thread-safe without a lock: a signal handler may come in the middle of a call, and then nobody could plan until it returns. Two threads
    may make the same plan at once; the first of the two is kept.
    """

    def __init__(self, choice: CodecChoice, forgotten: Callable[[Planned], None]) -> None:
        self._choice = choice
        self._forgotten = forgotten
        self._numbers = itertools.count(1)
        self._known: collections.OrderedDict[tuple[int, StoredCodec], Planned] = collections.OrderedDict()

    def next(self, structure: Structure) -> Planned:
        """For the save that begins now."""
        return self._planned(structure, self._choice.choose())

    def ahead(self, structure: Structure) -> None:
        """Make what later saves may need: 20,000 tensors take 0.2 s, which `save()` should not."""
        for codec in self._choice.possible:
            with contextlib.suppress(UnsupportedObjectError):  # the save that chooses this codec says so
                self._planned(structure, codec)

    def _planned(self, structure: Structure, codec: StoredCodec) -> Planned:
        known = self._known.get((id(structure), codec))
        if known is not None:
            return known
        made = plan(structure, codec=codec)
        _check_headers(made)
        for other in self._choice.possible:
            sibling = self._known.get((id(structure), other))
            if sibling is not None and sibling.plan.tensor_offsets == made.tensor_offsets:
                # one and the same object: what the copier keeps for the one serves the other
                made = dataclasses.replace(made, tensor_offsets=sibling.plan.tensor_offsets)
        known = self._known.setdefault((id(structure), codec), Planned(next(self._numbers), structure, made))
        if len(self._known) > _MAX_PLANS:
            with contextlib.suppress(KeyError):  # emptied meanwhile
                self._forgotten(self._known.popitem(last=False)[1])
        return known


def _check_headers(made: Plan) -> None:
    for shard in made.shards:
        if len(shard.header) > limits.HEADER_BYTES:
            paths = {made.structure.path(chunk.tensor) for chunk in shard.chunks}
            longest = max(paths, key=len)
            raise UnsupportedObjectError(
                f"the names of the {len(paths)} tensors in one shard take {len(shard.header)} bytes, above the limit of "
                f"{limits.HEADER_BYTES} that readers of safetensors have; the longest has {len(longest)} characters. Use shorter keys",
                key=longest[:200],
            )


def room_bytes(layout: Plan) -> int:
    """Bytes of an arena that holds this state under any codec: one that cuts more tensors has more digests."""
    more_digests = DIGEST_BYTES * (layout.data_bytes // SHARD_BYTES.start)
    return layout.arena_bytes + -(-(more_digests + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
