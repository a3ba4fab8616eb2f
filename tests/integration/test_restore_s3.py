import itertools
import threading
import warnings
from random import Random

import pytest
import torch

from asyncckpt import RetryPolicy, S3Options, Saver, errors, load
from asyncckpt.run import Run
from asyncckpt.store.opening import open_store
from tests.writer import tensor_bytes, write_checkpoint


@pytest.mark.parametrize("codec", ["planes", "none"])
def test_a_checkpoint_on_s3_is_loaded_verified_and_named(codec, moto_endpoint, s3_bucket):
    url, options = f"s3://{s3_bucket}/run", S3Options(endpoint_url=moto_endpoint, single_writer=True)
    state = {"model": {f"w{n}": torch.randn(400_000) for n in range(12)}, "n": 3}
    with open_store(url, options) as store:
        for step in (1, 2):
            write_checkpoint(store, step, state, codec=codec)
    loaded = load(url, store=options)
    assert {name: tensor_bytes(one) for name, one in loaded["model"].items()} == {
        name: tensor_bytes(one) for name, one in state["model"].items()
    }
    with Run(url, store=options) as run:
        assert [checkpoint.step for checkpoint in run.checkpoints()] == [1, 2]
        run.latest().verify()
        assert run.rewind(1) == [2]
        assert run.latest().step == 1


def test_a_missing_bucket_is_no_empty_run(moto_endpoint):
    with pytest.raises(errors.StoreNotFoundError):
        load("s3://no-such-bucket-here/run", store=S3Options(endpoint_url=moto_endpoint))


def blank():
    return {"model": {f"w{n}": torch.zeros(400_000) for n in range(12)}, "n": 0}


@pytest.fixture
def run_of_two(moto_endpoint, s3_bucket):
    """A run of two sound checkpoints: its URL, and what step 2 holds."""
    url, options = f"s3://{s3_bucket}/run", S3Options(endpoint_url=moto_endpoint)
    state = {"model": {f"w{n}": torch.randn(400_000) for n in range(12)}, "n": 2}
    with open_store(url, options) as store:
        for step in (1, 2):
            write_checkpoint(store, step, state | {"n": step}, codec="none")
    return url, options, state


def resumed(url, proxy):
    state = blank()
    with (
        warnings.catch_warnings(),
        Saver(url, store=S3Options(endpoint_url=proxy.url), engine="inline") as saver,
    ):
        warnings.simplefilter("error")
        return saver.restore(state), state


def assert_nothing_was_given_up(restored, state, expected, url, options):
    assert restored.step == state["n"] == 2
    assert all(torch.equal(state["model"][name], value) for name, value in expected["model"].items())
    with open_store(url, options) as store:
        assert not any(entry.key.endswith(".damaged") for entry in store.list())


@pytest.mark.parametrize("part", ["safetensors", "index.json", "state.pt", "step-0000000002.json"])
def test_one_404_of_any_object_of_the_latest_restores_it_and_marks_nothing(part, run_of_two, proxy):
    url, options, expected = run_of_two
    told = []

    def hide(line):
        hidden = not told and part in line and "step-0000000002" in line and "list-type" not in line
        told.extend([line] if hidden else [])
        return hidden

    proxy.hide = hide
    restored, state = resumed(url, proxy)
    assert told
    assert_nothing_was_given_up(restored, state, expected, url, options)


def test_bits_that_flip_on_the_way_cost_their_ranges_alone_and_mark_nothing(run_of_two, proxy):
    url, options, expected = run_of_two
    count, lock, chosen = itertools.count(), threading.Lock(), {20, 90, 160}
    flipped = []

    def flips():
        with lock:
            number = next(count)
            flipped.extend([number] if number in chosen else [])
            return number in chosen

    proxy.flips = flips
    restored, state = resumed(url, proxy)
    assert flipped
    assert_nothing_was_given_up(restored, state, expected, url, options)


def test_a_path_that_flips_bits_in_a_third_of_all_ranges_restores_the_latest_and_marks_nothing(run_of_two, proxy):
    url, options, expected = run_of_two
    random, lock = Random(6), threading.Lock()

    def flips():
        with lock:
            return random.random() < 0.006

    proxy.flips = flips
    restored, state = resumed(url, proxy)
    assert_nothing_was_given_up(restored, state, expected, url, options)


def test_a_path_that_spoils_every_answer_is_a_bad_store_and_marks_nothing(run_of_two, proxy):
    url, options, _ = run_of_two
    random, lock = Random(6), threading.Lock()

    def flips():
        with lock:
            return random.random() < 0.9

    proxy.flips = flips
    quick = S3Options(endpoint_url=proxy.url, retry=RetryPolicy(deadline_s=5))
    state = blank()
    with (
        Saver(url, store=quick, engine="inline") as saver,
        pytest.raises(errors.StoreError, match="bytes change on the way"),
    ):
        saver.restore(state)
    assert not any(value.any() for value in state["model"].values())
    with open_store(url, options) as store:
        assert not any(entry.key.endswith(".damaged") for entry in store.list())
