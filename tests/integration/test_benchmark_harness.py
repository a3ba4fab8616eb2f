"""The benchmark's own sums: goals, dropped samples, and a run from the command line to its lines of JSON."""

import contextlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from benchmarks import peers, scenarios, stores
from benchmarks.bench import _options_alone
from benchmarks.loops import BIN_S, LOOPS, Window
from benchmarks.measure import Memory, Spread, spread
from benchmarks.peers.base import Saving
from benchmarks.results import Goal, Result, table
from benchmarks.scenarios import CODECS, KINDS, SCENARIOS, Choices, alone, codec, memory, names, refusal, saves
from benchmarks.scenarios.base import BitsDifferError, Run, System, Verifier, in_child
from benchmarks.scenarios.codec import _Zstd
from benchmarks.scenarios.goals import ASYNCHRONOUS, EVERYBODY, GoalSpec, judge
from benchmarks.scenarios.rounds import Bench, one_round
from benchmarks.scenarios.samples import FOREIGN_CORES, Round, Samples, Save
from benchmarks.states import State, StateSpec, build
from tests.eager import Eager
from tests.processes import PATIENCE_S, alive, command_of, descendants, eventually

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parent.parent.parent


def one(peer: str, asynchronous: bool = True, **measures: float) -> Result:
    spreads = {name: spread([value]) for name, value in measures.items()}
    return Result("saves", "state", peer, spreads, settings={"asynchronous": asynchronous})


def round_of(*durable_s: float, foreign_cores: float = 0.0, **found: float) -> Round:
    saves = tuple(Save(call_s=0.001, staged_s=0.1, durable_s=value, stored_bytes=80) for value in durable_s)
    return Round(saves, foreign_cores=foreign_cores, **found)


# -- the table


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_every_scenario_names_what_exists(scenario):
    known = CODECS if scenario.kind == "codec" else peers.NAMES
    everybody = {*scenario.peers, *(scenario.full_peers or ())}
    assert everybody <= set(known)
    assert scenario.kind in KINDS
    assert scenario.loop in LOOPS
    assert scenario.store in (*stores.NAMES, "discard")
    assert scenario.states
    assert scenario.rounds > 0
    for goal in scenario.goals:
        assert goal.peer in everybody
        assert set(goal.against) <= {ASYNCHRONOUS, EVERYBODY, *known}
        assert goal.text


def test_the_quick_set_is_part_of_the_full_set():
    assert set(names(full=False)) < set(names(full=True)) == set(SCENARIOS)


def test_another_loop_store_size_or_setting_takes_the_goals_away():
    scenario = SCENARIOS["python"]
    assert Choices(ROOT).applied_to(scenario).goals
    assert not Choices(ROOT, loop="torch").applied_to(scenario).goals
    assert not Choices(ROOT, store="disk").applied_to(scenario).goals
    assert not Choices(ROOT, workers=1).applied_to(scenario).goals
    assert Choices(ROOT, codec="planes").applied_to(scenario).codec == "planes"
    assert not Choices(ROOT, size=0.1).applied_to(scenario).goals
    smaller = Choices(ROOT, size=0.1, rounds=9, peers=("torch.save",)).applied_to(scenario)
    assert smaller.states[0].raw_bytes == scenario.states[0].raw_bytes // 10
    assert (smaller.rounds, smaller.peers) == (9, ("torch.save",))
    assert Choices(ROOT, full=True).applied_to(scenario).peers == scenario.full_peers
    assert (scenario.kind, Choices(ROOT, loop="train").applied_to(scenario).kind) == ("saves", "alone")


# -- goals


def test_a_goal_against_the_best_asynchronous_peer_leaves_out_blocking_ones_and_ourselves():
    results = [
        one("asyncckpt", durable_s=1.0),
        one("asyncckpt-none", durable_s=0.1),
        one("dcp-thread", durable_s=4.0),
        one("dcp-process", durable_s=2.0),
        one("torch.save", asynchronous=False, durable_s=0.5),
    ]
    among = GoalSpec("durable", "durable_s", 0.5, against=(ASYNCHRONOUS,))
    assert judge(among, results) == Goal("durable", 0.5, 0.5)
    everybody = judge(GoalSpec("durable", "durable_s", 0.5, against=(EVERYBODY,)), results)
    assert everybody is not None
    assert (everybody.value, everybody.met) == (2.0, False)
    other = judge(GoalSpec("durable", "durable_s", 0.5, against=("dcp-thread",), peer="asyncckpt-none"), results)
    assert other is not None
    assert other.value == pytest.approx(0.025)


def test_a_goal_that_wants_more_is_beside_the_highest():
    results = [one("asyncckpt", main_speed=0.9), one("a", main_speed=0.5), one("b", main_speed=1.0)]
    goal = judge(GoalSpec("speed", "main_speed", 0.97, at_least=True, against=(EVERYBODY,)), results)
    assert goal is not None
    assert (goal.value, goal.met) == (0.9, False)


def test_a_goal_may_divide_by_another_measure_of_the_same_system():
    results = [one("asyncckpt", staged_s=0.11, copy_s=0.1)]
    goal = judge(GoalSpec("snapshot", "staged_s", 1.2, of="copy_s"), results)
    assert goal is not None
    assert goal.value == pytest.approx(1.1)
    assert goal.met


def test_a_goal_without_its_figures_is_listed_and_neither_met_nor_missed():
    results = [one("asyncckpt", durable_s=1.0)]
    goal = judge(GoalSpec("durable", "durable_s", 1.0, against=(ASYNCHRONOUS,)), results)
    assert goal is not None
    assert (goal.value, goal.met) == (None, None)
    assert "not judged" in str(goal)
    assert judge(GoalSpec("restore", "restore_s", 1.0), results) == Goal("restore", None, 1.0)
    assert judge(GoalSpec("durable", "durable_s", 1.0, peer="asyncckpt-none"), results) is None


def test_a_goal_says_that_one_of_its_systems_was_disturbed():
    ours, rival = one("asyncckpt", durable_s=1.0), one("dcp-thread", durable_s=4.0)
    spec = GoalSpec("durable", "durable_s", 0.5, against=(ASYNCHRONOUS,))
    quiet = judge(spec, [ours, rival])
    assert quiet is not None
    assert not quiet.disturbed
    rival.measures["disturbed"] = 1.0
    goal = judge(spec, [ours, rival])
    assert goal is not None
    assert (goal.disturbed, goal.met) == (True, True)
    assert "disturbed" in str(goal)
    assert goal.to_json()["disturbed"] is True
    other = judge(spec, [ours, rival, one("dcp-process", durable_s=2.0)])
    assert other is not None
    assert not other.disturbed, "the one that it is held against was not"


def test_memory_is_flat_only_if_there_are_saves_to_say_so():
    def looks(saves: int) -> list[memory._Look]:
        return [memory._Look(save, Memory(1000 + save, 0), 10, 3) for save in range(1, saves + 1)]

    start = memory._Look(0, Memory(0, 0), 10, 3)
    assert "growth_bytes" not in memory._measures(start, looks(5), 2000, 100)
    found = memory._measures(start, looks(8), 2000, 100)
    assert (found["growth_bytes"], found["descriptor_drift"]) == (3.0, 0.0)


def test_the_growth_over_some_of_the_sizes_is_not_that_over_all(monkeypatch):
    specs = tuple(StateSpec(str(size), size * 10**9) for size in (1, 2, 4))
    scenario = replace(SCENARIOS["sizes"], states=specs)
    missing: list[str] = []

    def compared(_context: object, spec: StateSpec) -> list[Result]:
        if spec.name in missing:
            return [Result("sizes", spec.name, "asyncckpt", {}, error="MemoryError")]
        settings = {"raw_bytes": spec.raw_bytes, "tensors": 3}
        return [
            Result("sizes", spec.name, "asyncckpt", {"durable_s": spread([spec.raw_bytes / 1e9])}, settings=settings)
        ]

    monkeypatch.setattr(saves, "_compare", compared)
    with contextlib.ExitStack() as stack:
        context = Run(scenario, Choices(ROOT), stack)
        for growth in (1.0, None):
            line = saves.growth(context)[-1]
            assert line.measures.get("s_per_gb_growth") == growth
            assert [goal.value for goal in line.goals] == [growth]
            missing.append("4")


def test_another_system_begins_in_every_round():
    assert [saves.turned("abc", by) for by in (0, 1, 4)] == [["a", "b", "c"], ["b", "c", "a"], ["b", "c", "a"]]


@pytest.mark.slow
def test_systems_that_are_measured_alone_have_processes_of_their_own(monkeypatch, tmp_path, capfd):
    small = StateSpec("small", 4_000_000, 4)
    scenario = replace(
        SCENARIOS["train"], states=(small,), peers=("torch.save", "safetensors"), rounds=1, loop="python", goals=()
    )
    monkeypatch.setitem(SCENARIOS, "train", scenario)
    found = scenarios.run("train", Choices(tmp_path, warm=False))
    assert [result.peer for result in found] == ["torch.save", "safetensors"]
    for result in found:
        assert result.error is None
        assert result.settings["rounds"] == 1
        for measure in ("main_speed", "quiet_speed", "lost_s"):
            assert result.measures[measure].samples >= 1
    said = [line.split()[2] for line in capfd.readouterr().err.splitlines() if "1/1" in line]
    assert [name for name, _ in itertools.groupby(said)] == ["torch.save", "safetensors"]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_system_that_fails_alone_is_a_line_with_its_error_and_is_not_tried_again(monkeypatch, tmp_path, capfd):
    scenario = replace(SCENARIOS["train"], states=(StateSpec("vast", 10**15, 4),), peers=("torch.save",), rounds=3)
    monkeypatch.setitem(SCENARIOS, "train", scenario)
    (result,) = scenarios.run("train", Choices(tmp_path, warm=False))
    assert result.error is not None
    assert "free memory" in result.error
    assert "left out" not in capfd.readouterr().err


def test_rounds_in_processes_of_their_own_become_one_line_and_one_that_fails_keeps_what_it_had(monkeypatch, tmp_path):
    asked, state = [], StateSpec("small", 1000, 4)

    def child(context, spec, name):
        asked.append(name)
        if asked.count("dies") == 2 and name == "dies":
            return context.result(spec, None, name, measures={}), Samples(error="BrokenProcessPool: killed")
        seconds = float(len(asked))
        save = Save(call_s=0.1, staged_s=0.1, durable_s=seconds, stored_bytes=500)
        settings = {"raw_bytes": 1000, "asynchronous": True, "rounds": 1}
        line = context.result(spec, None, name, measures={}, settings=settings)
        return line, Samples([Round((save,), speed=0.9, quiet_speed=1.0)])

    monkeypatch.setattr(alone, "_in_child", child)
    scenario = replace(SCENARIOS["train"], states=(state,), peers=("lives", "dies"), rounds=3, goals=())
    with contextlib.ExitStack() as stack:
        lives, dies = alone.run(Run(scenario, Choices(tmp_path), stack))
    assert asked == ["lives", "dies", "dies", "lives", "lives"], "in turns, and who failed is not tried again"
    assert lives.measures["durable_s"] == Spread(4.0, 1.0, 5.0, 3)
    assert dies.measures["durable_s"] == Spread(2.0, 2.0, 2.0, 1)
    assert (lives.error, dies.error) == (None, "BrokenProcessPool: killed")
    assert [one.settings["rounds"] for one in (lives, dies)] == [3, 3]
    assert dies.settings["asynchronous"], "what it is was known before it died"


def test_assert_is_refused_where_no_goal_stands():
    words = [sys.executable, "-m", "benchmarks.bench", "idle", "--assert", "--size", "0.1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the goals stand for the scenarios as they are" in done.stderr


def test_a_peer_that_a_scenario_does_not_know_is_refused_with_those_it_knows():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench", "idle", "--peers", "zipnn"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "scenario idle: no zipnn; it has asyncckpt, " in done.stderr


def test_options_of_a_saver_are_refused_where_there_is_none():
    asked = {"loop": None, "store": None, "asked": None}
    assert refusal("codec", saver=True, **asked) == "it has no saver (--workers, --codec)"
    assert refusal("codec", saver=False, **asked) is None
    assert refusal("flat", saver=True, **asked) is None


def test_an_encoder_that_cannot_go_on_is_a_line_with_its_error(monkeypatch, tmp_path):
    class Broken(_Zstd):
        def encode(self) -> int:
            raise RuntimeError("no room")

    monkeypatch.setitem(codec.CODECS, "zstd-1", Broken)
    found = scenarios.run("codec", Choices(tmp_path, rounds=1, peers=("zstd-1", "asyncckpt")))
    assert [result.error for result in found] == ["RuntimeError: no room", None] * (len(found) // 2)
    assert "encode_gb_per_s" in found[1].measures


def test_a_system_whose_process_is_killed_is_a_line_with_its_error(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_one", _killed)
    (found,) = scenarios.run("flat", Choices(tmp_path, size=0.01, rounds=1, peers=("torch.save",)))
    assert found.error.startswith("BrokenProcessPool: ")


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# -- samples


def test_disturbed_rounds_are_dropped_and_counted():
    samples = Samples([round_of(1.0), round_of(9.0, 9.0, foreign_cores=FOREIGN_CORES * 2), round_of(3.0)])
    found = samples.measures(100)
    assert found["durable_s"] == Spread(2.0, 1.0, 3.0, 2)
    assert (found["saves"], found["dropped"]) == (2.0, 2.0)
    assert found["foreign_cores"] == 0.0
    assert found["stored_ratio"] == Spread(0.8, 0.8, 0.8, 2)


def test_when_all_are_disturbed_all_count():
    found = Samples([round_of(1.0, foreign_cores=1.0), round_of(2.0, foreign_cores=1.5)]).measures(100)
    assert (found["saves"], found["dropped"], found["foreign_cores"]) == (2.0, 0.0, 1.5)


def test_what_was_not_measured_is_no_measure():
    found = Samples([round_of(1.0)]).measures(100)
    assert not {"restore_s", "main_speed", "wait_s", "cpu_s_per_gb", "requests"} & set(found)
    busy = Samples([round_of(1.0, speed=0.9, gap_s=0.03, quiet_gap_s=0.01)]).measures(100)
    assert busy["gap_above_quiet_s"] == pytest.approx(0.02)


def test_an_error_of_any_kind_is_the_systems_but_an_interrupt_is_not():
    class Odd(BaseException):
        pass

    samples = Samples()
    with samples.failing(BitsDifferError):
        raise Odd("first line\nthe cause")
    assert samples.error == "Odd: the cause"
    with pytest.raises(BitsDifferError), samples.failing(BitsDifferError):
        raise BitsDifferError("never hidden")
    with pytest.raises(KeyboardInterrupt), samples.failing():
        raise KeyboardInterrupt


def test_an_interrupt_that_dcp_takes_for_a_failure_is_none_of_the_systems():
    wrapped = CheckpointException("save", {0: (SystemExit(143), None)})
    samples = Samples()
    with pytest.raises(SystemExit), samples.failing():
        raise wrapped
    with pytest.raises(SystemExit), samples.failing():
        raise RuntimeError("rank 0") from wrapped
    assert samples.error is None
    with samples.failing():
        raise CheckpointException("save", {0: (OSError("no room"), None)})
    assert samples.error is not None


def test_a_window_counts_iterations_in_bins_of_50_ms():
    window = Window()
    done = threading.Event()
    timer = threading.Timer(4 * BIN_S, done.set)
    timer.start()
    window.run(LOOPS["python"](), done.is_set)
    timer.join()
    series = window.series()
    assert window.each == []
    assert sum(window.bins) == window.iterations
    assert [x for x, _ in series] == [round(number * BIN_S, 3) for number in range(len(series))]
    assert len(series) >= 3


def test_a_window_of_a_loop_of_long_iterations_has_the_speed_of_each():
    class Naps:
        name = "naps"
        long = True

        def __call__(self, _barrier: object, /) -> None:
            time.sleep(0.02)

    window = Window()
    window.run(Naps(), lambda: window.elapsed_s > 0.1 or len(window.each) == 3)
    series = window.series()
    assert len(series) == window.iterations == 3
    assert all(0 < speed < 1 / 0.02 for _, speed in series)
    assert series == sorted(series), "each at its end"


# -- checks


class Forgetful:
    """Restores zeros."""

    name = "forgetful"

    def restore(self, _step: int, state: State) -> None:
        for tensor in state.tensors():
            tensor.zero_()


def test_a_wrong_restore_ends_the_run_also_in_a_child(capfd):

    state = State(torch.nn.Linear(3, 3))
    with pytest.raises(BitsDifferError, match="forgetful, step 7: 2 tensors differ"):
        Verifier(state).check(Forgetful(), 7)
    with pytest.raises(BitsDifferError, match="in a child"):
        in_child(lambda: Verifier(state).check(Forgetful(), 7))
    assert "2 tensors differ" in capfd.readouterr().err
    in_child(lambda: None)


@pytest.mark.parametrize("loop", ["idle", "python"])
@pytest.mark.parametrize("honest", [True, False])
def test_a_system_whose_snapshot_is_not_complete_when_it_says_so_is_found_out(tmp_path, honest, loop):
    state = build(StateSpec("tiny", 3_000_000, 20))
    bench = Bench(state, LOOPS[loop](), Verifier(state))
    system = System(Eager(tmp_path, honest=honest), stores.open_store("tmpfs", tmp_path / "store"), ())
    context = Run(SCENARIOS["python"], Choices(tmp_path), contextlib.ExitStack())
    with contextlib.nullcontext() if honest else pytest.raises(BitsDifferError):
        assert len(one_round(system, bench, context, counted=True).saves) >= 1
    assert Saving.on_staged is None


def test_words_that_name_a_store_or_a_loop_stay_when_scenarios_of_that_name_run_alone():
    words = [
        "--loop",
        "python",
        "python",
        "--size",
        "0.1",
        "wan",
        "--store",
        "wan",
        "--json",
        "wan",
        "--peers=a",
        "--",
        "idle",
    ]
    alone = _options_alone(words, ("python", "wan", "idle"))
    assert alone == ["--loop", "python", "--size", "0.1", "--store", "wan"]


def test_a_table_shows_systems_as_columns_and_says_who_did_not_run():
    absent = Result("saves", "state", "absent", {}, error="ImportError: not installed")
    text = table([one("asyncckpt", durable_s=0.5, stored_bytes=2e6), one("other", durable_s=2.0), absent])
    lines = text.splitlines()
    assert lines[2].split() == ["asyncckpt", "other"]
    assert lines[3].split() == ["durable_s", "500", "ms", "2.00", "s"]
    assert lines[4].split() == ["stored_bytes", "2.0", "MB", "-"]
    assert lines[5] == "absent did not run: ImportError: not installed"


def test_states_scale():
    spec = StateSpec("state", 1000, 10)
    assert spec.resized(0.1) == StateSpec("state", 100, 10)


# -- from the command line


@pytest.mark.slow
def test_two_tiny_scenarios_print_tables_and_write_lines_of_json(tmp_path):
    file, folder = tmp_path / "results.jsonl", tmp_path / "scratch"
    options = ["--size", "0.01", "--rounds", "1", "--peers", "asyncckpt,torch.save", "--folder", str(folder)]
    command = [sys.executable, "-m", "benchmarks.bench", "idle", "flat", *options, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "idle: 1 GB beside an idle main thread" in done.stdout
    assert "flat: memory and descriptors" in done.stdout
    assert "idle        1/1  torch.save" in done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    pairs = [(line["scenario"], line["peer"]) for line in lines]
    assert pairs == [("idle", "asyncckpt"), ("idle", "torch.save"), ("flat", "asyncckpt"), ("flat", "torch.save")]
    for line in lines:
        expected = (
            "scenario about state store loop peer measures series goals settings error date command values machine"
        )
        assert set(line) == set(expected.split())
        assert line["error"] is None
        assert line["machine"]["cores"]
    assert 1 <= lines[0]["measures"]["durable_s"]["samples"] <= 3, "a disturbed round is repeated, twice at most"
    assert lines[0]["settings"]["asynchronous"] is True
    assert lines[0]["goals"] == [], "they stand for the whole size"
    assert len(lines[2]["series"]["memory_bytes_over_saves"]) == 1
    assert not list(folder.iterdir()), "nothing is left behind"


@pytest.mark.slow
@pytest.mark.parametrize("peers", ["torch_checkpointing,asyncckpt", "asyncckpt,torch_checkpointing"])
def test_a_system_that_uses_up_the_descriptors_takes_nobody_else_down(tmp_path, peers):
    pytest.importorskip("torch_checkpointing")  # one descriptor a tensor; 26,668 of them here
    file, folder = tmp_path / "results.jsonl", tmp_path / "scratch"
    options = ["--size", "0.01", "--rounds", "1", "--peers", peers, "--folder", str(folder)]
    command = [sys.executable, "-m", "benchmarks.bench", "small", *options, "--json", str(file)]

    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))

    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, preexec_fn=few_descriptors
    )
    assert done.returncode == 0, done.stderr
    errors = {line["peer"]: line["error"] for line in map(json.loads, file.read_text().splitlines())}
    assert "Too many open files" in errors["torch_checkpointing"] or "descriptors" in errors["torch_checkpointing"]
    assert errors["asyncckpt"] is None
    assert not list(folder.iterdir()), "nothing is left behind"


def test_a_run_that_is_told_to_end_takes_the_processes_of_its_systems_along(tmp_path):
    options = ["--size", "0.01", "--rounds", "5000", "--peers", "asyncckpt", "--folder", str(tmp_path / "scratch")]
    command = [sys.executable, "-m", "benchmarks.bench", "flat", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        run.stderr.readline()  # it saves
        own = descendants(run.pid)
        assert any(b"spawn_main" in command_of(pid) for pid in own)
        run.terminate()
        run.wait(PATIENCE_S)  # its saves would take minutes
    eventually(lambda: not any(alive(pid) for pid in own), "all processes have ended")
    assert not list((tmp_path / "scratch").iterdir())
