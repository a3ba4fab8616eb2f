"""Tables and plots of results that `benchmarks.bench --json` wrote.

    python -m benchmarks.report results.jsonl                     # Markdown on standard output
    python -m benchmarks.report results.jsonl --out report        # report/report.md, and plots beside it

Plots need matplotlib, which the extra `bench` brings; without it the tables are written all the same, and the exit status is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arguments import folder
from benchmarks.reports import lines, tables


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 1 if the plots that were asked for could not be made, 2 if a file holds no results."""
    args = _arguments(words)
    try:
        found = lines.sized(lines.read(args.results))
    except (OSError, lines.ResultsError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"benchmarks.report: no results in {', '.join(map(str, args.results))}", file=sys.stderr)
        return 2
    kept = lines.newest(found)
    older = len(found) - len(kept)
    if args.out is None:
        print(tables.markdown(kept, older=older), end="")
        return 0
    try:
        from benchmarks.reports.plots import draw
    except ImportError as error:
        plots, code = {}, 1
        print(f"benchmarks.report: {error}", file=sys.stderr)
    else:
        plots, code = draw(kept, args.out), 0
    report = args.out / "report.md"
    report.write_text(tables.markdown(kept, older=older, plots=plots))
    print(report)
    return code


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--out", type=folder, metavar="FOLDER", help="write report.md and plots here")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
