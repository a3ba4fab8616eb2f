"""One table over all scenarios, and one of a CUDA device, a column a system: what `make bench` and `benchmarks.gpu` end with, and what the README shows."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.reports.lines import Line, newest
from benchmarks.reports.tables import grid, text


@dataclass(frozen=True, slots=True)
class Row:
    """A measure of a scenario on its own store and beside its own main thread, and how it is called here."""

    title: str
    scenario: str
    measure: str
    loop: str = "idle"
    store: str = "tmpfs"


ROWS = (
    Row("`save()` returns", "idle", "call_s"),
    Row("durable in memory", "idle", "durable_s"),
    Row("restored from memory", "idle", "restore_s"),
    Row("bytes stored, of raw bytes", "idle", "stored_ratio"),
    Row("main thread in pure Python: snapshot complete", "python", "staged_s", loop="python"),
    Row("main thread in pure Python: durable", "python", "durable_s", loop="python"),
    Row("main thread in pure Python: its speed while saving", "python", "main_speed", loop="python"),
    Row("main thread in pure Python: what a save costs it", "python", "lost_s", loop="python"),
    Row("training on all cores: durable", "train", "durable_s", loop="train"),
    Row("training on all cores: its speed while saving", "train", "main_speed", loop="train"),
    Row("training on all cores: its speed between saves", "train", "quiet_speed", loop="train"),
    Row("training on all cores: what a save costs it", "train", "lost_s", loop="train"),
    Row("S3 with 30 ms a request and 90 MB/s a connection: durable", "wan", "durable_s", store="wan"),
    Row("the same S3: restored", "wan", "restore_s", store="wan"),
    Row("memory above the state and its copy", "memory", "peak_beyond_state_bytes"),
    Row("200 MB in 20,000 tensors: `save()` returns", "small", "call_s"),
    Row("200 MB in 20,000 tensors: durable", "small", "durable_s"),
)
ON_A_DEVICE = tuple(
    Row(title, "gpu", measure, loop="train")
    for title, measure in (
        ("`save()` returns", "call_s"),
        ("what it adds to that training step", "stall_s"),
        ("what a save costs the training, until it is durable", "lost_s"),
        ("snapshots leave the device at, GB/s", "d2h_gbps"),
        ("durable in memory", "durable_s"),
        ("restored to the device", "restore_s"),
    )
)
_OURS_SET_OTHERWISE = "asyncckpt-"
_STARRED = r"\* Other processes disturbed every round, or the system stopped with an error."


def table(lines: Iterable[Line]) -> str:
    """Markdown; empty where no line has a figure for it. Of lines that measure the same the last counts. Systems that are asyncckpt with
    other settings are left out; a figure of a system that other processes disturbed in every round, or that stopped with an error, has a
    star. What is saved on a device may have any size: the last one in memory is shown, in a table of its own.
    """
    everything = list(lines)
    known = [line for line in newest(everything) if not line.peer.startswith(_OURS_SET_OTHERWISE)]
    tables = [_one("1 GB of fp32 weights and AdamW state", known, ROWS)]
    shown = [line for line in everything if any(_has(line, row) for row in ON_A_DEVICE)]
    if shown:
        last = shown[-1]
        head = f"{last.settings['raw_bytes'] / 1e9:.1f} GB: {last.state}"
        same = [line for line in known if (line.scenario, line.case, line.command) == ("gpu", last.case, last.command)]
        tables.append(_one(head, same, ON_A_DEVICE))
    return "\n\n".join(filter(None, tables))


def _one(head: str, known: list[Line], wanted: tuple[Row, ...]) -> str:
    found = {row: {line.peer: _cell(line, row) for line in known if _has(line, row)} for row in wanted}
    shown = {row: cells for row, cells in found.items() if cells}
    systems = [peer for peer in dict.fromkeys(line.peer for line in known) if any(peer in c for c in shown.values())]
    rows = [[row.title, *(cells.get(system, "") for system in systems)] for row, cells in shown.items()]
    if not rows:
        return ""
    starred = any("*" in cell for row in rows for cell in row[1:])
    return grid([[head, *systems], *rows]) + ("\n\n" + _STARRED if starred else "")


def _has(line: Line, row: Row) -> bool:
    place = (row.scenario, row.loop, row.store)
    return (line.scenario, line.loop, line.store) == place and _is_usual(line.settings) and row.measure in line.measures


def _is_usual(settings: dict[str, Any]) -> bool:
    of_asyncckpt = settings.get("workers") or settings.get("codec")
    return settings.get("size", 1) == 1 and settings.get("warm", True) and not of_asyncckpt


def _cell(line: Line, row: Row) -> str:
    return text(row.measure, line.measures[row.measure]) + ("*" if "disturbed" in line.measures or line.error else "")
