import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tailseg.checkpoint import Checkpoint
from tailseg.data.annotations.annotations import Category
from tailseg.errors import UserError
from tailseg.hub.card import NAMES, model_card, read_metrics
from tailseg.recipes.resolve import resolve

CATEGORIES = (
    Category(3, "zebra crossing", "r", 1, 2),
    Category(5, "<b>|`owl`", "r", 7, 9),
    Category(17, "café", "f", 1200, 4400),
)
METRICS = {
    "bbox": {"AP": 0.25, "AP50": 0.5, "AP75": 0.2, "APr": None, "APc": None, "APf": 0.3, "AR300": 0.4},
    "segm": {"AP": 0.214, "AP50": 0.4, "AP75": 0.2, "APr": 0.1, "APc": None, "APf": 0.3, "AR300": 0.4},
}
MODEL = Checkpoint(
    path=Path("m.safetensors"),
    recipe=resolve("table1/seesaw"),
    categories=CATEGORIES,
    step=90_000,
    metrics=METRICS,
    state={},
)


def test_the_card_states_data_groups_results_and_licence() -> None:
    card = model_card(MODEL, "anna/birds", licence="apache-2.0", data="LVIS v1, training split.")
    _, head, body = card.split("---\n", 2)
    header = yaml.safe_load(head)
    assert (header["license"], header["library_name"], header["pipeline_tag"]) == (
        *("apache-2.0", "tailseg"),
        "image-segmentation",
    )
    lines = body.splitlines()
    assert "# birds" in lines
    assert "| rare | 2 | 1 to 7 | 11 |" in lines
    assert "| frequent | 1 | 1,200 | 4,400 |" in lines
    assert not [line for line in lines if line.startswith("| common ")]
    assert "| % | boxes | masks |" in lines
    assert "| AP | 25.0 | 21.4 |" in lines
    assert "| AP, rare classes | – | 10.0 |" in lines
    assert not [line for line in lines if line.startswith("| AP, common")]  # no such classes
    assert "LVIS v1, training split." in lines
    assert "tailseg hub pull anna/birds" in lines
    assert 'found = tailseg.load("birds.safetensors").predict("photo.jpg", score=0.3)' in lines
    assert "Mask R-CNN with resnet50, classifier `seesaw`, 3 classes." in body
    assert "90,000 training steps" in body


def test_names_from_the_model_are_shown_as_text() -> None:
    card = model_card(MODEL, "anna/birds", licence="mit", data="[a](javascript:x) <script>\nb")
    assert r"zebra crossing, \<b\>\|\`owl\`, café." in card
    assert r"\[a\](javascript:x) \<script\> b" in card
    many = replace(MODEL, categories=tuple(Category(i, f"c{i}", "c", 20, 20) for i in range(NAMES + 5)))
    assert card.count("\n## ") == model_card(many, "a/b", licence="mit").count("\n## ")
    assert f"c{NAMES - 1}, and 5 more." in model_card(many, "a/b", licence="mit")


def test_what_is_not_known_is_not_made_up() -> None:
    card = model_card(replace(MODEL, metrics=None, categories=()), "a/b", licence="mit")
    assert card.count("Not stated.") == 2
    assert "| AP | 30.0 |" in model_card(MODEL, "a/b", licence="mit", metrics={"segm": {"AP": 0.3}})


@pytest.mark.parametrize(
    "metrics", [{"segm": {"AP": "x"}}, {"segm": {"AP": [1]}}, {"bbox": {"AP": 2**2000}}, {"segm": 3}]
)
def test_metrics_in_the_model_that_are_none(metrics: dict[str, object]) -> None:
    model = replace(MODEL, metrics=metrics)
    with pytest.raises(UserError, match=r"^m\.safetensors: its metrics are no fractions from 0 to 1.* --metrics"):
        model_card(model, "a/b", licence="mit")
    assert "| AP | 30.0 |" in model_card(model, "a/b", licence="mit", metrics={"segm": {"AP": 0.3}})


def test_metrics_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(METRICS))
    assert read_metrics(path) == METRICS
    for content in ("[]", "{}", '{"segm": 3}', '{"segm": {"AP": "high"}}', '{"segm": {"AP": 25.0}}'):
        path.write_text(content)
        with pytest.raises(UserError, match="holds no metrics"):
            read_metrics(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_metrics(path)
    path.write_bytes(b" " * (1 << 21))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_metrics(path)
    with pytest.raises(UserError, match=f"^{tmp_path}/none: cannot be read"):
        read_metrics(tmp_path / "none")
