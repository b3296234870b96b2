from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.diagnosis.class_names import near_names


def test_near_names():
    names = [
        "hot_dog",
        "Hot Dog",
        "hot-dogs",
        "berry",
        "berries",
        "cat",
        "car",
        "toaster",
        "coaster",
        "recieve",
        "receive",
    ]
    assert near_names(names) == [
        ("hot_dog", "Hot Dog", "spelling"),
        ("hot_dog", "hot-dogs", "plural"),
        ("Hot Dog", "hot-dogs", "plural"),
        ("berry", "berries", "plural"),
        ("toaster", "coaster", "one letter"),
        ("recieve", "receive", "one letter"),
    ]
    assert near_names([]) == []


def test_lvis_has_no_two_spellings_of_one_class(shared):
    lines = (shared / "data" / "lvis_v1_categories.csv").read_text().splitlines()[1:]
    near = near_names([line.split(",")[1] for line in lines])
    assert all(kind != "spelling" for _, _, kind in near)
    assert len(near) < 40


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        ("cat", "Cat", "spelling"),
        ("stop_sign", "stop-sign", "spelling"),
        ("stop sign", "stopsign", "spelling"),
        ("cup", "cups", "plural"),
        ("glass", "glasses", "plural"),
        ("brush", "brushes", "plural"),
        ("bench", "benches", "plural"),
        ("box", "boxes", "plural"),
        ("pony", "ponies", "plural"),
        ("Hot_Dog", "hotdogs", "plural"),
        ("banana", "bananna", "one letter"),
        ("pepper", "peppre", "one letter"),
        ("cereal", "cerial", "one letter"),
        ("cat", "car", None),  # too short
        ("glas", "glass", None),  # one letter, but too short; and glass is no plural
        ("pepper", "eppper", "one letter"),
        ("abcdef", "badcef", None),  # two exchanges
        ("abcdef", "abcdefgh", None),
        ("ties", "ty", None),
    ],
)
def test_kinds_of_likeness(one, other, kind):
    expected = [] if kind is None else [(one, other, kind)]
    assert near_names([one, other]) == expected
    assert near_names([other, one]) == [(b, a, k) for a, b, k in expected]


def test_the_same_name_twice_and_three_alike():
    assert near_names(["cup", "cup"]) == [("cup", "cup", "spelling")]
    assert near_names(["Cup", "hat", "cup", "CUP"]) == [
        ("Cup", "cup", "spelling"),
        ("Cup", "CUP", "spelling"),
        ("cup", "CUP", "spelling"),
    ]
    assert near_names(["cup"]) == []
    assert near_names(["", " ", "_"]) == [("", " ", "spelling"), ("", "_", "spelling"), (" ", "_", "spelling")]


def one_edit(a: str, b: str) -> bool:
    """By definition: all that one inserted, deleted, replaced or exchanged letter makes of ``a``."""
    letters = set(a + b)
    made = {a[:i] + x + a[i:] for i in range(len(a) + 1) for x in letters}
    made |= {a[:i] + x + a[i + 1 :] for i in range(len(a)) for x in {"", *letters}}
    made |= {a[:i] + a[i + 1] + a[i] + a[i + 2 :] for i in range(len(a) - 1)}
    return b in made


@given(st.lists(st.text("abx", min_size=5, max_size=8), min_size=2, max_size=6, unique=True))
def test_one_letter_apart_is_what_one_edit_makes(names):
    """Without an s no name is a plural, and distinct names of lower-case letters have distinct spellings."""
    expected = [(a, b, "one letter") for a, b in combinations(names, 2) if min(len(a), len(b)) >= 6 and one_edit(a, b)]
    assert near_names(names) == expected


def test_the_comparison_is_bounded(monkeypatch, caplog):
    assert near_names(["x" * 10_000, "x" * 9_999]) == []  # too long to delete each of its letters
    monkeypatch.setattr("tailseg.data.diagnosis.class_names.COMPARED", 3)
    names = ["one class", "one klass", "cat", "one_class", "cats"]
    # The closest kinds come first; the third candidate is the first pair again, by its singular.
    assert near_names(names) == [("one class", "one_class", "spelling"), ("cat", "cats", "plural")]
    assert "more than 3 pairs of class names may be nearly the same: only the first 3 are compared" in caplog.text
