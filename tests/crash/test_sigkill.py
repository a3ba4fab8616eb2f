"""SIGKILL at many moments of a save. Each trainer resumes where the one before was killed.

Afterwards every checkpoint that is listed restores bit for bit, none that was acknowledged is missing, and the run is,
step by step, the run that was never killed.
"""

import itertools
import signal
import time

import torch

import asyncckpt
from asyncckpt import RetryPolicy, Run, S3Options
from tests.processes import alive, descendants, ended_at_last, eventually, kill
from tests.proxy import Proxy
from tests.training import Training, fingerprint

MOMENTS = 20
NOISE_BYTES = 3_000_000


class Chain:
    """One run, killed again and again."""

    def __init__(self, warm, url, endpoint=None):
        self.warm, self.url, self.endpoint = warm, url, endpoint
        self.store = S3Options(endpoint_url=endpoint, retry=RetryPolicy(deadline_s=30)) if endpoint else None
        self.fingerprints = {}
        self.committed = 0
        self.outcomes = []

    def kill_at(self, delay_s, *, everything):
        """A trainer resumes, saves, and is killed `delay_s` after it called `save()` for the third time."""
        trainer = self.warm.start("train_for_ever", self.url, self.endpoint, NOISE_BYTES)
        restored = trainer.report("restored")
        self.check_restored(restored, trainer.report("fingerprint"))
        target = restored + 3
        service = trainer.report("service")
        with ended_at_last(trainer.pid, service):
            eventually(lambda: any(line.get("step") == target for line in trainer.lines), f"step {target} is saved")
            moment = time.perf_counter() + delay_s
            while time.perf_counter() < moment:
                pass
            if everything:
                self.kill_everything(trainer, service)
            else:
                trainer.kill()
            assert trainer.end() == -signal.SIGKILL
            eventually(lambda: not alive(service), "the service has finished and is gone")
        self.remember(trainer)
        self.outcomes.append(self.check_store())

    def save_s(self):
        """How long a save takes on this host, at this moment. The trainer that shows it is killed in the middle too."""
        trainer = self.warm.start("train_for_ever", self.url, self.endpoint, NOISE_BYTES)
        service = trainer.report("service")
        with ended_at_last(trainer.pid, service):
            seen_s = []
            for count in (2, 6):
                eventually(lambda count=count: len([x for x in trainer.lines if "committed" in x]) >= count, "saves")
                seen_s.append(time.perf_counter())
            self.kill_everything(trainer, service)
            trainer.end()
        self.remember(trainer)
        self.outcomes.append(self.check_store())
        return (seen_s[1] - seen_s[0]) / 4

    def kill_everything(self, trainer, service):
        doomed = [trainer.pid, service, *descendants(service)]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: nobody sees another one die
            for pid in doomed:
                kill(pid, number)
        for pid in [service, *descendants(service)]:
            eventually(lambda pid=pid: not alive(pid), f"{pid} is dead")

    def remember(self, trainer):
        for line in trainer.lines:
            if "step" in line:
                known = self.fingerprints.setdefault(line["step"], line["fingerprint"])
                assert known == line["fingerprint"], f"step {line['step']} went another way after a restart"
            self.committed = max(self.committed, line.get("committed", 0))

    def check_restored(self, step, found):
        assert step >= self.committed, f"step {self.committed} was acknowledged, and {step} was restored"
        assert step == 0 or self.fingerprints[step] == found, f"step {step} was not restored as it was"

    def check_store(self):
        """The newest checkpoint restores bit for bit; returns its step."""
        with Run(self.url, store=self.store) as run:
            newest = run.latest().step
        assert newest >= self.committed, f"step {self.committed} was acknowledged; the newest is {newest}"
        self.check_step(newest)
        return newest

    def check_step(self, step):
        training, noise = Training(seed=9).step(), torch.zeros(NOISE_BYTES, dtype=torch.uint8)
        asyncckpt.restore(self.url, {**training.state, "noise": noise}, step=step, store=self.store)
        assert fingerprint([training.facts(), noise]) == self.fingerprints[step], f"step {step} differs"

    def missed(self):
        """Of each kill, whether it came before the commit of the save that it was aimed at."""
        return [after < before + 3 for before, after in itertools.pairwise(self.outcomes)]

    def check_all(self):
        """Whatever is listed is whole."""
        with Run(self.url, store=self.store) as run:
            checkpoints = run.checkpoints()
            for checkpoint in checkpoints:
                checkpoint.verify()
                self.check_step(checkpoint.step)
        assert checkpoints
        assert self.outcomes == sorted(self.outcomes)


def moments(count, save_s):
    """Spread over the end of one save, the whole of the next, and a while behind it: a young trainer is slower."""
    return [4.0 * save_s * number / (count - 1) for number in range(count)]


def test_the_trainer_is_killed_at_twenty_moments_of_a_save(warm, tmp_path):
    chain = Chain(warm, str(tmp_path))
    for delay_s in moments(MOMENTS, chain.save_s()):
        chain.kill_at(delay_s, everything=False)
    chain.check_all()


def test_trainer_service_and_workers_are_killed_together_at_twenty_moments_of_a_save(warm, tmp_path):
    chain = Chain(warm, str(tmp_path))
    save_s = chain.save_s()
    for delay_s in moments(MOMENTS, save_s):
        chain.kill_at(delay_s, everything=True)
    for doublings in range(
        3, 8
    ):  # beside busy neighbours a young trainer may be much slower than the one that was timed
        if not all(chain.missed()):
            break
        chain.kill_at(2**doublings * save_s, everything=True)
    chain.check_all()
    missed = chain.missed()
    assert any(missed), "every kill came behind the commit"
    assert not all(missed), "every kill came before the commit"
    with Run(tmp_path) as run:
        recorded = {f"step-{checkpoint.step:010d}" for checkpoint in run.checkpoints()}
    leftovers = {path.name for path in tmp_path.glob("step-*") if path.is_dir()} - recorded
    unfinished = list(tmp_path.glob(".asyncckpt-unfinished/*"))
    assert leftovers or unfinished, "nothing was cut off in the middle"


def test_trainer_service_and_workers_are_killed_together_beside_s3(warm, moto_endpoint, s3_bucket):
    with Proxy(moto_endpoint) as proxy:
        proxy.delay_s = 0.003
        chain = Chain(warm, f"s3://{s3_bucket}/run", proxy.url)
        for delay_s in moments(5, chain.save_s()):
            chain.kill_at(delay_s, everything=True)
        chain.check_all()
