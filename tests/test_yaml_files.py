import datetime
import os

import pytest
from foreign_files import attempt
from hypothesis import given
from hypothesis import strategies as st

from tailseg.errors import UserError
from tailseg.yaml_files import DEEPEST, LARGEST, LONGEST_NUMBER, MOST_ALIASES, load_yaml, read_yaml

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


def test_values_and_texts():
    text = "{a: [1, no, 007, 2020-01-02, null], 3: 1e3}"
    assert load_yaml(text, "w") == {"a": [1, False, 7, datetime.date(2020, 1, 2), None], 3: "1e3"}
    assert load_yaml(text, "w", texts=True) == {"a": ["1", "no", "007", "2020-01-02", "null"], "3": "1e3"}
    assert load_yaml("", "w") is None
    assert load_yaml("\ufeffa: 1", "w") == load_yaml(b"\xef\xbb\xbfa: 1\r\n", "w") == {"a": 1}
    assert load_yaml("a: é".encode(), "w") == {"a": "é"}


def test_numbers_to_base_60_are_texts():
    text = "[1:30, 1:30.5, 12:30:45, !!int '1:1', -1:1, 1_000, 0x1F, 1.5e+3]"
    values = ["1:30", "1:30.5", "12:30:45", "1:1", "-1:1", 1000, 31, 1500.0]
    assert load_yaml(text, "w") == values
    long = "1" + ":1" * 400_000  # to compute its value would take hours
    assert load_yaml(f"a: {long}", "w") == {"a": long}
    assert load_yaml(f"a: !!float '{long}.5'", "w") == {"a": f"{long}.5"}


def test_whole_numbers_have_at_most_64_bits():
    assert load_yaml(f"[{2**64 - 1}, {-(2**63)}, 0xffffffffffffffff]", "w") == [2**64 - 1, -(2**63), 2**64 - 1]
    assert load_yaml("0" * (LONGEST_NUMBER - 1) + "7", "w") == 7
    for text in (
        str(2**64),
        str(-(2**63) - 1),
        "0" * LONGEST_NUMBER + "7",
        "0x" + "f" * 5000,
        "-0b" + "1" * 99,
        "!!int '" + "7" * 99 + "'",
    ):
        with pytest.raises(UserError, match=r"^d\.yaml: not valid YAML; fix the file$"):
            load_yaml(f"a: [{text}]", "d.yaml")


@pytest.mark.parametrize("text", ["2020-13-45", "2020-02-30", "9" * 5000, "!!timestamp x", "!!bool x", "!!int ''"])
def test_values_that_cannot_be(text):
    with pytest.raises(UserError) as caught:
        load_yaml(f"a: {text}", "d.yaml", fix="write it again")
    assert str(caught.value) == "d.yaml: not valid YAML; write it again"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a:\n  [", "not valid YAML at line 2; fix the file"),
        ('a: "D:\\data"', "not valid YAML at line 1; write slashes in place of backslashes"),
        ("a: b: c", "not valid YAML at line 1; fix the file"),
        ("a: !!python/object/apply:os.system [x]", "not valid YAML at line 1; fix the file"),
        (b"a: \xff", "it is not a UTF-8 text; save it as one"),
        ("names: [a]".encode("utf-16"), "it is not a UTF-8 text; save it as one"),
        ("a: \0", "not valid YAML; fix the file"),
        ("a: \ud800", "not valid YAML; fix the file"),
        (BOMB, "line 2 has the alias *a, and aliases are not read; write its value out"),
        ("&a [*a]", "line 1 has the alias *a, and aliases are not read; write its value out"),
        ("[" * 51 + "]" * 51, "more than 50 lists or mappings in each other at line 1; fix the file"),
        ("\n" + "{a: " * 100_000, "more than 50 lists or mappings in each other at line 2; fix the file"),
    ],
    ids=range(12),
)
def test_texts_at_fault(text, sentence):
    for texts in (False, True):
        with pytest.raises(UserError) as caught:
            load_yaml(text, "d.yaml", texts=texts)
        assert str(caught.value) == f"d.yaml: {sentence}"


def test_aliases_of_values_without_aliases_are_read_where_they_are_asked_for():
    """detectron2's configurations have one for each list that several keys share."""
    text = "a: {w: &id001 [1.0, 2.0], v: 3}\nb: [*id001, *id001]\n"
    assert load_yaml(text, "w", aliases=True) == {"a": {"w": [1.0, 2.0], "v": 3}, "b": [[1.0, 2.0]] * 2}
    assert len(load_yaml(f"[&a 1{', *a' * MOST_ALIASES}]", "w", aliases=True)) == MOST_ALIASES + 1
    for bomb in (BOMB, "&a [*a]", "&a {b: *a}", f"[&a 1{', *a' * (MOST_ALIASES + 1)}]", "- &a [&b [1], *b]"):
        with pytest.raises(UserError, match="has the alias"):
            load_yaml(bomb, "w", aliases=True)


def test_nesting_up_to_the_limit():
    value = load_yaml("[" * DEEPEST + "]" * DEEPEST, "w")
    for _ in range(DEEPEST - 1):
        (value,) = value
    assert value == []


def test_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: no", encoding="utf-8-sig")
    assert read_yaml(path) == {"a": False}
    assert read_yaml(path, texts=True) == {"a": "no"}
    path.write_text("#" * (LARGEST + 1))
    with pytest.raises(UserError, match=rf"^{path}: it is larger than 1,000 kB, too large for a YAML file"):
        read_yaml(path)
    for wrong in (tmp_path / "gone.yaml", tmp_path, tmp_path / ("n" * 300), tmp_path / "a\0b"):
        with pytest.raises(UserError, match=r": cannot be read \(.+\); check the path and its rights$"):
            read_yaml(wrong)


@given(st.text(st.sampled_from("ab0:-.,[]{}&*!?|>'\"#%@`\n\t \\<=~é\0\ud800"), max_size=40) | st.binary(max_size=20))
def test_any_text_is_read_or_refused_with_a_sentence(text):
    for texts in (False, True):
        _, fault = attempt(lambda t, texts=texts: load_yaml(t, "d.yaml", texts=texts), text)
        assert "\n" not in fault
        assert not fault or fault.startswith("d.yaml: ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_no_file(tmp_path):
    """To open it waits for its writer."""
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"a\.yaml: is no file but a pipe or a device; give a YAML file$"):
        read_yaml(tmp_path / "a.yaml")
