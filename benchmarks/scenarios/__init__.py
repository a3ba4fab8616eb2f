"""What is measured: `table.py` is the list, as data; a scenario's kind chooses its procedure."""

import contextlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import peers
from benchmarks.results import Result
from benchmarks.scenarios import codec, memory, saves
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
    "run",
]

CODECS = tuple(codec.CODECS)
KINDS = {"saves": saves.run, "growth": saves.growth, "memory": memory.run, "codec": codec.run}
NAMES = tuple(SCENARIOS)


def names(*, full: bool) -> tuple[str, ...]:
    """Of the quick set, or of all."""
    return tuple(name for name, scenario in SCENARIOS.items() if full or scenario.quick)


def peers_of(name: str) -> tuple[str, ...]:
    """Whom a scenario can measure."""
    return CODECS if SCENARIOS[name].kind == "codec" else peers.NAMES


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
