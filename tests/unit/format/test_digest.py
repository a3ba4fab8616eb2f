import pytest

from asyncckpt.format.digest import digest, from_hex, hexdigest


def test_a_digest_survives_as_text():
    assert from_hex(hexdigest(b"a", b"bc")) == digest(b"abc")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0" * 63,
        "0" * 65,
        "A" * 64,
        "g" * 64,
        " " * 64,
        "\N{ARABIC-INDIC DIGIT ZERO}" * 64,
        {},
        {"a": 1},
        [],
        None,
        7,
        b"0" * 64,
        ["0"] * 64,
    ],
    ids=repr,
)
def test_whatever_else_stands_in_its_place_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"hex|digest"):
        from_hex(text)
