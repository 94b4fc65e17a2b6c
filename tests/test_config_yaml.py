import math

import pytest
import yaml as pyyaml
from hypothesis import given
from hypothesis import strategies as st

from r1mega.config import yaml
from r1mega.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E6", 3e6),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("+12", 12),
        ("010", 10),
        (".inf", math.inf),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("'1e-4'", "1e-4"),
        ("{0: 16, 10: 24}", {0: 16, 10: 24}),
    ],
)
def test_scalars_are_what_people_mean(text: str, value: object) -> None:
    found = yaml.parse(text, "test")
    assert found == value and type(found) is type(value)


def test_a_key_given_twice_is_refused_with_its_line() -> None:
    with pytest.raises(UserError, match=r"^r\.yaml: line 3, column 1: key 'a' is given twice$"):
        yaml.parse("a: 1\nb: 2\na: 3\n", "r.yaml")


def test_a_merge_may_be_overridden_but_not_doubled() -> None:
    assert yaml.parse("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}", "test")["y"] == {"a": 3, "b": 2}


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\ta: 1", "!!python/object:os.system x", "a: 'open", "- 1\nb: 2", "\x00"])
def test_malformed_text_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^r\.yaml: ") as error:
        yaml.parse(text, "r.yaml")
    assert "\n" not in str(error.value)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12))
def test_any_string_reads_back_here_and_under_yaml_1_1(text: str) -> None:
    written = yaml.dump({"key": text})
    assert yaml.parse(written, "test") == {"key": text}
    assert pyyaml.safe_load(written) == {"key": text}


@given(st.floats(allow_nan=False))
def test_any_number_reads_back_here_and_under_yaml_1_1(number: float) -> None:
    written = yaml.dump({"key": number})
    assert yaml.parse(written, "test") == {"key": number}
    assert pyyaml.safe_load(written) == {"key": number}
