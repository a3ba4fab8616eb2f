"""What a save costs a training step on a CUDA device: copy rate, stall, step time, restore, peers beside.

    python -m benchmarks.gpu --folder /dev/shm --json benchmarks/results/gpu.jsonl

Needs a CUDA device and says so without one. The model is a GPT trained in bf16 autocast with fp32 weights and AdamW on the
standard library's source; host memory of about four times the state is needed.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import asyncckpt
from asyncckpt.engine.choice import SETTLING_SAVES
from asyncckpt.engine.cores import usable_cores
from asyncckpt.events import SaveReport
from benchmarks.measure import sync
from benchmarks.peers.torch_save import without_crc32


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.after(x))


class Training:
    """A GPT, its optimizer, and a step that returns after it was launched."""

    def __init__(self, *, width: int, layers: int, length: int, batch: int, fused: bool) -> None:
        torch.manual_seed(0)
        text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.parent.glob("*.py")))
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).cuda()
        self.model = nn.Sequential(
            nn.Embedding(256, width), *[Block(width, width // 64) for _ in range(layers)], nn.Linear(width, 256)
        ).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        self.batch, self.length = batch, length

    @property
    def state(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self, hold: Callable[[], object] = lambda: None) -> None:
        """`hold` returns when parameters and moments may change."""
        starts = torch.randint(0, len(self.text) - self.length - 1, (self.batch,))
        rows = torch.stack([self.text[start : start + self.length + 1] for start in starts.tolist()]).long()
        with torch.autocast("cuda", torch.bfloat16):
            logits = self.model(rows[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        hold()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, count: int) -> list[float]:
        """Seconds of each of `count` synchronized steps."""
        found = []
        for _ in range(count):
            torch.cuda.synchronize()
            started = time.perf_counter()
            self.step()
            torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
        return found


def link_gbps() -> float:
    """The rate of one large copy from the device into page-locked memory: the limit of every snapshot."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    rates = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(2**30 / (time.perf_counter() - started) / 1e9)
    return statistics.median(rates)


def ours(training: Training, folder: Path, *, overlap: bool, steps: int, interval: int) -> dict[str, object]:
    """Steps with a save every `interval`, each save waited for outside the steps; then a restore to the device."""
    reports: list[SaveReport] = []
    with asyncckpt.Saver(folder, overlap=overlap, keep=[asyncckpt.KeepLast(1)]) as saver:
        saver.prepare(training.state)
        for number in range(SETTLING_SAVES + 1):  # codec "auto" measures what it may choose
            saver.save(number, training.state).result()
        calls, with_save, after_save = [], [], []
        for number in range(SETTLING_SAVES + 1, SETTLING_SAVES + 1 + steps):
            torch.cuda.synchronize()
            started = time.perf_counter()
            save = saver.save(number, training.state)
            calls.append(time.perf_counter() - started)
            training.step()
            torch.cuda.synchronize()
            with_save.append(time.perf_counter() - started)
            after_save += training.timed(interval - 1)
            reports.append(save.result())
    started = time.perf_counter()
    restored = asyncckpt.restore(folder, training.state)
    torch.cuda.synchronize()
    restore_s = time.perf_counter() - started
    assert restored.step == SETTLING_SAVES + steps
    size = reports[-1].raw_bytes
    return {
        "system": f"asyncckpt, {'overlapped' if overlap else 'eager'}",
        "gb": size / 1e9,
        "call_ms": statistics.median(calls) * 1e3,
        "step_with_save_ms": statistics.median(with_save) * 1e3,
        "later_steps_ms": statistics.median(after_save) * 1e3,
        "staged_ms": statistics.median(report.staged_s for report in reports) * 1e3,
        "d2h_gbps": size / statistics.median(report.staged_s for report in reports) / 1e9,
        "durable_s": statistics.median(report.total_s for report in reports),
        "ratio": reports[-1].stored_bytes / size,
        "restore_s": restore_s,
    }


def exact(training: Training, folder: Path, *, overlap: bool) -> None:
    """Bits saved are bits restored: save, step on, restore, compare."""
    with asyncckpt.Saver(folder, overlap=overlap) as saver:
        before = [value.clone() for value in training.model.parameters()]
        moments = [{k: v.clone() for k, v in entry.items()} for entry in training.optimizer.state.values()]
        saver.save(1, training.state)
        for _ in range(5):
            training.step()
        saver.wait()
    asyncckpt.restore(folder, training.state)
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
    after = training.optimizer.state.values()
    assert all(torch.equal(old[k], new[k]) for old, new in zip(moments, after, strict=True) for k in old)


def verified(training: Training, folder: Path, *, overlap: bool, steps: int, interval: int) -> dict[str, object]:
    """`ours`, once `exact` has held."""
    exact(training, folder.with_name("exact"), overlap=overlap)
    return ours(training, folder, overlap=overlap, steps=steps, interval=interval)


def torch_save(training: Training, folder: Path) -> dict[str, object]:
    """The blocking way: torch.save of the same state to the same folder."""
    folder.mkdir()
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with without_crc32():
            torch.save(
                {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()},
                folder / "state.pt",
            )
        sync(folder)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    loaded = torch.load(folder / "state.pt", mmap=True, weights_only=True)
    training.model.load_state_dict(loaded["model"])
    training.optimizer.load_state_dict(loaded["optimizer"])
    torch.cuda.synchronize()
    restore_s = time.perf_counter() - started
    durable_s = statistics.median(times)
    return {"system": "torch.save", "call_ms": durable_s * 1e3, "durable_s": durable_s, "restore_s": restore_s}


def dcp_async(training: Training, folder: Path, *, steps: int, interval: int) -> dict[str, object]:
    """dcp.async_save with pinned, asynchronous staging: its best documented setting for CUDA."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict import get_state_dict

    stager = DefaultStager(StagingOptions(use_pinned_memory=True, use_shared_memory=True, use_async_staging=True))
    calls, with_save, after_save, durable = [], [], [], []
    settles = SETTLING_SAVES + 1  # as many as ours has behind it
    for number in range(settles + steps):
        target = folder / f"dcp-{number}"
        shutil.rmtree(folder / f"dcp-{number - 1}", ignore_errors=True)
        torch.cuda.synchronize()
        started = time.perf_counter()
        model, optimizer = get_state_dict(training.model, training.optimizer)
        answer = dcp.async_save(
            {"model": model, "optimizer": optimizer},
            storage_writer=dcp.FileSystemWriter(target, thread_count=usable_cores()),  # it syncs its files by itself
            async_stager=stager,
            no_dist=True,
        )
        upload = answer.upload_completion if hasattr(answer, "upload_completion") else answer
        ended: list[float] = []
        upload.add_done_callback(lambda _, ended=ended: ended.append(time.perf_counter()))
        calls.append(time.perf_counter() - started)
        staged = getattr(answer, "staging_completion", None)
        training.step(staged.result if staged is not None else lambda: None)  # the optimizer may not step before
        torch.cuda.synchronize()
        with_save.append(time.perf_counter() - started)
        after_save.append(training.timed(interval - 1))
        upload.result()
        while not ended:  # the callback follows whoever waits for the result
            time.sleep(0.001)
        durable.append(ended[0] - started)
    stager.close()
    model, optimizer = get_state_dict(training.model, training.optimizer)
    started = time.perf_counter()
    dcp.load({"model": model, "optimizer": optimizer}, storage_reader=dcp.FileSystemReader(target), no_dist=True)
    torch.cuda.synchronize()
    restore_s = time.perf_counter() - started
    found = {"call_ms": calls, "step_with_save_ms": with_save}
    medians = {name: statistics.median(values[settles:]) * 1e3 for name, values in found.items()}
    later = [seconds for some in after_save[settles:] for seconds in some]
    medians["later_steps_ms"] = statistics.median(later) * 1e3
    times = {"durable_s": statistics.median(durable[settles:]), "restore_s": restore_s}
    return {"system": "dcp.async_save, pinned async staging", **medians, **times}


def machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("/dev/shm"), help="a folder of this run's own is made below it"
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device here")
        return 0
    training = Training(width=options.width, layers=options.layers, length=512, batch=options.batch, fused=True)
    training.timed(5)
    link = link_gbps()
    plain = training.timed(20)  # again at the end: a device that grows warm grows slow
    rows: list[dict[str, object]] = [
        {"system": "no saving", "later_steps_ms": statistics.median(plain) * 1e3, "link_gbps": link}
    ]
    size = {"steps": options.saves, "interval": 4}
    attempts: dict[str, Callable[[Path], dict[str, object]]] = {
        "asyncckpt, overlapped": lambda place: verified(training, place, overlap=True, **size),
        "asyncckpt, eager": lambda place: verified(training, place, overlap=False, **size),
        "torch.save": lambda place: torch_save(training, place),
        "dcp.async_save": lambda place: dcp_async(training, place, **size),
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    for system, attempt in attempts.items():
        try:
            with tempfile.TemporaryDirectory(prefix="asyncckpt-gpu-", dir=options.folder) as place:
                rows.append(attempt(Path(place) / "checkpoints"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # DCP's own error is no Exception
            rows.append({"system": system, "error": f"{type(error).__name__}: {error}"})
        print(json.dumps(rows[-1]), flush=True)
    rows[0]["later_steps_at_the_end_ms"] = statistics.median(training.timed(20)) * 1e3
    print(json.dumps(rows[0]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a") as lines:
            lines.writelines(json.dumps({**machine(), **row}) + "\n" for row in rows)
    return int(any("error" in row and str(row["system"]).startswith("asyncckpt") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
