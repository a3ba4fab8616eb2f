"""The proof behind `make demo`: a training run killed in the middle ends bit for bit like one that never was.

1. A `moto_server` process plays S3 on a free loopback port.
2. `train_gpt.py` runs uninterrupted: the reference.
3. It runs again below another prefix, is killed with SIGKILL at a step, and is started again.
4. Every loss and every tensor of the last checkpoint are compared bit for bit; then the table of save reports.

Exits with 1 and one sentence when anything differs. Another S3 server than moto's: `--endpoint-url` and `--bucket`,
with the credentials in the environment.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import torch

import asyncckpt

TRAIN = Path(__file__).with_name("train_gpt.py")
SERVER_START_S = 60.0
NOT_SEEDED = ("/rng/python", "/rng/numpy")  # the example draws from torch's generator alone; these start at random


class DemoError(Exception):
    """What the demo promises did not come true."""


@contextmanager
def moto_server(folder: Path) -> Iterator[str]:
    """Run an S3 server of our own; yields its URL. The kernel picks the port, the server's log tells it."""
    output = folder / "moto.log"
    with output.open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield wait_for_url(server, output)
    finally:
        server.terminate()
        server.wait()


def wait_for_url(server: subprocess.Popen[bytes], output: Path) -> str:
    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline and server.poll() is None:
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", output.read_text(errors="replace")):
            return found[1]
        time.sleep(0.05)
    raise DemoError(f"moto_server did not start (exit code {server.poll()}):\n{output.read_text(errors='replace')}")


def use_credentials_for_moto(environ: MutableMapping[str, str]) -> None:
    """Name any key: moto takes all, and no real one of this machine may be used."""
    for name in [name for name in environ if name.startswith("AWS_")]:
        del environ[name]
    environ.update({"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_DEFAULT_REGION": "us-east-1"})
    environ.update({"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull})
    environ.update({"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"})


def train(url: str, log: Path, args: argparse.Namespace, *, kill_at: int | None = None) -> None:
    """Run the example to its end, or until it has printed step `kill_at`; then it gets SIGKILL."""
    command = [sys.executable, str(TRAIN), "--url", url, "--endpoint-url", args.endpoint_url, "--log", str(log)]
    command += ["--steps", str(args.steps), "--save-every", str(args.save_every), "--device", "cpu"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout or ():
            print(f"  {line.rstrip()}".ljust(40), end="\r" if sys.stdout.isatty() else "\n", flush=True)
            if kill_at is not None and line.split()[:2] == ["step", str(kill_at)]:
                process.kill()
    finally:
        process.kill()  # nothing to do after a normal end: it closed its output
        code = process.wait(timeout=60)
    print()
    if kill_at is None and code != 0:
        raise DemoError(f"train_gpt.py ended with exit code {code}")


def read_log(path: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Losses as hex by step, and the save reports, of one run."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {line["step"]: line["hex"] for line in lines if "step" in line}, [x["saved"] for x in lines if "saved" in x]


def compare_losses(name: str, reference: dict[int, str], losses: dict[int, str]) -> None:
    for step, loss in losses.items():
        if reference[step] != loss:
            raise DemoError(f"{name}: the loss at step {step} is {loss}, not {reference[step]}")


def same_bits(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return type(one) is type(other) and one == other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (one, other)))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from leaves(item, f"{path}/{position}")
    else:
        yield path, value


def compare_checkpoints(reference_url: str, url: str) -> int:
    """Hold the newest checkpoints against each other; returns how many leaves agreed."""
    expected, found = (
        {path: value for path, value in leaves(asyncckpt.load(each)) if not path.startswith(NOT_SEEDED)}
        for each in (reference_url, url)
    )
    if expected.keys() != found.keys():
        raise DemoError(f"the last checkpoints name different things: {sorted(expected.keys() ^ found.keys())[:5]}")
    for path, value in expected.items():
        if not same_bits(value, found[path]):
            raise DemoError(f"{path} differs between the last checkpoints")
    return len(expected)


def print_reports(title: str, reports: list[dict[str, Any]]) -> None:
    columns = ("step", "call ms", "hook wait ms", "staged ms", "encode ms", "upload ms", "commit ms", "ratio", "MB/s")
    print(f"\n{title}\n" + "  ".join(columns))
    for report in reports:
        times = [f"{report[f'{name}_s'] * 1e3:.2f}" for name in ("call", "hook_wait")]
        times += [f"{report[f'{name}_s'] * 1e3:.0f}" for name in ("staged", "encode", "upload", "commit")]
        ratio = report["stored_bytes"] / max(report["raw_bytes"], 1)
        speed = report["raw_bytes"] / 1e6 / max(report["total_s"], 1e-9)
        cells = [str(report["step"]), *times, f"{ratio:.3f}", f"{speed:.0f}"]
        print("  ".join(cell.rjust(len(column)) for cell, column in zip(cells, columns, strict=True)))


def prove(args: argparse.Namespace, folder: Path) -> None:
    boto3.client("s3").create_bucket(Bucket=args.bucket)
    prefix = f"s3://{args.bucket}/{folder.name}"
    print(f"1. Reference: {args.steps} steps, never interrupted")
    train(f"{prefix}/reference", folder / "reference.log", args)
    reference, reference_reports = read_log(folder / "reference.log")
    if sorted(reference) != list(range(1, args.steps + 1)):
        raise DemoError(f"the reference logged steps {sorted(reference)}")

    print(f"2. The same run, killed with SIGKILL at step {args.kill_at}")
    train(f"{prefix}/killed", folder / "killed.log", args, kill_at=args.kill_at)
    killed, killed_reports = read_log(folder / "killed.log")
    compare_losses("before the kill", reference, killed)

    print("3. Started again")
    train(f"{prefix}/killed", folder / "resumed.log", args)
    resumed, resumed_reports = read_log(folder / "resumed.log")
    first = min(resumed, default=0)
    if not 1 < first <= max(killed) + 1:
        raise DemoError(f"the second start began at step {first}: it did not resume from S3")
    if sorted(resumed) != list(range(first, args.steps + 1)) or max(killed) >= args.steps:
        raise DemoError(f"killed after step {max(killed)}, resumed with steps {first} to {max(resumed)}")
    compare_losses("after the kill", reference, resumed)
    same = compare_checkpoints(f"{prefix}/reference", f"{prefix}/killed")

    print_reports("Saves of the reference", reference_reports)
    print_reports("Saves of the killed run", killed_reports)
    print_reports("Saves of the resumed run", resumed_reports)
    print(
        f"\nOK: killed after step {max(killed)}, resumed from the checkpoint of step {first - 1} in S3; the loss is the same,"
        f"\n    bit for bit, at every step: {reference[args.steps]} = {float.fromhex(reference[args.steps]):.4f} at step"
        f" {args.steps}; all {same} values of the last checkpoints agree."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=6)
    parser.add_argument("--kill-at", type=int, default=33, help="step at which SIGKILL is sent; a save lies before it")
    parser.add_argument("--endpoint-url", help="a running S3 server; default: a moto_server of our own")
    parser.add_argument("--bucket", default="asyncckpt-demo", help="made if it does not exist")
    args = parser.parse_args()
    started_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="asyncckpt-demo-") as name:
            if args.endpoint_url:
                os.environ["AWS_ENDPOINT_URL_S3"] = args.endpoint_url
                prove(args, Path(name))
            else:
                use_credentials_for_moto(os.environ)
                with moto_server(Path(name)) as args.endpoint_url:
                    os.environ["AWS_ENDPOINT_URL_S3"] = args.endpoint_url
                    prove(args, Path(name))
    except DemoError as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    print(f"    {time.monotonic() - started_s:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
