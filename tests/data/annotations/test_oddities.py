from pathlib import Path

import pytest

from tailseg.data.annotations.oddities import (
    ODD_KINDS,
    PLACES,
    Oddity,
    Tally,
    counted,
    oddities_of,
    require_sound,
)
from tailseg.errors import UserError


def test_the_first_places_of_each_kind_are_kept():
    tally = Tally()
    for number in range(4):
        tally.add("box", [f"annotation {number}"])
    tally.add("box", (f"annotation {number}" for number in range(4, 7)), 100)
    tally.add("area", [], 0)
    assert tally.counts == {"box": 104}
    assert tally.places["box"] == [f"annotation {number}" for number in range(PLACES)]


def test_errors_come_first():
    assert [kind.severity for kind in ODD_KINDS.values()] == sorted(
        (kind.severity for kind in ODD_KINDS.values()), key=["error", "warning", "note"].index
    )
    tally = Tally()
    for kind in ("area", "no_mask", "image_id"):
        tally.add(kind, ["x"])
    assert [oddity.kind for oddity in oddities_of(tally)] == ["image_id", "no_mask", "area"]


def test_one_sentence_for_the_first_error():
    path = Path("a.json")
    require_sound(path, ())
    require_sound(path, [Oddity("no_mask", 3, ("annotation 1",))])
    size = Oddity("image_id_again", 1, ("image 3: this id occurs more than once",))
    with pytest.raises(UserError) as caught:
        require_sound(path, [size])
    assert str(caught.value).startswith("a.json: image 3: this id occurs more than once; give each its own; ")
    assert "(1 of" not in str(caught.value)
    with pytest.raises(UserError, match=r"\(1 of 1,002 such faults; `tailseg data check` lists their kinds\)$"):
        require_sound(path, [size, Oddity("no_category", 1001, ("annotation 3: x",))])


def test_one_line_names_the_first_three_places():
    assert counted(1, "masks: left out", ["a"]) == "1 masks: left out (a)"
    assert counted(3, "masks", ["a", "b", "c"]) == "3 masks (a, b, c)"
    assert counted(1234, "masks", ["a", "b", "c", "d"]) == "1,234 masks (a, b, c, ...)"
    assert counted(2, "masks", []) == "2 masks"
