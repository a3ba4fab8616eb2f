"""A state file under the right digest may hold anything: it is taken, or refused by an error of the family, and nothing else."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import asyncckpt
from asyncckpt.errors import CheckpointError
from tests.unit.state.pocket import Pocket

ODD = [None, -1, 2.5, "x", b"y", [], (1, 2), {1}, 10**40, torch.Size([2]), torch.float32, [None], ...]
"""`...`: the value is gone."""


def state():
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    values = {"number": np.int8(3), "real": np.float32(0.5), "list": [1, 2], "deep": (1, {"x": "y"})}
    rng, scaler = asyncckpt.RNG(), torch.amp.GradScaler("cpu")
    return {"model": model, "optimizer": optimizer, "sched": scheduler, "values": values, "rng": rng, "scaler": scaler}


STORED = Pocket.of(state())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_any_value_is_taken_or_refused_by_the_family(odd):
    for path in STORED.values:
        values = {
            name: odd if name == path else value
            for name, value in STORED.values.items()
            if name != path or odd is not ...
        }
        pocket = dataclasses.replace(STORED, values=values, data=dict(STORED.data), asked=[])
        with contextlib.suppress(CheckpointError):
            pocket.load()
        for strict in (True, False):
            pocket = dataclasses.replace(
                pocket, data={name: one.clone() for name, one in STORED.data.items()}, asked=[]
            )
            with contextlib.suppress(CheckpointError):
                pocket.restore(state(), strict=strict)
