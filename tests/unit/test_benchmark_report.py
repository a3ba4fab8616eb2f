import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.measure import Spread
from benchmarks.reports import lines, overview, tables
from benchmarks.scenarios import SCENARIOS
from benchmarks.stages.base import Limit, Stage, table, total

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]
OLDER = ROOT / "benchmarks" / "results" / "2026-11-21-2cores.jsonl"
STAGED = {"call_s": 0.002, "staged_s": 0.1, "durable_s": {"median": 2.0, "min": 1.5, "max": 2.5, "samples": 3}}
MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "memory_bytes": 25e9,
    "kernel": "6.1",
    "python": "3.11",
    "packages": {"torch": "2.13"},
    "commit": "0123456789ab",
}


def row(**changes):
    line = {
        "scenario": "idle",
        "about": "beside an idle main thread",
        "state": "dense",
        "store": "tmpfs",
        "loop": "idle",
        "peer": "asyncckpt",
        "measures": STAGED,
        "series": {},
        "goals": [],
        "settings": {"raw_bytes": 10**9},
        "error": None,
        "date": "2026-11-21T00:00:00Z",
        "command": "python -m benchmarks.bench idle",
        "values": "a trained model",
        "machine": MACHINE,
    }
    return line | changes


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


def text(path: Path, capsys: pytest.CaptureFixture) -> str:
    assert report.main([str(path)]) == 0
    return capsys.readouterr().out


def cells(document: str, system: str) -> list[str]:
    (line,) = [line for line in document.splitlines() if line.startswith(f"| {system} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


# -- tables


def test_a_row_holds_medians_with_the_smallest_and_largest_sample(tmp_path, capsys):
    found = cells(text(write(tmp_path / "r", row()), capsys), "asyncckpt")
    assert found == ["asyncckpt", "2 ms", "100 ms", "2 s (1.50 .. 2.50 s)", "3"]


def test_samples_of_different_units_keep_their_units():
    assert tables.text("durable_s", Spread(0.9, 0.8, 1.2, 3)) == "900 ms (800 ms .. 1.20 s)"
    assert tables.text("stored_bytes", Spread(8e8, 8e8, 8e8, 3)) == "800 MB"
    assert tables.text("encode_gb_per_s", Spread(1.234, 1.1, 1.3, 3)) == "1.23 (1.10 .. 1.30)"


def test_dropped_samples_are_shown_beside_the_saves(tmp_path, capsys):
    measures = STAGED | {"saves": 5.0, "dropped": 2.0}
    assert cells(text(write(tmp_path / "r", row(measures=measures)), capsys), "asyncckpt")[-1] == "5 (2)"


def test_a_goal_that_was_not_met_is_told_at_the_top_and_in_its_scenario(tmp_path, capsys):
    goals = [
        {"text": "durable, of the best peer's", "value": 1.2, "limit": 1.0, "at_least": False, "met": False},
        {"text": "main loop's speed", "value": 0.98, "limit": 0.97, "at_least": True, "met": True},
        {"text": "of the other's", "value": None, "limit": 1.0, "at_least": False, "met": None},
    ]
    document = text(write(tmp_path / "r", row(goals=goals)), capsys)
    assert "**Goals: 1 of 2 met.** 1 not judged." in document
    assert document.count("not judged, a figure was missing: of the other's <= 1") == 2
    assert document.count("**missed**: durable, of the best peer's: 1.2 <= 1") == 2
    assert "- asyncckpt: met: main loop's speed: 0.98 >= 0.97" in document


def test_a_system_that_did_not_run_is_told_with_its_error_and_has_no_row(tmp_path, capsys):
    broken = row(peer="other", measures={}, error="ImportError: no module\nnamed other")
    document = text(write(tmp_path / "r", row(), broken), capsys)
    assert "- **did not run**: other: ImportError: no module named other" in document
    assert "| other |" not in document


def test_the_top_tells_machine_versions_commit_date_and_command(tmp_path, capsys):
    top = text(write(tmp_path / "r", row()), capsys).partition("## idle")[0]
    for words in ("a processor, 2 cores, 25 GB", "torch 2.13", "0123456789ab", "2026-11-21T00:00:00Z", "bench idle"):
        assert words in top


def test_of_two_runs_of_the_same_the_last_one_counts(tmp_path, capsys):
    document = text(write(tmp_path / "r", row(), row(measures=STAGED | {"call_s": 0.005})), capsys)
    assert cells(document, "asyncckpt")[1] == "5 ms"
    assert "1 earlier line(s)" in document


def test_a_table_says_that_its_states_are_smaller_and_its_rows_of_several_machines_or_commits(tmp_path, capsys):
    plain = text(write(tmp_path / "plain.jsonl", row(), row(peer="torch.save")), capsys)
    assert "times their bytes" not in plain
    assert "of several" not in plain
    other = MACHINE | {"cpu": "another processor", "commit": "fedcba987654"}
    mixed = [row(settings={"raw_bytes": 10**8, "size": 0.1}), row(peer="torch.save", machine=other)]
    said = text(write(tmp_path / "mixed.jsonl", *mixed), capsys)
    assert "The states have 0.1 times their bytes" in said
    assert "The rows are of several machines" in said
    assert "0123456789ab of 2026-11-21: asyncckpt; fedcba987654 of 2026-11-21: torch.save" in said


def test_states_of_one_name_and_several_sizes_are_told_apart(tmp_path, capsys):
    sizes = [row(settings={"raw_bytes": size}) for size in (3 * 10**8, 4 * 10**9)]
    document = text(write(tmp_path / "r", *sizes), capsys)
    assert "| asyncckpt | dense, 0.3 GB |" in document
    assert "| asyncckpt | dense, 4 GB |" in document


def test_every_table_is_well_formed_whatever_number_of_measures(tmp_path, capsys):
    many = {f"measure_{number}_s": 0.1 * number for number in range(25)}
    document = text(write(tmp_path / "r", row(measures=many), row(peer="a|b", measures=many)), capsys)
    for block in re.findall(r"(?:^\|.*\n)+", document, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert all(f"measure {number} " in document for number in range(25))


def test_the_results_of_the_earlier_schema_are_read(capsys):
    document = text(OLDER, capsys)
    assert len(re.findall("^## ", document, re.MULTILINE)) == 4
    assert cells(document, "asyncckpt | 1 GB in 150 tensors")[2].startswith("0.838 ms (")
    assert "**Goals: 6 of 8 met.**" in document


def test_a_line_that_is_no_result_is_named(tmp_path, capsys):
    path = write(tmp_path / "r", row(), {"scenario": "idle"})
    assert report.main([str(path)]) == 2
    assert f"{path}:2 is no result: KeyError" in capsys.readouterr().err
    assert report.main([str(tmp_path / "absent")]) == 2


def test_a_file_that_is_no_text_and_a_figure_that_is_no_number_are_named(tmp_path, capsys):
    binary = tmp_path / "plot.png"
    binary.write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    assert report.main([str(binary)]) == 2
    assert f"{binary} holds no results: it is no text" in capsys.readouterr().err
    figure = {"median": "fast", "min": 1.0, "max": 2.0, "samples": 3}
    path = write(tmp_path / "r", row(measures={"durable_s": figure}))
    assert report.main([str(path)]) == 2
    assert f"{path}:1 is no result: ValueError" in capsys.readouterr().err


# -- plots


def test_without_matplotlib_the_tables_are_made_and_the_extra_is_named(tmp_path):
    results = write(tmp_path / "r", row())
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from benchmarks import report; sys.exit(report.main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", program, str(results), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'asyncckpt[bench]'" in done.stderr
    assert "| asyncckpt |" in (tmp_path / "out" / "report.md").read_text()


def test_plots_are_drawn_for_stages_growth_and_the_main_loop_and_linked(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    grown = {
        "s_per_gb_over_gb": [[0.3, 1.2], [4.0, 1.1]],
        "durable_s_over_tensors": [[450, 0.4], [450, 4.4]],  # the count does not vary: no plot
    }
    counted = {"durable_s_over_tensors": [[150, 0.4], [100_002, 1.4]]}
    loop = {"quiet_iterations_per_50ms": [[0.0, 100], [0.05, 90]], "iterations_per_50ms": [[0.0, 80], [0.05, 0]]}
    results = write(
        tmp_path / "r",
        row(),
        row(peer="other", measures={}, error="did not start"),
        row(scenario="sizes", state="all of them", measures={"s_per_gb": 1.1}, series=grown),
        row(scenario="counts", state="all of them", measures={"s_per_gb": 1.1}, series=counted),
        row(scenario="python", loop="python", series=loop),
    )
    out = tmp_path / "out"
    assert report.main([str(results), "--out", str(out)]) == 0
    drawn = {path.name for path in out.glob("*.png")}
    assert drawn == {
        "idle-stages.png",
        "sizes-s-per-gb-over-gb.png",
        "counts-durable-s-over-tensors.png",
        "python-stages.png",
        "python-speed.png",
    }
    assert set(re.findall(r"\]\((.+?\.png)\)", (out / "report.md").read_text())) == drawn
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_cases_are_named_by_what_tells_them_apart():
    assert lines.varying([("dense", "tmpfs", "idle"), ("dense", "disk", "idle")]) == ["store tmpfs", "store disk"]
    assert lines.varying([("dense", "tmpfs", "idle")]) == ["dense, store tmpfs, main thread idle"]


# -- the table of stages


def test_a_stage_is_held_against_its_limit_by_the_fastest_runs():
    memcpy = Stage("Memory", "memcpy", 10**9, 10**9, Spread(0.2, 0.1, 0.3, 3), 0.1)
    limit = total("both", memcpy, memcpy, divided_by=2)
    put = Stage("Way", "put", 10**9, 5 * 10**8, Spread(0.5, 0.4, 0.6, 3), 0.25, limit)
    assert limit == Limit("both", 0.1)
    assert put.gb_per_s == 1.0
    assert "| put | 1.00 | 0.5 (0.4 .. 0.6) | 0.25 | both: 0.1 | 25% |" in table([memcpy, put])


# -- the overview


def test_the_overview_has_a_column_for_each_system_and_leaves_out_ours_set_otherwise(tmp_path):
    path = write(
        tmp_path / "r",
        row(measures=STAGED | {"restore_s": 0.4}),
        row(peer="asyncckpt-planes"),
        row(peer="torch.save", measures={"durable_s": 0.3, "disturbed": 2.0}),
        row(scenario="wan", store="wan", peer="s3torchconnector", measures={"durable_s": 1.6}),
    )
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table_of(path)]
    assert found == [
        ["1 GB of fp32 weights and AdamW state", "asyncckpt", "torch.save", "s3torchconnector"],
        ["---", "---", "---", "---"],
        ["`save()` returns", "2 ms", "", ""],
        ["durable in memory", "2 s (1.50 .. 2.50 s)", "300 ms*", ""],
        ["restored from memory", "400 ms", "", ""],
        ["S3 with 30 ms a request and 90 MB/s a connection: durable", "", "", "1.60 s"],
        [""],
        [r"\* Other processes disturbed every round, or the system stopped with an error."],
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"store": "disk"},
        {"loop": "python"},
        {"settings": {"size": 0.1}},
        {"settings": {"workers": 1}},
        {"settings": {"warm": False}},
        {"settings": {"codec": "planes"}},
        {"measures": {"encode_gb_per_s": 1.0}},
    ],
)
def test_the_overview_shows_no_scenario_that_was_run_otherwise(tmp_path, other):
    assert table_of(write(tmp_path / "r", row(**other))) == []


def test_the_overview_shows_the_last_state_that_was_saved_on_a_device_in_a_table_of_its_own(tmp_path):
    gpu = {"scenario": "gpu", "loop": "train", "state": "GPT, on cuda", "settings": {"raw_bytes": 4.86e9}}
    path = write(
        tmp_path / "r",
        row(),
        row(**gpu | {"state": "GPT, small, on cuda"}, peer="dcp-thread", measures={"stall_s": 0.001}),
        row(**gpu, measures={"stall_s": 0.04, "d2h_gbps": 53.7}),
        row(**gpu, peer="torch.save", measures={"stall_s": 4.5}),
    )
    host, device = overview.table(lines.read([path])).split("\n\n")
    assert "1 GB of fp32 weights" in host
    assert device.splitlines() == [
        "| 4.9 GB: GPT, on cuda | asyncckpt | torch.save |",
        "|---|---|---|",
        "| what it adds to that training step | 40 ms | 4.50 s |",
        "| snapshots leave the device at, GB/s | 53.7 |  |",
    ]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "NVIDIA H200, 580.159.04, 5, 16, 143771 MiB",
            "; NVIDIA H200, 143771 MiB, PCIe 5 x16, driver 580.159.04, CUDA 13.0;",
        ),
        ("", "; NVIDIA H200, CUDA 13.0;"),
        ("NVIDIA H200, driver, unknown", "; NVIDIA H200, CUDA 13.0;"),
    ],
)
def test_a_report_names_the_device(tmp_path, capsys, said, shown):
    machine = MACHINE | {"gpu": "NVIDIA H200", "cuda": "13.0", "nvidia_smi": said}
    assert shown in text(write(tmp_path / "r", row(machine=machine)), capsys)


def test_the_overview_shows_scenarios_where_they_run_by_themselves():
    for shown in overview.ROWS:
        scenario = SCENARIOS[shown.scenario]
        assert (shown.loop, shown.store) == (scenario.loop, scenario.store)


def test_the_readme_shows_what_the_quick_set_and_the_run_on_a_device_end_with():
    results, readme = ROOT / "benchmarks" / "results", (ROOT / "README.md").read_text()
    assert overview.table(lines.read([max(results.glob("*/quick.jsonl"))])) in readme
    assert overview.table(lines.read([max(results.glob("*/gpu.jsonl"))])) in readme


def table_of(path: Path) -> list[str]:
    return overview.table(lines.read([path])).splitlines()
