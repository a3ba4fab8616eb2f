"""What the README says is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.programs import needs_zstd

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


class Loader:
    """A loader with a place in its data, whose `iter` draws a seed, as torch's does."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        torch.empty((), dtype=torch.int64).random_()
        return map(self.next, range(self.position, self.position + 150 - self.position % 150))

    def next(self, number):
        self.position = number + 1
        return torch.full((4, 8), float(number)) + torch.rand(())

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def run_example(url: Path, steps: int, options: str = "") -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    loader = Loader()

    def train_one_step(batch):
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()
        scheduler.step()

    (example,) = blocks("python")
    names = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "steps": steps}
    example = example.replace("s3://bucket/run-42", str(url)).replace("keep=", f"{options}keep=")
    exec(example, names | {"train_one_step": train_one_step, "val_loss": 0.5})
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_example_resumes_bit_exact_when_it_is_run_in_two_halves(tmp_path):
    whole = run_example(tmp_path / "whole", 200)
    run_example(tmp_path / "halves", 100)
    halves = run_example(tmp_path / "halves", 200)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    assert sorted(path.name for path in (tmp_path / "halves").glob("*.json")) == [
        "step-0000000100.json",
        "step-0000000200.json",
    ]


@needs_zstd
def test_the_shell_lines_read_a_shard(tmp_path):
    run_example(tmp_path, 100, 'codec="planes", ')  # as the first save to S3
    (shard,) = tmp_path.glob("step-0000000100/*/model-00001-of-00001.safetensors.zst")
    lines = next(block for block in blocks("sh") if block.startswith("zstd"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    answer = subprocess.run(
        ["bash", "-ec", lines], cwd=shard.parent, env=environment, capture_output=True, text=True, check=True
    )
    assert "0.weight" in answer.stdout


def test_the_readme_is_short_and_its_commands_are_in_the_makefile():
    text = README.read_text()
    targets = re.findall(r"^([a-z]+):", (README.parent / "Makefile").read_text(), re.MULTILINE)
    assert len(text.splitlines()) < 150
    assert set(re.findall(r"make ([a-z]+)", text)) <= set(targets)
