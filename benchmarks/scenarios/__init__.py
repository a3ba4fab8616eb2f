"""What is measured, one file each: `run(context)` returns a result of every system, with the goals that were stated for it."""

import importlib

from benchmarks.results import Result
from benchmarks.scenarios.base import Context

NAMES = ("ratio", "call_time", "busy", "small", "memory")


def run(name: str, context: Context) -> list[Result]:
    """Run one scenario in this process."""
    found: list[Result] = importlib.import_module(f"benchmarks.scenarios.{name}").run(context)
    return found


def about(name: str) -> str:
    """The first line of its documentation."""
    text = importlib.import_module(f"benchmarks.scenarios.{name}").__doc__ or ""
    return text.strip().partition("\n")[0]
