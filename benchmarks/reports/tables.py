"""Markdown: the machine, the goals, and one table a scenario with systems as rows."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.measure import Spread
from benchmarks.reports.lines import Line, Verdict, by_scenario

_COLUMNS = 9  # of measures in one table; more are continued in another
_COUNTS = ("saves", "dropped")  # in one column of their own
_ERROR_LETTERS = 300


def markdown(lines: Sequence[Line], *, older: int = 0, plots: dict[str, list[str]] | None = None) -> str:
    """The whole report. `older`: lines left out because the same was measured again. `plots`: file names by scenario."""
    parts = ["# Benchmark results", *_machines(lines), *_goals(lines)]
    if older:
        parts.append(f"{older} earlier line(s) of the same measurement were left out: the last one counts.")
    for scenario, rows in by_scenario(lines).items():
        parts += _scenario(scenario, rows)
        parts += [f"![{name.removesuffix('.png')}]({name})" for name in (plots or {}).get(scenario, [])]
    return "\n\n".join(parts) + "\n"


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


# -- what was run where


def _machines(lines: Sequence[Line]) -> list[str]:
    found = []
    runs: dict[str, list[Line]] = {}
    for line in lines:
        runs.setdefault(_machine(line.machine), []).append(line)
    for machine, rows in runs.items():
        commands = dict.fromkeys((line.date, line.machine.get("commit", "unknown"), line.command) for line in rows)
        table = grid([["date", "commit", "command"], *([date, commit, f"`{word}`"] for date, commit, word in commands)])
        values = ", and ".join(dict.fromkeys(line.values for line in rows if line.values))
        found += [machine, table, *([f"Values of the states: {values}."] if values else [])]
    return found


def _machine(machine: dict[str, Any]) -> str:
    if not machine:
        return "The machine was not noted."
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    memory = f", {machine['memory_bytes'] / 1e9:.0f} GB of memory" if "memory_bytes" in machine else ""
    return (
        f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores{memory}, "
        f"Linux {machine.get('kernel', '?')}{_device(machine)}; Python {machine.get('python', '?')}, {packages}."
    )


def _device(machine: dict[str, Any]) -> str:
    """What `nvidia-smi` said: name, driver, generation and width of its PCIe link, memory."""
    if "gpu" not in machine:
        return ""
    said = machine.get("nvidia_smi", "").splitlines()
    words = said[0].split(", ") if said else []
    if len(words) != 5:
        return f"; {machine['gpu']}, CUDA {machine.get('cuda', '?')}"
    name, driver, generation, width, memory = words
    return f"; {name}, {memory}, PCIe {generation} x{width}, driver {driver}, CUDA {machine.get('cuda', '?')}"


def _goals(lines: Sequence[Line]) -> list[str]:
    goals = [(line, goal) for line in lines for goal in line.goals]
    if not goals:
        return []
    judged = [goal.met for _, goal in goals if goal.met is not None]
    summary = f"**Goals: {sum(judged)} of {len(judged)} met.**"
    if len(judged) < len(goals):
        summary += f" {len(goals) - len(judged)} not judged."
    others = [f"- {line.scenario}, {line.peer}, {line.state}: {_verdict(goal)}" for line, goal in goals if not goal.met]
    return [summary + ("\n\n" + "\n".join(others) if others else "")]


def _verdict(goal: Verdict) -> str:
    sign = ">=" if goal.at_least else "<="
    if goal.value is None:
        return f"not judged, a figure was missing: {goal.text} {sign} {_plain(goal.limit)}"
    doubt = ", **disturbed**" if goal.disturbed else ""
    return (
        f"{'met' if goal.met else '**missed**'}{doubt}: {goal.text}: {_plain(goal.value)} {sign} {_plain(goal.limit)}"
    )


def _plain(value: float) -> str:
    """Four digits that count, without an exponent for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


# -- one scenario


def _scenario(name: str, lines: Sequence[Line]) -> list[str]:
    about = next((line.about for line in lines if line.about), "")
    where = {"state": [line.state for line in lines], "store": [line.store for line in lines]}
    where["main thread"] = [line.loop for line in lines]
    fixed = {title: words[0] for title, words in where.items() if len(set(words)) == 1}
    apart = [title for title in where if title not in fixed]
    found = [f"## {name}", ". ".join(part for part in (about, _fixed(fixed), *_reservations(lines)) if part) + "."]
    measured = [(number, line) for number, line in enumerate(lines) if line.measures]
    names = dict.fromkeys(measure for _, line in measured for measure in line.measures if measure not in _COUNTS)
    for columns in _cut(list(names)):
        rows = [["system", *apart, *map(_title, columns), "saves (dropped)"]]
        for number, line in measured:
            cells = [text(measure, line.measures.get(measure)) for measure in columns]
            rows.append([line.peer, *(where[title][number] for title in apart), *cells, _saves(line)])
        found.append(grid(rows))
    failed = [
        f"- **{'stopped' if line.measures else 'did not run'}**: {_who(line, apart)}: {_short(line.error)}"
        for line in lines
        if line.error
    ]
    goals = [f"- {_who(line, apart)}: {_verdict(goal)}" for line in lines for goal in line.goals]
    return found + (["\n".join(failed)] if failed else []) + (["\n".join(goals)] if goals else [])


def _reservations(lines: Sequence[Line]) -> list[str]:
    """What keeps the rows from being what the heading says, or from being beside each other."""
    found = []
    if factors := {line.settings.get("size", 1) for line in lines} - {1}:
        found.append(f"**The states have {', '.join(f'{factor:g}' for factor in sorted(factors))} times their bytes**")
    machines: dict[str, list[str]] = {}
    commits: dict[str, list[str]] = {}
    for line in lines:
        machines.setdefault(_machine(line.machine), []).append(line.peer)
        commits.setdefault(f"{line.machine.get('commit', 'unknown')} of {line.date[:10]}", []).append(line.peer)
    for what, groups in (("machines", machines), ("commits", commits)):
        if len(groups) > 1:
            rows = "; ".join(f"{name}: {', '.join(dict.fromkeys(peers))}" for name, peers in groups.items())
            found.append(f"**The rows are of several {what}** ({rows.rstrip('.')})")
    return found


def _fixed(words: dict[str, str]) -> str:
    return ", ".join(f"{title} {word}" for title, word in words.items() if word)


def _cut(names: list[str]) -> Iterable[list[str]]:
    tables = max(1, -(-len(names) // _COLUMNS))
    size = max(1, -(-len(names) // tables))
    return (names[start : start + size] for start in range(0, len(names), size))


def _who(line: Line, apart: Sequence[str]) -> str:
    return f"{line.peer}, {line.state}" if "state" in apart else line.peer


def _short(text: str | None) -> str:
    words = " ".join((text or "").split())
    return words if len(words) <= _ERROR_LETTERS else words[:_ERROR_LETTERS] + " ..."


def _saves(line: Line) -> str:
    saves = line.measures.get("saves")
    count = f"{saves.median:.0f}" if saves else str(max(value.samples for value in line.measures.values()))
    return f"{count} ({line.dropped})" if line.dropped else count


# -- figures


def _title(measure: str) -> str:
    """Without the unit, which stands in the cells, except where it is a rate."""
    for unit, words in (("_s_per_gb", "_per GB"), ("gb_per_s", "GB/s"), ("mb_per_s", "MB/s")):
        measure = measure.replace(unit, words)
    return measure.removesuffix("_bytes").removesuffix("_s").replace("_", " ")


def text(measure: str, value: Spread | None) -> str:
    """The median with its unit, and the smallest and largest sample where they differ."""
    if value is None:
        return "-"
    median, least, most = (figure(measure, number) for number in (value.median, value.min, value.max))
    if least == most:
        return median
    if median.partition(" ")[2] == least.partition(" ")[2] == most.partition(" ")[2]:  # one unit for all three
        least = least.partition(" ")[0]
    return f"{median} ({least} .. {most})"


def figure(measure: str, value: float) -> str:
    """With the unit that the measure's name states, three digits that count."""
    if measure.endswith(("_s", "s_per_gb")) and not measure.endswith("per_s"):
        if abs(value) < 1:
            return f"{_digits(value * 1e3)} ms"
        return f"{_digits(value)} s"
    if measure.endswith("_bytes"):
        return f"{_digits(value / 1e6)} MB"
    return _digits(value)


def _digits(value: float) -> str:
    size = abs(value)
    if size >= 99.5 or value == round(value):
        return f"{value:,.0f}"
    if size >= 9.95:
        return f"{value:.1f}"
    if size >= 0.9995:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.0005 else "0"
