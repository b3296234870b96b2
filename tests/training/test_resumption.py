import pytest

from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve
from tailseg.training.resumption import require_same_run

NAMES = ("cat", "owl")


def about_run(recipe):
    return {"recipe": recipe.model_dump(mode="json"), "categories": list(NAMES), "seed": 1, "world_size": 1}


def test_a_run_of_an_earlier_version_lacks_newer_keys(tmp_path):
    recipe = resolve("demo/seesaw")
    about = about_run(recipe)
    del about["recipe"]["data"]["groups"]
    require_same_run(about, tmp_path, recipe, NAMES, 1, 1)
    other = resolve("demo/seesaw", ["data.groups=quantiles"])
    with pytest.raises(UserError, match=r"cannot resume with data\.groups = quantiles, the run began with limits; set"):
        require_same_run(about, tmp_path, other, NAMES, 1, 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"categories": ["cat"]}, "the run began with other categories than the data has"),
        ({"seed": 2}, "cannot resume with seed 1, the run began with 2"),
        ({"world_size": 4}, "cannot resume with world_size 1, the run began with 4"),
    ],
)
def test_a_run_goes_on_with_what_it_began_with(tmp_path, changes, sentence):
    recipe = resolve("demo/seesaw")
    require_same_run(about_run(recipe), tmp_path, resolve("demo/seesaw", ["data.workers=7"]), NAMES, 1, 1)
    with pytest.raises(UserError, match=sentence):
        require_same_run(about_run(recipe) | changes, tmp_path, recipe, NAMES, 1, 1)
