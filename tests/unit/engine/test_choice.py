"""`codec="auto"` takes the codec whose saves are durable sooner, and loses little by finding out."""

import itertools
import random

import pytest

from asyncckpt.engine.choice import FIRST_TRIAL, LAST_TRIAL, MIN_BYTES, SETTLING_SAVES, CodecChoice, usual_codec
from asyncckpt.store.memory import MemoryStore

GB = 10**9


class FarStore(MemoryStore):
    min_part_bytes = 5 * 2**20


def run(choice, saves, seconds):
    """Save so often; `seconds(codec, save)` a GB. Returns the codecs."""
    taken = []
    for save in range(saves):
        codec = choice.choose()
        taken.append(codec)
        choice.learn(codec, GB, seconds(codec, save))
    return taken


def test_a_network_begins_with_planes_and_a_folder_with_none():
    assert usual_codec(FarStore()) == "planes"
    assert usual_codec(MemoryStore()) == "none"


@pytest.mark.parametrize("codec", ["planes", "zstd", "none"])
def test_a_fixed_codec_is_taken_always(codec):
    assert run(CodecChoice(codec, "planes"), 50, lambda *_: 1.0) == [codec] * 50


def test_behind_a_slow_link_it_stays_with_planes():
    taken = run(CodecChoice("auto", "planes"), 300, lambda codec, _: {"planes": 8.4, "none": 10.0}[codec])
    assert taken[:5] == ["planes", "planes", "none", "planes", "none"]
    assert taken.count("none") <= 9


def test_where_the_store_is_faster_than_the_encoder_it_leaves_planes():
    taken = run(CodecChoice("auto", "planes"), 300, lambda codec, _: {"planes": 1.0, "none": 0.5}[codec])
    assert taken[SETTLING_SAVES : SETTLING_SAVES + 4] == ["none"] * 4
    assert taken.count("planes") <= 10


@pytest.mark.parametrize("usual", ["planes", "none"])
@pytest.mark.parametrize("ratio", [0.3, 0.8, 0.97, 1.03, 1.2, 3.0])
def test_in_the_long_run_it_loses_no_more_than_five_per_cent_against_the_better_choice(usual, ratio):
    noise = random.Random(7)
    cost = {"planes": 1.0, "none": ratio}

    def seconds(codec, _):
        spent[0] += cost[codec]
        return cost[codec] * noise.uniform(1.0, 1.3)  # disturbances only add

    spent = [0.0]
    run(CodecChoice("auto", usual), 1000, seconds)
    assert spent[0] <= 1.05 * 1000 * min(cost.values())


def test_one_disturbed_measurement_is_found_out_soon():
    for disturbed in ({1}, {3}, {1, 2}, {3, 4}):
        choice = CodecChoice("auto", "none")
        cost = {"none": 0.5, "planes": 1.0}
        taken = run(choice, 20, lambda codec, save, at=disturbed, cost=cost: 5.0 if save in at else cost[codec])
        assert taken[SETTLING_SAVES:].count("planes") <= 2


def test_when_all_first_measurements_were_disturbed_a_trial_finds_out():
    cost = {"none": 0.5, "planes": 1.0}
    taken = run(CodecChoice("auto", "none"), 30, lambda codec, save: 5.0 if save in (1, 3) else cost[codec])
    assert taken[SETTLING_SAVES] == "planes"
    assert taken[SETTLING_SAVES + FIRST_TRIAL + 1 :].count("planes") <= 3


def test_a_link_that_turns_slow_is_followed():
    choice = CodecChoice("auto", "planes")
    run(choice, 50, lambda codec, _: {"planes": 1.0, "none": 0.5}[codec])
    taken = run(choice, 20, lambda codec, _: {"planes": 8.4, "none": 10.0}[codec])
    assert taken[-10:].count("planes") >= 8


def test_trials_become_rare_but_never_end():
    taken = run(CodecChoice("auto", "none"), 2000, lambda codec, _: {"planes": 2.0, "none": 1.0}[codec])
    trials = [save for save, codec in enumerate(taken) if codec == "planes"]
    assert max(later - sooner for sooner, later in itertools.pairwise(trials)) <= LAST_TRIAL + 1
    assert len(trials) < 15


def test_saves_of_few_bytes_say_nothing():
    choice = CodecChoice("auto", "none")
    for _ in range(50):
        assert choice.choose() == "none"
        choice.learn("none", MIN_BYTES - 1, 1.0)


@pytest.mark.parametrize("broken", ["planes", "none"])
@pytest.mark.parametrize("usual", ["planes", "none"])
def test_a_codec_whose_saves_always_fail_is_left(broken, usual):
    choice = CodecChoice("auto", usual)
    taken = []
    for _ in range(200):
        codec = choice.choose()
        taken.append(codec)
        if codec == broken:
            choice.failed(codec)
        else:
            choice.learn(codec, GB, 1.0)
    assert taken.count(broken) <= 10
    assert taken[-20:].count(broken) <= 1


def test_an_outage_that_fails_every_save_is_forgotten_afterwards():
    choice = CodecChoice("auto", "planes")
    for _ in range(30):
        choice.failed(choice.choose())
    taken = run(choice, 60, lambda codec, _: {"planes": 1.0, "none": 0.5}[codec])
    assert taken[-10:].count("none") >= 9


def test_a_codec_that_takes_twice_as_long_is_tried_twice_in_sixty_saves():
    taken = run(CodecChoice("auto", "none"), 60, lambda codec, _: {"planes": 2.0, "none": 1.0}[codec])
    assert [save for save, codec in enumerate(taken) if codec == "planes"] == [2, 43]


def test_a_first_trial_that_was_disturbed_is_made_up_for_after_forty_saves():
    cost = {"none": 1.0, "planes": 0.5}
    taken = run(CodecChoice("auto", "none"), 100, lambda codec, save: 5.0 if save == 2 else cost[codec])
    assert taken[60:].count("planes") >= 35
