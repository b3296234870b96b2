from itertools import takewhile
from pathlib import Path

import pytest
from foreign_files import calls
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.importers.path_ends import PathEnds

ROOT = Path("/set")


def agreement(one, other):
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def first(ends, wanted):
    """The longest end and its files."""
    return next(ends.matching(tuple(wanted.split("/"))), ((), []))


def test_the_longest_end_comes_first():
    files = [ROOT / name for name in ("s1/rgb.png", "s2/rgb.png", "deep/s2/rgb.PNG", "a.jpg")]
    ends = PathEnds(files, ROOT)
    assert list(ends.matching(("old", "deep", "s2", "rgb.png"))) == [
        (("deep", "s2", "rgb.png"), [files[2]]),
        (("s2", "rgb.png"), files[1:3]),
        (("rgb.png",), files[:3]),
    ]
    assert list(ends.matching(("x", "a.jpg"))) == [(("a.jpg",), [files[3]])]
    assert list(ends.matching(("rgb",))) == list(ends.matching(())) == []
    assert list(PathEnds([], ROOT).matching(("a.jpg",))) == []
    assert first(PathEnds(files, ROOT, lambda path: path.stem), "s1/rgb") == (("s1", "rgb"), [files[0]])


paths = st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map("/".join), min_size=1, max_size=8)


@given(names=paths, wanted=paths, folder=st.lists(st.sampled_from("ab"), max_size=3))
def test_files_agree_and_are_near_as_a_plain_statement_has_it(names, wanted, folder):
    files = [ROOT / name for name in dict.fromkeys(names)]
    ends = PathEnds(files, ROOT)
    for name in wanted:
        lengths = {path: agreement(name.split("/")[::-1], path.relative_to(ROOT).parts[::-1]) for path in files}
        most = max(lengths.values())
        best = [path for path in files if lengths[path] == most] if most else []
        end, found = first(ends, name)
        assert (len(end), found) == (most, best)
        if best:
            above = [path.relative_to(ROOT).parts[:-1] for path in best]
            near = [agreement(own, folder) + agreement(own[::-1], folder[::-1]) for own in above]
            nearest = [path for path, number in zip(best, near, strict=True) if number == max(near)]
            expected = nearest[0] if len(nearest) == 1 else None
            assert ends.nearest(end, found, ROOT.joinpath(*folder)) == expected


@pytest.mark.parametrize("wanted", ["old/s{}/rgb.png", "gone/{}/rgb.png"])
def test_the_work_for_files_of_one_name_grows_as_their_number(wanted):
    def search(number):
        ends = PathEnds([ROOT / "img" / f"s{i}" / "rgb.png" for i in range(number)], ROOT)
        for i in range(number):
            end, found = first(ends, wanted.format(i))
            ends.nearest(end, found, ROOT / "json" / f"s{i}")
            ends.nearest(end, found, ROOT / "img")

    assert calls(lambda: search(400)) < 2.5 * calls(lambda: search(200))
