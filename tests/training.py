"""A tiny real training run, and exact comparison of two."""

import hashlib
from typing import Any

import torch
from torch import nn

from asyncckpt import RNG


class Block(nn.Module):
    """Something of everything: a tied weight, a buffer, dropout, bf16 beside fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width, dtype=torch.bfloat16)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += tokens.numel()
        return self.head(self.drop(self.norm(self.embed(tokens).bfloat16()).float()))


class Training:
    """`state` is what a Saver is given; `step()` trains once, the same way in every process."""

    def __init__(self, width: int = 32, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Block(width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.steps = 0

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "rng": RNG(),
            "progress": {"steps": self.steps},
        }

    def step(self, count: int = 1) -> "Training":
        for _ in range(count):
            tokens = torch.randint(0, 16, (4, 8))
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten()).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.steps += 1
        return self

    def facts(self) -> dict[str, Any]:
        """Everything that must come back, detached from what trains on."""
        return copied(
            {
                "model": dict(self.model.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "rng": torch.get_rng_state(),
            }
        )


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copied(item) for item in value]
    return value


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Bit for bit, and of the same types."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert found.shape == expected.shape, path
        same = torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
        assert same, f"{path} differs"
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}/{number}")
    else:
        assert found == expected, path


def numbered(step: int, elements: int = 50_000) -> dict[str, Any]:
    """A state without an optimizer whose every tensor says which step it is of."""
    return {
        "weights": {f"w{number}": torch.full((elements,), float(step * 10 + number)) for number in range(3)},
        "step": step,
    }


def assert_numbered(loaded: dict[str, Any], step: int, elements: int = 50_000) -> None:
    assert loaded["step"] == step
    for number in range(3):
        expected = torch.full((elements,), float(step * 10 + number))
        assert torch.equal(loaded["weights"][f"w{number}"], expected), f"weights/w{number} of step {step}"


def fingerprint(value: Any) -> str:
    """Of every byte, type and name."""
    found = hashlib.blake2b(digest_size=16)

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.update(f"{item.dtype}{tuple(item.shape)}".encode())
            found.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in item:
                found.update(repr(key).encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            for one in item:
                add(one)
        else:
            found.update(repr(item).encode())

    add(value)
    return found.hexdigest()
