import pytest
import torch

from tailseg.checkpoint import write_tensors
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import changed
from tailseg.training.resumption import is_recorded, out_of_memory, require_same_run

NAMES = ("cat", "owl")
DATA = {
    "train": {"content": "ab", "images": 12, "objects": 30},
    "val": {"content": "cd", "images": 4, "objects": 9},
}


def about_run(recipe):
    return {
        "recipe": recipe.model_dump(mode="json"),
        "categories": list(NAMES),
        "seed": 1,
        "world_size": 1,
        "data": DATA,
    }


@pytest.mark.parametrize(
    ("settings", "options", "fix"),
    [
        (["data.batch_per_device=9"], {}, "or set data.batch_per_device=3 and training.accumulate=3, then start again"),
        (
            ["data.batch_per_device=7", "training.accumulate=2"],
            {},
            "data.batch_per_device=1 and training.accumulate=14",
        ),
        (["training.cuda_graphs=true"], {"graphs": True}, "or set training.cuda_graphs=false, then start again"),
        (["data.batch_per_device=1"], {}, "or set model.backbone.checkpointing=true, then start again"),
        (["data.batch_per_device=1", "model.backbone.checkpointing=true"], {}, "in another --out"),
    ],
)
def test_out_of_memory(tmp_path, settings, options, fix):
    recipe = resolve("demo/seesaw", settings)
    sentence = out_of_memory(tmp_path, 6, recipe, **({"graphs": False} | options))
    assert sentence.startswith(f"{tmp_path}: step 6 does not fit into the memory of the GPU")
    assert fix in sentence
    if "then start again" in fix:  # what is advised may be resumed with
        other = resolve("demo/seesaw", settings + fix.split("set ")[1].split(",")[0].split(" and "))
        (warning,) = require_same_run(about_run(recipe), tmp_path, other, NAMES, 1, 1, DATA)
        assert "goes on with" in warning


def test_a_run_of_an_earlier_version_lacks_newer_keys(tmp_path):
    recipe = resolve("demo/seesaw")
    about = about_run(recipe)
    del about["recipe"]["data"]["groups"]
    del about["data"]
    assert require_same_run(about, tmp_path, recipe, NAMES, 1, 1, DATA) == []
    other = resolve("demo/seesaw", ["data.groups=quantiles"])
    with pytest.raises(UserError, match=r"cannot resume with data\.groups = quantiles, the run began with limits; set"):
        require_same_run(about, tmp_path, other, NAMES, 1, 1, DATA)


@pytest.mark.parametrize(
    ("key", "began", "now"),
    [
        ("model.backbone.options", {"drop_path_rate": 0.2}, {}),
        ("model.backbone.options", {}, {"drop_path_rate": 0.2}),
        ("model.backbone.options", {"drop_path_rate": 0.2, "drop_rate": 0.1}, {"drop_path_rate": 0.2}),
        ("optimizer.rates", {"backbone": 0.1}, {}),
        ("optimizer.rates", {"backbone": 0.1}, {"rpn": 0.1}),
    ],
)
def test_keys_that_a_recipe_need_not_have_stay_as_they_were(tmp_path, key, began, now):
    old, new = (changed(resolve("demo/seesaw"), {key: value}) for value in (began, now))
    with pytest.raises(UserError) as refused:
        require_same_run(about_run(old), tmp_path, new, NAMES, 1, 1, DATA)
    assert str(refused.value) == (
        f"{tmp_path}: cannot resume with {key} = {now}, the run began with {began}; set it back or choose another --out"
    )
    assert require_same_run(about_run(old), tmp_path, old, NAMES, 1, 1, DATA) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"categories": ["cat"]}, "the run began with other categories than the data has"),
        ({"seed": 2}, "cannot resume with seed 1, the run began with 2; set --seed 2"),
        (
            {"data": DATA | {"train": {"content": "ee", "images": 6, "objects": 30}}},
            r"the train split had 6 images with 30 objects when the run began, and has 12 images with 30 objects now; "
            r"go on with the data of before, or train on the new with --init .*last\.safetensors, another --out",
        ),
        (
            {"data": DATA | {"val": {"content": "ee", "images": 4, "objects": 9}}},
            "the val split holds 4 images with 9 objects as it did when the run began, but with other content; go on",
        ),
    ],
)
def test_a_run_goes_on_with_what_it_began_with(tmp_path, changes, sentence):
    recipe = resolve("demo/seesaw")
    other = resolve("demo/seesaw", ["data.workers=7", "schedule.epochs=99", "training.log_steps=3"])
    assert require_same_run(about_run(recipe), tmp_path, other, NAMES, 1, 1, DATA) == []
    with pytest.raises(UserError, match=sentence):
        require_same_run(about_run(recipe) | changes, tmp_path, recipe, NAMES, 1, 1, DATA)


def test_what_may_change_with_a_warning(tmp_path):
    old = resolve("demo/seesaw", ["optimizer.lr=0.5", "optimizer.clip=null"])
    new = resolve("demo/seesaw", ["optimizer.lr=0.25", "optimizer.clip=3", "training.cuda_graphs=true"])
    assert require_same_run(about_run(old), tmp_path, new, NAMES, 1, 1, DATA) == [
        f"{tmp_path}: goes on with optimizer.clip = 3.0 instead of None: no longer the run that it began as.",
        f"{tmp_path}: goes on with optimizer.lr = 0.25 instead of 0.5: no longer the run that it began as.",
        f"{tmp_path}: goes on with training.cuda_graphs = True instead of False: no longer the run that it began as.",
    ]


@pytest.mark.parametrize(("world", "batch", "accumulate"), [(2, 4, 1), (1, 4, 2), (4, 1, 2), (1, 1, 8)])
def test_the_images_of_a_step_may_be_shared_out_otherwise(tmp_path, world, batch, accumulate):
    old = resolve("demo/seesaw", ["data.batch_per_device=8"])
    settings = [f"data.batch_per_device={batch}", f"training.accumulate={accumulate}"]
    (warning,) = require_same_run(about_run(old), tmp_path, resolve("demo/seesaw", settings), NAMES, 1, world, DATA)
    assert warning == (
        f"{tmp_path}: goes on with {world} process(es) x data.batch_per_device {batch} x training.accumulate "
        f"{accumulate} instead of 1 process(es) x data.batch_per_device 8 x training.accumulate 1: as many images a "
        "step, but the rest of the run is no longer the same to the bit."
    )


@pytest.mark.parametrize(("world", "batch", "accumulate"), [(2, 8, 1), (1, 5, 1), (1, 8, 3)])
def test_another_number_of_images_a_step_is_refused(tmp_path, world, batch, accumulate):
    old = resolve("demo/seesaw", ["data.batch_per_device=8"])
    new = resolve("demo/seesaw", [f"data.batch_per_device={batch}", f"training.accumulate={accumulate}"])
    with pytest.raises(UserError, match=r"so that the product is 8$") as refused:
        require_same_run(about_run(old), tmp_path, new, NAMES, 1, world, DATA)
    assert f"which is {world * batch * accumulate} images a step" in str(refused.value)


def test_an_evaluation_in_a_damaged_log_is_repeated(tmp_path):
    """What the log says of a step must agree with the best model, which has a checksum."""
    metrics, other = ({"segm": {"AP": value}} for value in (0.5, 0.9))
    assert not is_recorded(tmp_path, 6, None, metrics)
    assert not is_recorded(tmp_path, 6, 0.4, metrics)
    assert is_recorded(tmp_path, 6, None, {"segm": {"AP": None}})
    write_tensors(tmp_path / "best.safetensors", {"x": torch.ones(1)}, {"tailseg": "1", "step": 6, "metrics": metrics})
    assert is_recorded(tmp_path, 6, None, metrics)
    assert is_recorded(tmp_path, 6, 0.4, metrics)
    assert not is_recorded(tmp_path, 6, 0.4, other)
    assert not is_recorded(tmp_path, 6, 0.6, metrics)  # it was not the best, but is kept as such
    assert is_recorded(tmp_path, 12, 0.5, {"segm": {"AP": 0.3}})
    assert not is_recorded(tmp_path, 12, 0.5, other)
    (tmp_path / "best.safetensors").write_bytes(b"x")
    assert not is_recorded(tmp_path, 6, None, metrics)
