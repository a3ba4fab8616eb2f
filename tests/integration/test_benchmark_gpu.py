"""What a save costs a training step: everything of it but the rates, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import stores
from benchmarks.scenarios.base import BitsDifferError, System
from benchmarks.scenarios.gpu import Found, Size, StepRound, _Bench, _round
from benchmarks.scenarios.samples import Save
from tests.eager import Eager

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parent.parent.parent
TINY = Size(width=64, layers=1, batch=2, window=32)
OF_A_STEP = {"quiet_step_s", "step_with_save_s", "stall_s", "step_while_saving_s"}
OF_THE_COPY = {"idle_staged_s", "d2h_gbps", "d2h_of_plain_copy"}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_device_it_says_so_and_ends_well():
    done = run()
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "skipped")


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("--device=mps", "snapshots are taken from cuda or cpu, not from mps"),
        ("--device=nonsense", "torch knows no device 'nonsense'"),
        ("--width=100", "'100' is no multiple of 64"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_runs(option, why):
    done = run(option)
    assert done.returncode == 2
    assert why in done.stderr


def test_a_run_in_which_no_system_could_save_is_none():
    done = run("--device=cpu", "--width=64", "--layers=1", "--batch=2", "--window=32", "--peers=s3torchconnector")
    assert done.returncode == 1
    assert "s3torchconnector did not run" in done.stdout


@pytest.mark.slow
def test_every_system_trains_saves_and_restores_and_leaves_a_line(tmp_path):
    systems = ["asyncckpt", "asyncckpt-eager", "dcp-thread", "torch.save"]
    options = [f"--{name}={getattr(TINY, name)}" for name in ("width", "layers", "batch", "window")]
    folder, file = tmp_path / "scratch", tmp_path / "gpu.jsonl"
    options += ["--device=cpu", "--rounds=1", f"--peers={','.join(systems)}", f"--folder={folder}", f"--json={file}"]
    done = run(*options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["peer"], line["error"]) for line in lines] == [(name, None) for name in systems]
    for line in lines:
        assert {"link_gbps", "copy_s", "call_s", "durable_s", "restore_s", "lost_s"} | OF_A_STEP <= set(
            line["measures"]
        )
        assert (set(line["measures"]) & OF_THE_COPY == OF_THE_COPY) is line["settings"]["asynchronous"]
        assert line["command"].startswith("python -m benchmarks.gpu --width=64")
    assert not list(folder.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("honest", [True, False])
def test_a_save_that_holds_what_the_next_step_made_ends_the_run(tmp_path, honest):
    system = System(Eager(tmp_path, honest=honest, pause_s=0.5), stores.open_store("tmpfs", tmp_path / "store"), ())
    bench, found = _Bench(torch.device("cpu"), TINY), Found()
    if honest:
        _round(system, bench, found)
        assert found.rounds[0].saves[0].wait_s > 0
        assert found.rounds[0].first_step_s >= 0.5, "the step was held until the snapshot was complete"
    else:
        with pytest.raises(BitsDifferError):
            _round(system, bench, found)


def test_the_stall_is_what_the_step_with_the_save_took_above_a_quiet_one():
    save = Save(call_s=0.001, staged_s=0.1, durable_s=1.0, stored_bytes=10)
    found = Found(idle_staged_s=[0.5, 0.25])
    found.rounds += [
        StepRound((save,), quiet_steps_s=(0.1, 0.2, 0.9), first_step_s=0.5, later_steps_s=(0.2,)),
        StepRound((save,), foreign_cores=1.0, quiet_steps_s=(0.1,), first_step_s=9.0),
    ]
    measures = found.beside_training(10**9, 0.2, asynchronous=True)
    assert measures["stall_s"].median == pytest.approx(0.3)
    assert measures["step_with_save_s"].samples == 1, "the disturbed round is left out"
    assert (measures["d2h_gbps"].min, measures["d2h_gbps"].max) == (2.0, 4.0)
    assert measures["d2h_of_plain_copy"].max == pytest.approx(0.8)
