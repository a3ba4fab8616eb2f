"""Pictures of results. The one file that imports matplotlib.

Colours are those of Okabe and Ito, which the colour-blind tell apart; every series has a mark or a hatch of its own besides.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reports.lines import Line, Points, by_case, by_scenario, varying
from benchmarks.reports.tables import figure

try:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
except ImportError as error:
    raise ImportError(
        "plots need matplotlib, which the extra `bench` brings: pip install 'asyncckpt[bench]'"
    ) from error

_STAGES = (  # title, measure at its end, colour, hatch
    ("save() holds the caller", "call_s", "#D55E00", ""),
    ("snapshot goes on behind it", "staged_s", "#F0E442", "///"),
    ("the rest until durable", "durable_s", "#0072B2", ""),
)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = "osD^vPX*"
_QUIET = "quiet_"
_LOGARITHMIC = ("tensors",)  # what is varied over orders of magnitude
_MARKED = 50  # points; a curve of more has no marks
_LEGEND_LETTERS = 85
_KEY_LETTERS = 8  # as wide as a legend's mark and the space around it
_DPI = 130
_WORDS = {
    "s_per_gb": "seconds per GB until durable",
    "gb": "GB of state",
    "durable_s": "seconds until durable",
    "tensors": "tensors in the state",
    "memory_bytes": "memory above that before the first save, MB",
    "saves": "saves",
}


def draw(lines: Sequence[Line], folder: Path) -> dict[str, list[str]]:
    """Write the PNGs that the lines have figures for; their names by scenario."""
    found: dict[str, list[str]] = {}
    for scenario, rows in by_scenario(lines).items():
        names = []
        grown = any(_curves(line) for line in rows)
        if not grown and any(_is_staged(line) for line in rows):
            names.append(_save(_stages(scenario, rows), folder, scenario, "stages"))
        over = dict.fromkeys(name for line in rows for name in _curves(line))
        names += [_save(_curve(scenario, series, rows), folder, scenario, series) for series in over]
        for case, case_rows in by_case(rows).items():
            moving = [line for line in case_rows if _through(line)]
            if moving:
                names.append(_save(_speed(scenario, moving), folder, scenario, "speed", *_few(rows, case)))
        if names:
            found[scenario] = names
    return found


def _save(drawing: "plt.Figure", folder: Path, *words: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") + ".png"
    drawing.savefig(folder / name, dpi=_DPI)
    plt.close(drawing)
    return name


def _few(rows: Sequence[Line], case: tuple[str, str, str]) -> list[str]:
    """Words that tell a case from the scenario's others, for a file's name."""
    cases = list(by_case(rows))
    return [varying(cases)[cases.index(case)]] if len(cases) > 1 else []


# -- the stages of a save, one bar a system


def _is_staged(line: Line) -> bool:
    return all(measure in line.measures for _, measure, _, _ in _STAGES)


def _stages(scenario: str, lines: Sequence[Line]) -> "plt.Figure":
    """A panel a case, a bar a system, its segments end where the stages end; a whisker from the fastest to the slowest save."""
    cases = {case: [line for line in rows if _is_staged(line)] for case, rows in by_case(lines).items()}
    cases = {case: rows for case, rows in cases.items() if rows}
    longest = max(line.measures["durable_s"].max for rows in cases.values() for line in rows)
    heights = [len(rows) + 1.1 for rows in cases.values()]
    drawing, panels = plt.subplots(
        len(cases),
        1,
        figsize=(10, 1.6 + 0.5 * sum(heights)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, title, rows in zip(panels[:, 0], varying(cases), cases.values(), strict=True):
        _bars(panel, rows, longest)
        panel.set_title(title, loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("seconds from the call of save(), median; whisker: fastest to slowest save")
    drawing.suptitle(f"{scenario}: where a save's time goes", fontweight="bold")
    keys = [plt.Rectangle((0, 0), 1, 1, facecolor=c, hatch=h, edgecolor="black", lw=0.5) for _, _, c, h in _STAGES]
    drawing.legend(keys, [title for title, _, _, _ in _STAGES], loc="outside lower center", ncols=3, frameon=False)
    return drawing


def _bars(panel: "plt.Axes", rows: Sequence[Line], longest: float) -> None:
    for place, line in enumerate(rows):
        begin = 0.0
        ends = []
        for _, measure, colour, hatch in _STAGES:
            end = max(begin, line.measures[measure].median)
            panel.barh(place, end - begin, left=begin, height=0.6, color=colour, hatch=hatch, edgecolor="black", lw=0.5)
            ends.append(figure(measure, line.measures[measure].median))
            begin = end
        durable = line.measures["durable_s"]
        panel.plot([durable.min, durable.max], [place, place], color="black", lw=1.2, marker="|", markersize=8)
        panel.text(durable.max + 0.012 * longest, place, " / ".join(dict.fromkeys(ends)), va="center", fontsize=9)
    panel.set_yticks(range(len(rows)), [line.peer for line in rows])
    panel.set_xlim(0, longest * 1.32)  # room for the figures behind the bars
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.grid(axis="x", color="#dddddd")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


# -- how a figure grows


def _curves(line: Line) -> list[str]:
    """Series of one figure over another that was varied."""
    return [name for name, points in line.series.items() if "_over_" in name and _spans(points)]


def _spans(points: Points) -> bool:
    return len(points) > 1 and max(x for x, _ in points) > 1.01 * min(x for x, _ in points)


def _curve(scenario: str, series: str, lines: Sequence[Line]) -> "plt.Figure":
    drawing, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    drawn = [line for line in lines if series in _curves(line)]
    cases = list(dict.fromkeys(line.case for line in drawn))
    told_apart = dict(zip(cases, varying(cases), strict=True)) if len(cases) > 1 else {}
    y, x = series.split("_over_")
    scale = 1e-6 if y.endswith("_bytes") else 1.0
    for number, line in enumerate(drawn):
        across, up = zip(*sorted(line.series[series]), strict=True)
        label = ", ".join([line.peer, *([told_apart[line.case]] if told_apart else [])])
        mark = _MARKS[number % len(_MARKS)] if len(across) <= _MARKED else ""
        colour = _COLOURS[number % len(_COLOURS)]
        panel.plot(across, [value * scale for value in up], color=colour, marker=mark, label=label)
    y_words, x_words = (_WORDS.get(word, word.replace("_", " ")) for word in (y, x))
    panel.set(xlabel=x_words, ylabel=y_words)
    if x in _LOGARITHMIC:
        panel.set(xscale="log", yscale="log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,g}")
        panel.grid(which="minor", color="#eeeeee")
    else:
        low, high = panel.get_ylim()
        panel.set_ylim(min(0, low), high * 1.1)
        panel.set_xlim(left=0)
        panel.xaxis.get_major_locator().set_params(integer=x == "saves")
    panel.grid(color="#dddddd")
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(f"{scenario}: {y_words.partition(',')[0]} over {x_words}", fontweight="bold")
    drawing.legend(loc="outside lower center", ncols=_columns(panel), frameon=False)
    return drawing


def _columns(panel: "plt.Axes") -> int:
    """Of a legend below the panel that is not wider than it."""
    longest = max(len(label) for label in panel.get_legend_handles_labels()[1])
    return max(1, min(4, _LEGEND_LETTERS // (longest + _KEY_LETTERS)))


# -- the main loop through a save


def _through(line: Line) -> str | None:
    """The series of the main loop's iterations while saving."""
    names = [n for n in line.series if "_over_" not in n and not n.startswith(_QUIET) and len(line.series[n]) > 1]
    return names[0] if names else None


def _speed(scenario: str, lines: Sequence[Line]) -> "plt.Figure":
    """A panel a system, all of one scale: iterations while saving, and those of the quiet window before, of its median."""
    drawing, panels = plt.subplots(
        len(lines),
        1,
        figsize=(9, 1.8 + 1.7 * len(lines)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for number, (panel, line) in enumerate(zip(panels[:, 0], lines, strict=True)):
        name = _through(line) or ""
        steps = "steps-pre" if name.endswith("_per_s") else "default"  # a value for each iteration, at its end
        quiet, saving = line.series.get(_QUIET + name, []), line.series[name]
        scale = _middle([y for _, y in quiet or saving]) or 1.0
        if quiet:
            panel.plot(*_scaled(quiet, scale), color="#888888", ls=":", lw=1.6, drawstyle=steps)
        colour = _COLOURS[number % len(_COLOURS)]
        panel.plot(*_scaled(saving, scale), color=colour, lw=1.3, drawstyle=steps)
        panel.axhline(1, color="black", lw=0.6)
        panel.set_title(line.peer, loc="left", fontsize=10)
        panel.grid(color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylim(bottom=0)
    drawing.supylabel("speed of the main loop, of the quiet median", fontsize=9)
    panels[-1, 0].set_xlabel("seconds from the beginning of the window")
    drawing.suptitle(f"{scenario}: the main loop's speed through saves\n{lines[0].state}", fontweight="bold")
    keys = [plt.Line2D([], [], color=_COLOURS[0]), plt.Line2D([], [], color="#888888", ls=":", lw=1.6)]
    drawing.legend(keys, ["saving (colour)", "nothing saved"], loc="outside lower center", ncols=2, frameon=False)
    return drawing


def _scaled(points: Points, scale: float) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y / scale for _, y in points]


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(value for value in values if math.isfinite(value))
    return ordered[len(ordered) // 2] if ordered else 0.0
