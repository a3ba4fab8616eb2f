"""Which codec the next save takes under `codec="auto"`: the one whose saves are durable sooner, by what saves took.

No figure of the store or the machine is asked for. A folder in memory takes bytes faster than an encoder makes them, so
that compression only delays it and takes cores from training; behind a slow link fewer bytes arrive sooner. Which of the
two holds depends on the cores that training leaves, so both are measured, again from time to time. Pure: no clock.
"""

import math
from collections import deque

from asyncckpt.options import Codec, StoredCodec
from asyncckpt.store.base import Store

MIN_BYTES = 32 * 2**20
"""Saves below take as long as their requests do; they say nothing about bytes."""
MARGIN = 0.05
"""The other codec must be faster by this much: less is noise, and the usual one has its reasons (see `usual_codec`)."""
FIRST_TRIAL, LAST_TRIAL = 4, 320
"""Saves until the slower codec is tried again; doubled whenever that changes nothing, or more (`TRIAL_SHARE`): a run of 300 saves has four to six trials."""
SETTLING_SAVES = 5
"""So many saves (of `MIN_BYTES` or more) come before the first that is chosen by what was measured."""
CLEAR = 1.5
"""So many times the usual codec's time leave no doubt: the other one is not measured a second time before the choice."""
TRIAL_SHARE = 0.025
"""Of the time of all saves, what trials of a slower codec may cost while the usual one is taken."""
_LONGEST_FIRST = 40  # saves until a codec that lost by so little knowledge has another chance
_FIRST = 2  # measurements of each, before one is chosen: one alone may have been disturbed
_KEPT = 3  # measurements of each codec: the fastest of them counts, since disturbances only add


def usual_codec(store: Store) -> StoredCodec:
    """What `auto` begins with: `planes` where bytes cross a network and are paid for, `none` where they do not."""
    return "planes" if store.min_part_bytes > 1 else "none"


class CodecChoice:
    """Chooses and learns. A fixed codec is chosen always.

    The first save warms connections and pages and is not counted; the four behind it measure the usual codec and the other in turns,
    fewer if the other one takes `CLEAR` times as long.
    """

    def __init__(self, codec: Codec, usual: StoredCodec) -> None:
        self._fixed: StoredCodec | None = None if codec == "auto" else codec
        self._usual = usual
        self._other: StoredCodec = "none" if usual == "planes" else "planes"
        self._s_per_byte: dict[StoredCodec, deque[float]] = {
            "planes": deque(maxlen=_KEPT),
            "none": deque(maxlen=_KEPT),
        }
        self._warm = False
        self._saves = 0  # since the slower codec was last tried
        self._period = FIRST_TRIAL
        self._best = usual

    @property
    def possible(self) -> tuple[StoredCodec, ...]:
        """Every codec that `choose` may return."""
        return (self._usual, self._other) if self._fixed is None else (self._fixed,)

    def choose(self) -> StoredCodec:
        """The codec of the next save."""
        if self._fixed is not None:
            return self._fixed
        usual, other = len(self._s_per_byte[self._usual]), len(self._s_per_byte[self._other])
        if not self._settled():
            return self._other if other < usual else self._usual
        slower = self._other if self._best == self._usual else self._usual
        return slower if self._saves >= self._period else self._best

    def learn(self, codec: StoredCodec, raw_bytes: int, seconds: float) -> None:
        """A save is committed, `seconds` after its snapshot began and nothing was before it in the queue."""
        if self._fixed is not None or raw_bytes < MIN_BYTES:
            return
        if not self._warm:
            self._warm = True
            return
        self._measured(codec, seconds / raw_bytes)

    def failed(self, codec: StoredCodec) -> None:
        """A save was staged and did not commit: as slow as can be, or one that always fails with this codec would be tried for ever."""
        if self._fixed is None:
            self._warm = True
            self._measured(codec, math.inf)

    def _measured(self, codec: StoredCodec, s_per_byte: float) -> None:
        self._s_per_byte[codec].append(s_per_byte)
        tried = codec != self._best
        best = self._faster()
        if tried and best != self._best:
            self._period = FIRST_TRIAL
        elif tried:
            first = len(self._s_per_byte[codec]) < _KEPT
            earned = self._saves_between_trials() if best == self._usual and self._settled() else 0
            self._period = max(min(2 * self._period, LAST_TRIAL), min(earned, _LONGEST_FIRST if first else LAST_TRIAL))
        self._saves = 0 if tried else self._saves + 1
        self._best = best

    def _settled(self) -> bool:
        """Whether one may be chosen: both were measured often enough, or the other one lost clearly."""
        usual, other = self._s_per_byte[self._usual], self._s_per_byte[self._other]
        return len(other) >= _FIRST or (bool(usual and other) and min(other) > CLEAR * min(usual))

    def _saves_between_trials(self) -> int:
        """So that what a trial takes longer than another save is `TRIAL_SHARE` of the time between two."""
        usual, other = min(self._s_per_byte[self._usual]), min(self._s_per_byte[self._other])
        return LAST_TRIAL if math.isinf(other) else math.ceil((other / usual - 1) / TRIAL_SHARE)

    def _faster(self) -> StoredCodec:
        usual, other = self._s_per_byte[self._usual], self._s_per_byte[self._other]
        if len(other) < _FIRST:
            return self._usual
        return self._other if min(other) < (1 - MARGIN) * min(usual) else self._usual
