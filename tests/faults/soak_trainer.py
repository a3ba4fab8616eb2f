"""A training that the soak disturbs: it tells every fact before it goes on, so what was told before a kill is what was known."""

import json
import os
import signal
import sys
import time
import warnings
from typing import Any

import torch

from asyncckpt import KeepLast, S3Options, Saver
from asyncckpt.errors import CheckpointError
from asyncckpt.options import RetryPolicy
from asyncckpt.save import Save
from tests.training import Training, fingerprint

PAUSE_S = 0.02
SAVE_EVERY = 25


def main(url: str, endpoint_url: str, log: str, deadline_s: float) -> None:
    """Train and save until SIGTERM; one line of JSON a fact, appended to `log`."""
    facts = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(**fact: Any) -> None:
        os.write(facts, (json.dumps(fact) + "\n").encode())

    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = S3Options(endpoint_url=endpoint_url, retry=RetryPolicy(deadline_s=deadline_s))
    training = Training(width=256)
    saver = Saver(url, store=store, keep=[KeepLast(3)], workers=1, when_full="skip")
    restored = _restored(saver, training, stopping, tell)
    if restored is not None:
        training.steps = restored
        tell(restored=restored, content=fingerprint(training.facts()))
    pending: list[tuple[int, Save]] = []
    while not stopping and restored is not None:
        training.step()
        time.sleep(PAUSE_S)
        pending = [one for one in pending if not _told(*one, tell)]
        if training.steps % SAVE_EVERY == 0:
            tell(saving=training.steps, content=fingerprint(training.facts()))
            try:
                pending.append((training.steps, saver.save(training.steps, training.state)))
            except CheckpointError as error:
                tell(failed=training.steps, error=f"{type(error).__name__}: {error}")
    try:
        saver.close()
    except CheckpointError as error:
        tell(failed=0, error=f"{type(error).__name__}: {error}")
    for one in pending:
        _told(*one, tell)
    tell(over=training.steps)


def _restored(saver: Saver, training: Training, stopping: list[int], tell: Any) -> int | None:
    """The step that is gone on from; an outage at the start is waited for, as whoever restarts jobs would."""
    while not stopping:
        try:
            found = saver.restore(training.state)
        except CheckpointError as error:
            tell(failed=0, error=f"restore: {type(error).__name__}: {error}")
            time.sleep(1)
        else:
            return found.step if found else 0
    return None


def _told(step: int, save: Save, tell: Any) -> bool:
    if not save.done():
        return False
    try:
        report = save.result()
    except CheckpointError as error:
        tell(failed=step, error=f"{type(error).__name__}: {error}")
    else:
        if report.skipped:
            tell(skipped=step, why=report.skipped)
        else:
            tell(committed=step)
    return True


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
