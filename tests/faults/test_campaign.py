"""The part of the campaign that every change must pass, and the proof that it can fail."""

import random

import pytest

from tests.faults.campaign import VICTIMS, Verdict, drawn, in_parallel, rehearsed, run, systematic
from tests.faults.fates import KILLS, REQUEST_FAULTS, WIRE_FAULTS, Case
from tests.faults.lives import limits_as_before
from tests.faults.places import PLACES, MemoryPlace
from tests.faults.requests import ForgetfulStore, HidingStore, OverwritingStore, UnconditionalStore
from tests.faults.scenarios import SCENARIOS

pytestmark = pytest.mark.slow
JOBS = 2
SEEDS = range(1000, 1100)


@pytest.fixture(autouse=True, scope="module")
def _other_tests_keep_their_limits():
    with limits_as_before():
        yield


def assert_sound(cases):
    verdicts = list(in_parallel(cases, JOBS))
    assert len(verdicts) == len(cases)
    told = "\n".join(verdict.told() for verdict in verdicts if verdict.violations)
    assert not told, told
    return verdicts


def test_every_fault_at_every_request_of_a_save_loses_nothing():
    cases = systematic("save", "memory")
    verdicts = assert_sound(cases)
    assert all(verdict.fired for verdict in verdicts)
    assert {verdict.case.fault for verdict in verdicts} == set(REQUEST_FAULTS)


@pytest.mark.parametrize(
    "scenario", ["retention", "rewind", "replace", "replace-record", "replace-stump", "race-replace"]
)
def test_every_kill_at_every_request_loses_nothing(scenario):
    assert_sound(systematic(scenario, "memory", KILLS))


def test_dice_for_every_scenario_lose_nothing():
    assert_sound(
        [Case(scenario, "memory", seed=seed) for seed, scenario in zip(SEEDS, list(SCENARIOS) * 99, strict=False)]
    )


def test_a_kill_at_every_file_operation_of_a_save_loses_nothing():
    cases = systematic("save", "local", ["kill-after"])
    assert {case.at.split(":")[1] for case in cases} >= {"link", "fsync", "pwritev", "unlink", "mkdir"}
    assert all(verdict.fired for verdict in assert_sound(cases))


@pytest.mark.parametrize("scenario", ["retention", "rewind", "replace"])
def test_kills_at_some_file_operations_lose_nothing(scenario):
    cases = systematic(scenario, "local", KILLS)
    assert_sound(random.Random(scenario).sample(cases, 12))


@pytest.mark.parametrize("victim", VICTIMS)
def test_whoever_is_killed_at_a_workers_file_operation_nothing_is_lost(victim):
    cases = [case for case in systematic("save", "service") if case.victim == victim]
    assert_sound(random.Random(victim).sample(cases, 2))


def test_a_real_s3_server_behind_a_proxy_that_fails_loses_nothing():
    cases = systematic("retention", "s3", (*KILLS, "lost-answer", "late", "doubled"))
    assert_sound(random.Random("s3").sample(cases, 6))


@pytest.mark.parametrize("fault", WIRE_FAULTS)
def test_bytes_that_change_end_or_trickle_on_their_way_lose_nothing(fault):
    cases = systematic("save", "s3", [fault])
    assert_sound(random.Random(fault).sample(cases, 5))


def lost_with(make, scenario, faults) -> list[Verdict]:
    """The runs in which something is lost before a store that `make` makes."""
    cases = [Case(scenario, "memory"), *systematic(scenario, "memory", faults)]
    verdicts = [run(case, lambda case: MemoryPlace(case, make())) for case in cases]
    return [verdict for verdict in verdicts if "lost" in {kind for kind, _ in verdict.violations}]


@pytest.mark.parametrize(
    ("make", "scenario", "faults"),
    [
        pytest.param(lambda: ForgetfulStore(2), "save", [], id="a store that loses an object it acknowledged"),
        pytest.param(OverwritingStore, "race", ["lost-request"], id="a record that is put over another writer's"),
        pytest.param(UnconditionalStore, "rewind", ["late", "doubled"], id="a record that is removed whoever wrote it"),
        pytest.param(
            UnconditionalStore, "replace-record", ["late-always"], id="a record that is replaced whoever wrote it"
        ),
        pytest.param(HidingStore, "retention", [], id="a retention that removes the newest"),
    ],
)
def test_the_campaign_sees(make, scenario, faults):
    assert lost_with(make, scenario, faults)


def test_a_case_runs_again_as_it_ran():
    case = Case("replace", "memory", seed=7)
    assert run(case).fired == run(case).fired
    assert run(case).fired


def test_the_campaign_kills_at_every_store_whoever_may_die_and_throws_dice():
    cases = list(drawn(2000, seed=1, scenarios=("save", "rewind")))
    killed = {(case.scenario, case.store) for case in cases if case.fault in KILLS}
    assert killed >= {(scenario, store) for scenario in ("save", "rewind") for store in ("memory", "local")}
    assert {case.victim for case in cases if case.store == "service"} == set(VICTIMS)
    assert {case.store for case in cases} == set(PLACES)
    assert len({case.seed for case in cases if case.seed is not None}) > 300


def test_points_have_the_same_names_in_every_run():
    assert set(rehearsed("resume", "local")) == set(rehearsed("resume", "local"))
