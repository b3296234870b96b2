"""Which of a model's classes a data set has, by name."""

import logging
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from tailseg.data.annotations.annotations import Annotations, Category
from tailseg.data.sources import known_categories, open_source, same_name
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError


def annotations_of(folder: Path, names: list[str], first_id: int = 10) -> Annotations:
    """A validation file with these categories, their ids three apart, out of order."""
    write_synthetic(folder, SyntheticSettings(classes=4, train_images=1, val_images=2, size=64))
    content = orjson.loads((folder / "val.json").read_bytes())
    content["categories"] = [
        {"id": first_id + 3 * i, "name": name, "frequency": "f"} for i, name in reversed(list(enumerate(names)))
    ]
    content["annotations"] = [row | {"category_id": first_id} for row in content["annotations"]]
    (folder / "val.json").write_bytes(orjson.dumps(content))
    val = open_source(str(folder), need=("val",)).val
    assert val is not None
    return val


def model_of(*names: str) -> list[Category]:
    return [Category(100 + i, name, "f", 1, 1) for i, name in enumerate(names)]


@pytest.fixture
def annotations(tmp_path: Path) -> Annotations:
    return annotations_of(tmp_path / "data", ["zebra", "stop sign", "Hot_Dog", "cup"])


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("cup", "cup"),
        ("Cup", "cup"),
        ("stop_sign", "stop sign"),
        ("  Stop__sign ", "stop sign"),
        ("STOP SIGN", "stop sign"),
        ("cup_(drink)", "cup (drink)"),
        ("", ""),
    ],
)
def test_spelling(name: str, plain: str) -> None:
    assert same_name(name) == plain


def test_other_words_stay_other_names() -> None:
    assert len({same_name(name) for name in ("stop sign", "stopsign", "stop-sign", "stop signs")}) == 4


def test_ids_follow_the_models_labels(annotations: Annotations, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert known_categories(annotations, annotations.categories, "m") == [10, 13, 16, 19]
        assert known_categories(annotations, model_of("cup", "Stop_Sign", "hot dog", "ZEBRA"), "m") == [19, 13, 16, 10]
    assert caplog.text == ""  # the data's categories are all known


def test_a_model_that_knows_more(annotations: Annotations, caplog: pytest.LogCaptureFixture) -> None:
    known = model_of("apple", "zebra", "cup", "hot dog", "tie", "stop sign")
    with caplog.at_level(logging.WARNING):
        assert known_categories(annotations, known, "m") == [None, 10, 19, 16, None, 13]
    assert caplog.text == ""


def test_a_model_that_knows_less(annotations: Annotations, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert known_categories(annotations, model_of("cup", "Zebra"), "runs/m.safetensors") == [19, 10]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"runs/m.safetensors knows 2 of the 4 categories of {annotations.path}; "
        "the others, such as 'stop sign', score 0."
    )


@pytest.mark.parametrize("names", [("apple", "tie"), ("tie", "cup", "Zebra"), ("zebra", "stop sign", "hot dog", "mug")])
def test_each_has_what_the_other_lacks(annotations: Annotations, names: tuple[str, ...]) -> None:
    """Then something was renamed, and a score would not be one of the model."""
    with pytest.raises(UserError) as caught:
        known_categories(annotations, model_of(*names), "runs/m.safetensors")
    theirs = next(name for name in names if same_name(name) not in ("zebra", "stop sign", "hot dog", "cup"))
    ours = next(c.name for c in annotations.categories if same_name(c.name) not in map(same_name, names))
    assert str(caught.value).startswith(f"{annotations.path}: has a category '{ours}', which runs/m.safetensors does ")
    assert f"lacks its '{theirs}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_very_name_comes_before_another_spelling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of categories that differ in their spelling alone each keeps its own."""
    data = annotations_of(tmp_path / "data", ["Cup", "cup", "CUP"])
    with caplog.at_level(logging.WARNING):
        assert known_categories(data, model_of("cup", "CUP", "Cup"), "m") == [13, 16, 10]
        assert known_categories(data, data.categories, "m") == [10, 13, 16]
    assert caplog.text == ""


def test_ids_of_the_model_do_not_matter(annotations: Annotations) -> None:
    swapped = [replace(category, id=29 - category.id) for category in annotations.categories]
    assert known_categories(annotations, swapped, "m") == [10, 13, 16, 19]
