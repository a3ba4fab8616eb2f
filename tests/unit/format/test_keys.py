import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import ResourceLimitError, UnsafeCheckpointError, UnsupportedObjectError
from asyncckpt.format import keys

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["", "#1", "#", "%", "%2F", "a/b", "a@0", "__metadata__", "%5F_metadata__", "\x00", "..", "layers.0.weight"]
)
KEY = TEXT | st.integers(-(2**63), 2**63 - 1)


@given(st.lists(KEY, min_size=1, max_size=5))
def test_split_gives_the_keys_back_that_were_joined(parts):
    back = keys.split(keys.join(parts))
    assert back == tuple(parts)
    assert [type(key) for key in back] == [type(key) for key in parts]


@given(TEXT)
def test_an_escaped_key_is_never_special(key):
    part = keys.escape(key)
    assert "/" not in part
    assert "@" not in part
    assert not part.startswith("#")
    assert part != "__metadata__"


def test_names_of_a_module_stay_as_they_are():
    assert keys.join(["model", "layers.0.weight"]) == "model/layers.0.weight"
    assert keys.join(["optimizer", "state", 0, "exp_avg"]) == "optimizer/state/#0/exp_avg"


@pytest.mark.parametrize("part", ["#", "#01", "#x", "%2f", "%41", "a%", "a@b", "__metadata__", "#-0"])
def test_a_part_that_no_key_escapes_to_is_refused(part):
    with pytest.raises(ValueError, match="not a key"):
        keys.unescape(part)


@pytest.mark.parametrize("key", [True, 1.5, None, (1, 2), b"x", "\ud800"])
def test_a_key_that_cannot_be_stored_raises_and_is_named(key):
    with pytest.raises(UnsupportedObjectError) as caught:
        keys.escape(key)
    assert caught.value.key == repr(key)


@given(st.lists(st.none() | KEY, max_size=20))
def test_slugs_are_safe_and_unique(groups):
    found = keys.slugs(groups)
    assert len(set(found)) == len(groups)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", slug) for slug in found)


def test_slugs_of_names_that_differ_in_case_differ():
    assert keys.slugs(["Model", "model", None, "model", "../x", "é"]) == [
        "model",
        "model-2",
        "state",
        "model-3",
        "x",
        "group",
    ]


@pytest.mark.parametrize("step", [0, 1000, 9_999_999_999, 10_000_000_000, 2**53])
def test_keys_of_a_step_are_parsed_back(step):
    assert keys.parse_record_key(keys.record_key(step)) == step
    assert keys.parse_damaged_key(keys.damaged_key(step)) == step
    folder = keys.folder(step, "0a1b2c3d-12")
    assert keys.parse_folder(folder) == step
    assert keys.parse_folder(folder.split("/")[0] + "/") == step
    assert keys.parse_folder(folder + "index.json.zst") == step
    assert keys.check_folder(folder) == folder
    assert keys.check_object_key(folder + "index.json.zst")


def test_keys_look_as_designed():
    assert keys.record_key(1000) == "step-0000001000.json"
    assert keys.damaged_key(1000) == "step-0000001000.damaged"
    assert keys.folder(1000, "ab-1") == "step-0000001000/ab-1/"


@pytest.mark.parametrize(
    "key", ["step-1.json", "step-00000000010.json", "step-0000001000.jso", "x/step-0000001000.json"]
)
def test_foreign_keys_are_no_records(key):
    assert keys.parse_record_key(key) is None
    assert keys.parse_folder(key) is None


@pytest.mark.parametrize("step", [-1, 2**53 + 1])
def test_a_step_out_of_range_raises(step):
    with pytest.raises(ValueError, match="step"):
        keys.record_key(step)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "..",
        "step-0000000001/a/../b",
        "step-0000000001/../x",
        "step-0000000001/a/b/c",
        "step-0000000001/a",
        "step-0000000001//b",
        "step-1/a/b",
        "step-0000000001.json",
        "step-0000000001/a/.b",
        "step-0000000001/a/b\x00",
        "step-0000000001/a/b\n",
        "step-0000000001/a\\b/c",
        "step-0000000001/a/%2e%2e",
        "step-0000000001/A/b",
        "s3://bucket/step-0000000001/a/b",
        "step-0000000001/a/" + "b" * 129,
        7,
    ],
)
def test_an_unsafe_object_key_is_refused(key):
    with pytest.raises(UnsafeCheckpointError):
        keys.check_object_key(key)
    with pytest.raises(UnsafeCheckpointError):
        keys.check_folder(key)


def test_a_folder_is_no_object_and_an_object_no_folder():
    with pytest.raises(UnsafeCheckpointError):
        keys.check_object_key("step-0000000001/a/")
    with pytest.raises(UnsafeCheckpointError):
        keys.check_folder("step-0000000001/a/b")


@pytest.mark.parametrize("key", [2**63, -(2**63) - 1, 10**4000])
def test_an_integer_key_beyond_64_bits_is_refused(key):
    with pytest.raises(UnsupportedObjectError, match=r"2\^63"):
        keys.escape(key)


@pytest.mark.parametrize("part", [f"#{2**63}", f"#{-(2**63) - 1}", "#" + "9" * 5000])
def test_no_integer_beyond_64_bits_is_a_part_of_a_path(part):
    with pytest.raises(ResourceLimitError, match="beyond"):
        keys.unescape(part)
    assert keys.unescape(f"#{-(2**63)}") == -(2**63)


def test_a_step_above_the_limit_is_no_record():
    assert keys.parse_record_key(f"step-{2**53}.json") == 2**53
    assert keys.parse_record_key(f"step-{2**53 + 1}.json") is None
