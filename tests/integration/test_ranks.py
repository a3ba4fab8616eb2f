"""Two real ranks on gloo: all of them are told alike, and nobody hangs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 90

SCRIPT = """
import sys, warnings
import torch, torch.distributed as dist
import asyncckpt
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torch.distributed.optim import ZeroRedundancyOptimizer

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[3]), world_size=2)
rank = dist.get_rank()
torch.manual_seed(rank)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

def step():
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()

class Collective:
    '''Its state dict needs all ranks, as a gathered one does.'''
    def __init__(self): self.value = torch.full((2,), float(rank))
    def state_dict(self):
        total = self.value.clone()
        dist.all_reduce(total)
        return {"total": total}
    def load_state_dict(self, state):
        self.value = state["total"]
        dist.all_reduce(self.value)

class Stream(IterableDataset):
    def __iter__(self): return iter(())
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

class Positioned(DataLoader):
    def state_dict(self): return {"at": rank}
    def load_state_dict(self, state): self.at = state["at"]

def told(call):
    try:
        return call()
    except asyncckpt.errors.CheckpointError as error:
        return f"{type(error).__name__} {error.key} {'Replicated' in str(error)}"

"""

CASES = {
    "own": """
step()
with asyncckpt.Saver(sys.argv[1]) as saver:
    saver.save(1, {"model": model}).result()
    dist.barrier()
    before = torch.get_rng_state()
    for name, thing in {"rng": asyncckpt.RNG(), "loader": Positioned([1]), "sampler": DistributedSampler([1, 2]), "stream": Stream()}.items():
        state = {"model": model, "deep": [1, {name: thing}]}
        print(told(lambda: saver.save(2, state)), "|", told(lambda: saver.restore(state)), "|", told(lambda: asyncckpt.restore(sys.argv[1], state)))
    print("unchanged", torch.equal(before, torch.get_rng_state()))
    step()
""",
    "replicated": """
step()
rng = asyncckpt.RNG()
torch.manual_seed(5)
state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": torch.amp.GradScaler("cpu"), "rng": asyncckpt.Replicated(rng)}
with warnings.catch_warnings():
    warnings.simplefilter("error")
    with asyncckpt.Saver(sys.argv[1]) as saver:
        saver.save(1, state).result()
        dist.barrier()
        want = torch.rand(3).tolist()
        torch.manual_seed(50 + rank)
        print(saver.restore(state).step, torch.rand(3).tolist() == want, state["rng"].value is rng)
step()
""",
    "collective": """
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    thing = Collective()
    state = {"model": model, "thing": thing}
    with asyncckpt.Saver(sys.argv[1]) as saver:
        for number in range(1, 4):  # the second and third wait for the arena of the one before
            saver.save(number, state)
        saver.prepare(state)
        saver.wait()
        dist.barrier()
        saver.restore(state)
    print(thing.value.tolist())
told_of = [str(one.message) for one in seen if "'thing'" in str(one.message)]
print("warned", len(told_of) == (1 - rank))
""",
    "unsupported": """
from torch.distributed.fsdp import fully_shard
sharded = nn.Linear(2, 2)
fully_shard(sharded)
with asyncckpt.Saver(sys.argv[1]) as saver:
    print(told(lambda: saver.save(1, {"model": sharded})).split(" F")[0], "|", told(lambda: saver.prepare({"model": sharded})).split(" F")[0])
step()
""",
    "zero": """
zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
optimizer = zero
step()
zero.consolidate_state_dict(0)
with asyncckpt.Saver(sys.argv[1]) as saver:
    saver.save(1, {"model": model, "optimizer": zero}).result()
    dist.barrier()
    print(saver.restore({"model": model, "optimizer": zero}).step)
step()
""",
}
SAID = {
    "own": "\n".join(
        [
            *(
                " | ".join([f"UnsupportedObjectError deep/#1/{name} True"] * 3)
                for name in ("rng", "loader", "sampler", "stream")
            ),
            "unchanged True",
        ]
    ),
    "replicated": "1 True True",
    "collective": "[2.0, 2.0]\nwarned True",
    "unsupported": "UnsupportedTensorError model/weight | UnsupportedTensorError model/weight",
    "zero": "1",
}


# A thread of gloo's own may free a tensor while the interpreter ends, which aborts the process (torch 2.13): so it ends without that.
END = "dist.destroy_process_group()\natexit._run_exitfuncs()\nsys.stdout.flush()\nos._exit(0)\n"


@pytest.mark.slow
def test_both_ranks_are_told_the_same_and_end(tmp_path):
    script = "import atexit, os, sys\n" + SCRIPT
    for name, case in CASES.items():
        script += (
            f"\nprint('{name}')\nroot = sys.argv[1] + '{name}'\n"
            + case.replace("sys.argv[1]", "root")
            + "\ndist.barrier()\n"
        )
    (tmp_path / "train.py").write_text(script + END)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, tmp_path / "train.py", tmp_path / "run-", tmp_path / "rendezvous", str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=LIMIT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    expected = "\n".join(f"{name}\n{text}" for name, text in SAID.items())
    for rank, (out, errors) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, errors
        assert out.strip() == expected
