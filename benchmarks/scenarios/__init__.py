"""What is measured: `table.py` is the list, as data; a scenario's kind chooses its procedure."""

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import peers
from benchmarks.results import Result
from benchmarks.scenarios import alone, codec, memory, saves
from benchmarks.scenarios.base import Choices, LeftOut, Run, Scenario, SystemFailedError
from benchmarks.scenarios.table import SCENARIOS

__all__ = [
    "CODECS",
    "KINDS",
    "NAMES",
    "SCENARIOS",
    "Choices",
    "LeftOut",
    "SystemFailedError",
    "names",
    "peers_of",
    "refusal",
    "run",
]

CODECS = tuple(codec.CODECS)
KINDS = {"saves": saves.run, "alone": alone.run, "growth": saves.growth, "memory": memory.run, "codec": codec.run}
NAMES = tuple(SCENARIOS)


def names(*, full: bool) -> tuple[str, ...]:
    """Of the quick set, or of all."""
    return tuple(name for name, scenario in SCENARIOS.items() if full or scenario.quick)


def peers_of(name: str) -> tuple[str, ...]:
    """Whom a scenario can measure."""
    return CODECS if SCENARIOS[name].kind == "codec" else peers.NAMES


def refusal(
    name: str,
    *,
    loop: str | None,
    store: str | None,
    saver: bool,
    asked: Sequence[str] | None,
    every: bool = False,
) -> str | None:
    """Why a scenario cannot do what is asked for; None: it can. `saver`: options of asyncckpt's are. `every`: all the peers, instead
    of one of them at least.
    """
    kind = SCENARIOS[name].kind
    if loop is not None and kind in ("memory", "codec"):
        return "its main thread does nothing else (--loop)"
    if store is not None and kind == "codec":
        return "it stores nothing (--store)"
    if saver and kind == "codec":
        return "it has no saver (--workers, --codec)"
    strange = [peer for peer in asked or () if peer not in peers_of(name)]
    if strange and (every or len(strange) == len(asked or ())):
        return f"no {', '.join(strange)}; it has {', '.join(peers_of(name))}"
    return None


def run(name: str, choices: Choices) -> list[Result]:
    """Run one scenario in this process, on a store that is gone afterwards."""
    scenario: Scenario = choices.applied_to(SCENARIOS[name])
    folder = Path(tempfile.mkdtemp(prefix="asyncckpt-bench-", dir=choices.folder))
    choices = replace(choices, folder=folder)
    try:
        with contextlib.ExitStack() as stack:
            return KINDS[scenario.kind](Run(scenario, choices, stack))
    except SystemFailedError as error:
        error.folder = folder
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
