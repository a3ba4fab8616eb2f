"""Half a minute of the soak: what `make soak` does for half an hour."""

import pytest

from tests.faults.soak import Plan, soak

pytestmark = pytest.mark.slow


def test_trainings_that_are_killed_before_a_store_that_goes_away_lose_nothing_and_leave_nothing(tmp_path):
    found = soak(Plan(0.5, rate=0.1, kill_every_s=8, outage_s=5, deadline_s=60, seed=3), tmp_path)
    assert not found.violations, "\n".join([*found.violations, str(found.figures)])
    assert found.figures["spoilt"] > 1
    assert int(found.figures["killed: lives, saves, committed"].split(", ")[0]) > 1
