"""Recipes from Python: names, values under keywords, comparison."""

from pathlib import Path

import pytest

from tailseg import recipes
from tailseg.errors import UserError
from tailseg.recipes.resolve import BUILT_IN


def test_the_names_are_those_of_the_command():
    assert recipes.names() == list(BUILT_IN)


def test_keywords_are_the_keys_of_set():
    changed = recipes.get("table1/seesaw", classifier__p=0.6, data__short_edges=(600,))
    found = {key: after for key, _, after in recipes.diff(recipes.get("table1/seesaw"), changed)}
    assert found == {"classifier.p": 0.6, "data.short_edges": [600]}
    assert recipes.get(changed, **{"schedule.epochs": 3}).schedule.epochs == 3
    assert "p: 0.6" in recipes.to_yaml(changed)


def test_a_file_may_be_a_path_or_a_text(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text("extends: small/seesaw\nschedule: {epochs: 7}\n")
    assert recipes.get(file).schedule.epochs == recipes.get(str(file)).schedule.epochs == 7


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"classifier__q": -1}, "classifier.q"),
        ({"schedule__epoch": 3}, "'schedule.epochs'"),
        ({"optimizer": 3}, "'optimizer' is a section"),
    ],
)
def test_faulty_keywords(keywords, words):
    with pytest.raises(UserError, match=words):
        recipes.get("small/seesaw", **keywords)
