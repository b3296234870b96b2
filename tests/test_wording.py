import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailseg.wording import LONGEST_LINE, LONGEST_WORD, for_terminal, one_line, printable, score_text, short

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(values)
def test_short_is_the_repr_cut(value):
    text = repr(value)
    if len(text) <= 60:
        assert short(value) == text
    elif not isinstance(value, str):
        assert len(short(value)) == 60
        assert short(value).endswith("...")


@pytest.mark.parametrize(("opening", "of"), [("[", lambda inner: [inner]), ("{'a': ", lambda inner: {"a": inner})])
def test_short_of_what_is_deeper_than_python_can_go(opening, of):
    value = 1
    for _ in range(5000):
        value = of(value)
    assert short(value) == (opening * 60)[:57] + "..."


def test_short_of_what_is_long():
    assert short("x" * 10**8) == "'" + "x" * 56 + "..."
    assert short([0] * 10**7).startswith("[0, 0, 0")
    assert short("ab", limit=40) == "'ab'"


def test_control_characters_are_escaped():
    evil = "a\x1b[31mred\x1b]0;title\x07 b\x9b2J c\u202egnp.exe d\u2066e\x00 f\rg\ud800"
    assert for_terminal(evil) == (r"a\x1b[31mred\x1b]0;title\x07 b\x9b2J c\u202egnp.exe d\u2066e\x00 f\rg\ud800")
    assert for_terminal("é 犬 👩\u200d🚀\n\tü") == "é 犬 👩\u200d🚀\n\tü"
    assert one_line("a\nb\tc") == r"a\nb\tc"


def test_long_names_are_cut_and_the_advice_stays():
    text = for_terminal(f"a.json: category {'x' * 10_000!r} is there twice; remove one")
    assert len(text) < LONGEST_WORD + 100
    assert text.startswith("a.json: category 'xxx")
    assert text.endswith("xxx' is there twice; remove one")
    spaced = for_terminal("begin " + "x " * 10_000 + "end\nnext line")
    assert spaced.splitlines()[1] == "next line"
    assert len(spaced.splitlines()[0]) == LONGEST_LINE
    assert spaced.splitlines()[0].endswith(" end")
    assert for_terminal("y" * LONGEST_WORD) == "y" * LONGEST_WORD


@given(st.text(st.characters(codec=None)))
def test_whatever_is_printed_can_be(text):
    printed = for_terminal(text)
    printed.encode()
    assert "\x1b" not in printed
    assert for_terminal(printed) == printed


def test_a_name_that_is_not_utf_8_can_be_printed():
    assert printable(os.fsdecode(b"caf\xe9/\xc3\xa9.jpg")) == "caf\\xe9/é.jpg"
    assert printable("plain \\ name.png") == "plain \\ name.png"


@pytest.mark.parametrize(
    ("score", "text"),
    [(0.5, "0.50"), (1, "1.00"), (0.1, "0.10"), (0.0994, "0.099"), (0.00019, "0.00019"), (0.0, "0.00"), (-3, "-3.00")],
)
def test_low_scores_keep_two_digits(score, text):
    assert score_text(score) == text
