"""Fine-tuning: which weights of another model a run starts from, checked class by class and by name."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailseg.checkpoint import load_model, save_model
from tailseg.data.annotations.annotations import Category
from tailseg.data.sources import DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError
from tailseg.losses import ClassStatistics
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.training import loop, weight_init
from tailseg.training.distributed import launch
from tailseg.training.loop import Run, train
from tailseg.training.weight_init import require_sound_start, start_from

SMALL = (
    "model.backbone={name: resnet18, pretrained: false, frozen_stages: -1, options: {channels: [8, 16, 24, 32]}}",
    "model.neck.channels=16",
    "model.rpn={pre_nms_train: 50, pre_nms_test: 50, post_nms_train: 40, post_nms_test: 20}",
    "model.box_head={width: 24, rois: 32, max_positive: 8, class_agnostic: false}",
    "model.mask_head={channels: 8, convs: 1, class_agnostic: false}",
    "data={batch_per_device: 2, workers: 0, short_edges: [64], test_short_edge: 64, long_edge: 64, mask_grid: 28}",
    "schedule={epochs: 1, milestones: [1], warmup_steps: 0}",
    "optimizer={name: adamw, lr: 0.001}",
    "test.max_detections=20",
)
AGNOSTIC = ("model.box_head.class_agnostic=true", "model.mask_head.class_agnostic=true")
CASCADE = (*AGNOSTIC, "model.stages=[{}, {iou: 0.6, mask_weight: 0}, {iou: 0.7}]")
THEIRS = ("zebra", "Stop_Sign", "cup", "hot dog", "tie")
LATER = (
    "model.stages=[{tsd: true}]",
    "model.tsd.shift_width=8",
    "model.context={weight: 3, convs: 1}",
    "model.mask_iou={weight: 0.5, channels: 8, width: 16}",
)
ROWS = {  # of a class, where it has any
    "box_head.classifier": 1,
    "box_head.regressor": 4,
    "mask_head.predictor": 1,
    "box_head.sibling_classifier": 1,
    "box_head.sibling_regressor": 4,
    "context.classifier": 1,
    "mask_iou.predictor": 1,
}


def small(*settings: str) -> Recipe:
    return resolve("demo/seesaw", [*SMALL, *settings])


def plain_cross_entropy(*settings: str) -> Recipe:
    return resolve("demo/cross-entropy", [*SMALL, *settings])


def categories_of(*names: str) -> tuple[Category, ...]:
    return tuple(Category(7 * i + 1, name, "f", 5 * i + 3, 9 * i + 4) for i, name in enumerate(names))


def statistics_of(categories: Sequence[Category]) -> ClassStatistics:
    return ClassStatistics(
        num_images=1000,
        images=torch.tensor([category.image_count for category in categories]),
        instances=torch.tensor([category.instance_count for category in categories]),
    )


def fresh(recipe: Recipe, names: Sequence[str], seed: int) -> Detector:
    torch.manual_seed(seed)
    categories = categories_of(*names)
    return build_detector(recipe, len(categories), statistics_of(categories))


def model_file(
    path: Path, recipe: Recipe, names: Sequence[str] = THEIRS, *, trainable: bool = False
) -> dict[str, Tensor]:
    """A model in which every tensor is random (or of a size that trains) and every count another; returns its state."""
    detector = fresh(recipe, names, seed=1)
    with torch.no_grad():
        for key, value in detector.state_dict().items():
            if value.is_floating_point() and ".classification." not in key and not trainable:
                value.copy_(torch.randn(value.shape).abs() + 0.1)
            elif key.endswith(".counts"):
                value.copy_(torch.arange(len(value)) * 11 + 5)
    save_model(path, detector, recipe, categories_of(*names), step=3)
    return {key: value.clone() for key, value in detector.state_dict().items()}


def started(
    path: Path, recipe: Recipe, names: Sequence[str], seed: int = 2
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """State before and after, and the sentence."""
    detector = fresh(recipe, names, seed)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    sentence = start_from(load_model(path), detector, recipe, categories_of(*names))
    return before, detector.state_dict(), sentence


def rows_a_class(key: str) -> int:
    return next((rows for part, rows in ROWS.items() if f".{part}." in f".{key}"), 0)


@pytest.mark.parametrize("settings", [(), AGNOSTIC, CASCADE, LATER, ("model.mask_head.normalized=true",)])
def test_the_same_categories_give_the_same_model(tmp_path: Path, settings: tuple[str, ...]) -> None:
    theirs = model_file(tmp_path / "m.safetensors", small(*settings))
    before, after, sentence = started(tmp_path / "m.safetensors", small(*settings), THEIRS)
    assert after.keys() == theirs.keys()
    assert [key for key in after if not torch.equal(after[key], theirs[key])] == []
    assert any(key.endswith("seesaw.counts") for key in after)
    assert sum(not torch.equal(before[key], theirs[key]) for key in after) > 100
    assert sentence == f"weights of {tmp_path / 'm.safetensors'} (5 of 5 classes known by name)"


def test_spelling_does_not_make_other_categories(tmp_path: Path) -> None:
    theirs = model_file(tmp_path / "m.safetensors", small())
    _, after, sentence = started(tmp_path / "m.safetensors", small(), ("ZEBRA", "stop sign", "Cup", "hot_dog", " tie"))
    assert [key for key in after if not torch.equal(after[key], theirs[key])] == []
    assert "5 of 5" in sentence


OTHERS = {
    "fewer": ("zebra", "cup"),
    "permuted": ("tie", "hot dog", "zebra", "cup", "Stop_Sign"),
    "more": ("apple", *THEIRS, "pear"),
    "some": ("pear", "hot_dog", "STOP SIGN", "apple"),
    "none": ("apple", "pear", "plum"),
    "as many": ("apple", "zebra", "pear", "plum", "tie"),
    "one": ("cup",),
}


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    ("recipe", "behind", "parts"),  # rows of the classifier behind those of the classes; parts with rows of classes
    [
        (small(), 2, 3),
        (plain_cross_entropy(), 1, 3),
        (plain_cross_entropy("classifier.loss=eql"), 0, 3),
        (small(*LATER), 2, 7),
    ],
    ids=["seesaw", "cross-entropy", "eql", "later parts"],
)
def test_other_categories_take_rows_by_name(
    tmp_path: Path, recipe: Recipe, behind: int, parts: int, names: tuple[str, ...]
) -> None:
    theirs = model_file(tmp_path / "m.safetensors", recipe)
    before, after, sentence = started(tmp_path / "m.safetensors", recipe, names)
    plain = [name.lower().replace("_", " ").strip() for name in THEIRS]
    source = {i: plain.index(n) for i, n in enumerate(x.lower().replace("_", " ") for x in names) if n in plain}
    assert f"({len(source)} of {len(names)} classes known by name)" in sentence
    checked = set()
    for key, value in after.items():
        if ".classification." in key:
            assert torch.equal(value, before[key]), key  # counts of other classes say nothing here
            continue
        rows = rows_a_class(key)
        if not rows:
            assert torch.equal(value, theirs[key]), key
            continue
        checked.add(key)
        for label in range(len(names)):
            own = value[label * rows : (label + 1) * rows]
            if label in source:
                expected = theirs[key][source[label] * rows : (source[label] + 1) * rows]
            else:
                expected = before[key][label * rows : (label + 1) * rows]
            assert torch.equal(own, expected), (key, label)
        extra = behind if "classifier" in key and "box_head" in key else 0
        assert len(value) == len(names) * rows + extra
        if extra:  # background, or foreground and background
            assert torch.equal(value[-extra:], theirs[key][-extra:]), key
    assert len(checked) == 2 * parts


@pytest.mark.parametrize("settings", [AGNOSTIC, CASCADE])
@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
def test_heads_without_classes_are_taken_whole(
    tmp_path: Path, settings: tuple[str, ...], names: tuple[str, ...]
) -> None:
    theirs = model_file(tmp_path / "m.safetensors", small(*settings))
    before, after, _ = started(tmp_path / "m.safetensors", small(*settings), names)
    heads = 0
    for key, value in after.items():
        if rows_a_class(key) and ".classifier." not in key:
            heads += 1
            assert torch.equal(value, theirs[key]), key
            assert not torch.equal(value, before[key]), key
    stages = len(small(*settings).model.stages)
    assert heads == (4 if stages == 1 else 2 * 3 + 2 * 2)  # weight and bias; a stage of the three has no mask head
    for stage in range(stages):
        for name in ("weight", "bias"):
            key = f"stages.{stage}.box_head.classifier.{name}"
            assert torch.equal(after[key][-2:], theirs[key][-2:])
            if "cup" in names:
                assert torch.equal(after[key][names.index("cup")], theirs[key][THEIRS.index("cup")])


def test_later_heads_without_classes_are_taken_whole(tmp_path: Path) -> None:
    theirs = model_file(tmp_path / "m.safetensors", small(*AGNOSTIC, *LATER))
    before, after, _ = started(tmp_path / "m.safetensors", small(*AGNOSTIC, *LATER), ("cup", "apple"))
    for key in ("stages.0.box_head.sibling_regressor.weight", "mask_iou.predictor.weight"):
        assert torch.equal(after[key], theirs[key])
    context = "context.classifier.weight"  # which always has classes
    assert torch.equal(after[context], torch.stack([theirs[context][THEIRS.index("cup")], before[context][1]]))


def test_another_loss_starts_the_sibling_s_classifier_anew_too(tmp_path: Path) -> None:
    theirs = model_file(tmp_path / "m.safetensors", small(*LATER))
    before, after, sentence = started(tmp_path / "m.safetensors", plain_cross_entropy(*LATER), THEIRS)
    assert "the classifier starts again" in sentence
    started_again = [
        f"stages.0.box_head.{name}.{part}"
        for name in ("classifier", "sibling_classifier")
        for part in ("weight", "bias")
    ]
    assert [key for key in after if not torch.equal(after[key], theirs.get(key, before[key]))] == started_again
    assert all(torch.equal(after[key], before[key]) for key in started_again)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (plain_cross_entropy(), THEIRS),
        (plain_cross_entropy(), ("cup", "apple")),
        (small("classifier.normalized=false"), THEIRS),
        (small("classifier.loss=eql-v2"), THEIRS),
        (small("classifier.objectness=false"), THEIRS),
        (plain_cross_entropy("classifier.loss=group-softmax"), ("cup", "apple")),
    ],
)
def test_another_loss_or_form_starts_its_classifier_anew(
    tmp_path: Path, recipe: Recipe, names: tuple[str, ...]
) -> None:
    theirs = model_file(tmp_path / "m.safetensors", small())
    before, after, sentence = started(tmp_path / "m.safetensors", recipe, names)
    assert sentence.endswith("; the classifier starts again, for it does not fit the recipe's loss)")
    started_again = [key for key in after if ".classifier." in key or ".classification." in key]
    assert len(started_again) >= 2
    assert all(torch.equal(after[key], before[key]) for key in started_again)
    for key in after:
        if not rows_a_class(key) and key not in started_again:
            assert torch.equal(after[key], theirs[key]), key
    label = names.index("cup")
    for key in ("stages.0.box_head.regressor.weight", "stages.0.mask_head.predictor.bias"):  # rows of classes still are
        rows, there = rows_a_class(key), THEIRS.index("cup")
        assert torch.equal(
            after[key][label * rows : label * rows + rows], theirs[key][there * rows : there * rows + rows]
        )


def test_group_softmax_keeps_its_classifier_for_the_same_categories_alone(tmp_path: Path) -> None:
    recipe = plain_cross_entropy("classifier.loss=group-softmax")
    theirs = model_file(tmp_path / "m.safetensors", recipe)
    _, after, sentence = started(tmp_path / "m.safetensors", recipe, THEIRS)
    assert [key for key in after if not torch.equal(after[key], theirs[key])] == []
    assert "starts again" not in sentence
    # With other categories its groups are others, and so is what its further rows stand for.
    names = ("tie", "hot dog", "zebra", "cup", "stop sign")
    before, after, sentence = started(tmp_path / "m.safetensors", recipe, names)
    assert "the classifier starts again" in sentence
    for key in after:
        if ".classifier." in key or ".classification." in key:
            assert torch.equal(after[key], before[key]), key
    key = "stages.0.mask_head.predictor.bias"
    assert torch.equal(after[key], theirs[key][[4, 3, 0, 2, 1]])


@pytest.mark.parametrize("name", ["eql", "class-balanced", "ldam", "logit-adjustment", "federated"])
def test_what_a_loss_knows_of_the_data_is_that_of_the_new_run(tmp_path: Path, name: str) -> None:
    changed = {"eql": "threshold=0.5", "class-balanced": "beta=0.5", "federated": "power=1"}
    old = plain_cross_entropy(f"classifier.loss={name}")
    new = plain_cross_entropy(f"classifier.loss={name}", *[f"classifier.{v}" for k, v in changed.items() if k == name])
    model_file(tmp_path / "m.safetensors", old)
    detector = build_detector(new, len(THEIRS), ClassStatistics(
        num_images=50, images=torch.tensor([1, 2, 3, 40, 5]), instances=torch.tensor([9, 2, 3, 80, 6]),
    ))  # fmt: skip
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    start_from(load_model(tmp_path / "m.safetensors"), detector, new, categories_of(*THEIRS))
    known = [key for key in before if ".classification." in key]
    assert known
    assert all(torch.equal(detector.state_dict()[key], before[key]) for key in known)


def test_group_softmax_with_other_groups_starts_its_classifier_anew(tmp_path: Path) -> None:
    model_file(tmp_path / "m.safetensors", plain_cross_entropy("classifier.loss=group-softmax"))
    recipe = plain_cross_entropy("classifier.loss=group-softmax", "classifier.thresholds=[10, 20, 30]")
    before, after, sentence = started(tmp_path / "m.safetensors", recipe, THEIRS)
    assert "starts again" in sentence
    started_again = [key for key in after if ".classifier." in key or ".classification." in key]
    assert all(torch.equal(after[key], before[key]) for key in started_again)


def test_names_that_differ_in_spelling_alone_stay_apart(tmp_path: Path) -> None:
    names = ("Cup", "cup", "hot dog", "hot_dog")
    theirs = model_file(tmp_path / "m.safetensors", small(), names)
    _, after, _ = started(tmp_path / "m.safetensors", small(), names)
    assert [key for key in after if not torch.equal(after[key], theirs[key])] == []


def test_a_single_class_of_another_name_leaves_agnostic_heads_whole(tmp_path: Path) -> None:
    theirs = model_file(tmp_path / "m.safetensors", small(*AGNOSTIC), ("cup",))
    _, after, _ = started(tmp_path / "m.safetensors", small(*AGNOSTIC), ("mug",))
    for key in ("stages.0.box_head.regressor.weight", "stages.0.mask_head.predictor.weight"):
        assert torch.equal(after[key], theirs[key])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("model.neck.channels=8",), "neck"),
        (("model.backbone.name=resnet34",), "is missing"),
        (("model.mask_head.convs=2",), "stages.0.mask_head.convs.1"),
        (("model.box_head.width=32",), "box_head"),
        (AGNOSTIC, "stages.0.box_head.regressor"),
        (CASCADE, "stages."),
    ],
)
@pytest.mark.parametrize("names", [THEIRS, ("cup", "apple")])
def test_another_architecture_is_one_sentence(
    tmp_path: Path, settings: tuple[str, ...], named: str, names: tuple[str, ...]
) -> None:
    """Whichever of the two has more; and the detector stays as it was."""
    path = tmp_path / "m.safetensors"
    for there, here in (((), settings), (settings, ())):
        model_file(path, small(*there))
        detector = fresh(small(*here), names, seed=2)
        before = {key: value.clone() for key, value in detector.state_dict().items()}
        with pytest.raises(UserError) as caught:
            start_from(load_model(path), detector, small(*here), categories_of(*names))
        message = str(caught.value)
        assert message.startswith(f"--init {path}: '")
        assert "another architecture" in message
        assert f"tailseg train {path} --init {path}" in message
        assert "\n" not in message
        assert there or named in message
        assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_a_file_is_compared_before_the_model_is_built(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that claims to be large, one that lacks a tensor, one of another architecture."""

    def never(*_: Any) -> None:
        raise AssertionError("takes memory")

    monkeypatch.setattr(loop, "build_detector", never)
    path, names = tmp_path / "m.safetensors", [category.name for category in data.train.categories]  # type: ignore[union-attr]
    state = model_file(path, small(), names)
    huge = small("model.box_head.width=16384", "model.neck.channels=2048")
    for recipe, left_out, here, sentence in (
        (huge, "", small(), f"^{path}: does not fit its recipe, first at '"),
        (huge, "", huge, f"^{path}: does not fit its recipe, first at '"),
        (small(), "rpn.conv.bias", small(), f"^{path}: does not fit its recipe, first at 'rpn.conv.bias'; the file is"),
        (small(), "", small("model.neck.channels=8"), f"^--init {path}: .* the recipe builds another architecture"),
        (small(), "", huge, f"^--init {path}: .* the recipe builds another architecture"),
    ):
        kept = {key: value for key, value in state.items() if key != left_out}
        save_model(path, kept, recipe, categories_of(*names), step=0)
        with pytest.raises(UserError, match=sentence):
            train(here, data, tmp_path / "run", init=path, show=False)
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_models(tmp_path: Path) -> None:
    detector, categories = fresh(small(), THEIRS, seed=2), categories_of(*THEIRS)
    (tmp_path / "text.safetensors").write_text("nothing of the kind")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for name, sentence in (
        ("gone", "there is no such file"),
        ("text", "is not a tailseg checkpoint"),
        ("foreign", "carries no recipe"),
    ):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(UserError) as caught:
            start_from(load_model(path), detector, small(), categories)
        assert str(caught.value).startswith(f"{path}: ")
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    settings = SyntheticSettings(classes=4, train_images=4, val_images=2, size=64, rarest=3)
    return open_data(str(write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)))


def names_of(data: DataSplits) -> list[str]:
    assert data.train is not None
    return [category.name for category in data.train.categories]


def test_a_run_begins_with_these_weights(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not those of ImageNet; and the loss goes on counting from where the model had come."""

    def asked(*_: Any) -> str:
        raise AssertionError("ImageNet weights are not wanted")

    monkeypatch.setattr(weight_init, "load_pretrained", asked)
    path = tmp_path / "m.safetensors"
    recipe = small("model.backbone.pretrained=true")
    theirs = model_file(path, recipe, names_of(data), trainable=True)
    run = Run(launch(1), recipe, data, tmp_path / "run", seed=0, init=path)
    state = run.detector.state_dict()
    assert [key for key in state if not torch.equal(state[key], theirs[key])] == []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: None)
    with caplog.at_level(logging.INFO):
        train(recipe, data, tmp_path / "run", init=path, show=False)
    assert f"weights of {path} (4 of 4 classes known by name)." in caplog.text
    last = load_file(tmp_path / "run" / "last.safetensors")
    changed = [key for key in last if not torch.equal(last[key], theirs[key])]
    assert changed == ["stages.0.box_head.classification.seesaw.counts"]
    assert (last[changed[0]] >= theirs[changed[0]]).all()


def test_rows_of_new_classes_are_those_of_the_runs_own_seed(data: DataSplits, tmp_path: Path) -> None:
    path, names = tmp_path / "m.safetensors", names_of(data)
    theirs = model_file(path, small(), (names[2], "something else", names[0]))
    plain = Run(launch(1), small(), data, tmp_path / "plain", seed=4).detector.state_dict()
    state = Run(launch(1), small(), data, tmp_path / "run", seed=4, init=path).detector.state_dict()
    weight, bias = (f"stages.0.mask_head.predictor.{part}" for part in ("weight", "bias"))
    for key in (weight, bias):
        expected = torch.stack([theirs[key][2], plain[key][1], theirs[key][0], plain[key][3]])
        assert torch.equal(state[key], expected)
    backbone = [key for key in state if key.startswith(("backbone", "neck", "rpn"))]
    assert len(backbone) > 50
    assert all(torch.equal(state[key], theirs[key]) for key in backbone)


def test_resuming_goes_on_with_the_runs_own_weights(data: DataSplits, tmp_path: Path) -> None:
    path, out = tmp_path / "m.safetensors", tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(small(), data, out, resume=True, init=path, show=False)
    assert str(caught.value).startswith(f"--init {path}: --resume goes on with the weights of the run itself")
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_resuming_asks_for_no_weights_of_imagenet(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run goes on, there may be no network."""
    asked = []
    monkeypatch.setattr(weight_init, "load_pretrained", lambda backbone, _: str(asked.append(backbone)))
    out, pretrained = tmp_path / "run", small("model.backbone.pretrained=true", "model.backbone.frozen_stages=1")
    train(pretrained, data, out, show=False)
    assert len(asked) == 1
    more = small("model.backbone.pretrained=true", "model.backbone.frozen_stages=1", "schedule.epochs=2")
    train(more, data, out, resume=True, show=False)
    assert len(asked) == 1


@pytest.mark.parametrize("stages", [0, 1, 4])
def test_frozen_stages_at_random_weights_are_refused(stages: int) -> None:
    """As long as nothing else fills them: a model, or the run itself."""
    frozen = small(f"model.backbone.frozen_stages={stages}")
    with pytest.raises(UserError) as caught:
        require_sound_start(frozen, None, resume=False)
    assert str(caught.value) == (
        f"model.backbone.frozen_stages = {stages}: with model.backbone.pretrained=false these stages would stay at "
        "random weights; set model.backbone.frozen_stages=-1, or start from a model by --init"
    )
    require_sound_start(frozen, Path("m.safetensors"), resume=False)
    require_sound_start(frozen, None, resume=True)
    require_sound_start(small(), None, resume=False)
    require_sound_start(
        small(f"model.backbone.frozen_stages={stages}", "model.backbone.pretrained=true"), None, resume=False
    )


def test_settings_under_which_the_weights_were_trained_are_said(tmp_path: Path) -> None:
    model_file(tmp_path / "m.safetensors", small("model.roi_pooling.aligned=false", "test.nms_iou=0.3"))
    _, _, sentence = started(tmp_path / "m.safetensors", small("model.backbone.norm_eps=0.001"), THEIRS)
    assert sentence.endswith(
        "; they were trained with model.backbone.norm_eps = None (here 0.001), "
        "model.roi_pooling.aligned = False (here True)"
    )


def test_options_of_the_backbone_that_the_run_lacks_are_said(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    theirs = small("model.backbone.options={drop_path_rate: 0.2}")
    model_file(path, theirs)
    names = [str(recipe.model.backbone.options) for recipe in (theirs, small())]
    _, _, sentence = started(path, small(), THEIRS)
    assert sentence.endswith("; they were trained with model.backbone.options = {} (here {})".format(*names))
    detector = fresh(small(FINETUNE), THEIRS, seed=2)
    with pytest.raises(UserError, match=re.escape("has model.backbone.options = {}, the recipe {}".format(*names))):
        start_from(load_model(path), detector, small(FINETUNE), categories_of(*THEIRS))


def test_a_run_that_cannot_begin_leaves_no_folder(data: DataSplits, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match="there is no such file"):
        train(small(), data, out, init=tmp_path / "gone.safetensors", show=False)
    model_file(tmp_path / "m.safetensors", small("model.neck.channels=8"))
    with pytest.raises(UserError, match="another architecture"):
        train(small(), data, out, init=tmp_path / "m.safetensors", show=False)
    assert not out.exists()


def test_ids_and_groups_of_the_model_do_not_matter(tmp_path: Path) -> None:
    theirs = model_file(tmp_path / "m.safetensors", small())
    detector = fresh(small(), THEIRS, seed=2)
    mine = [replace(c, id=900 - c.id, frequency="r", image_count=0) for c in categories_of(*THEIRS)]
    start_from(load_model(tmp_path / "m.safetensors"), detector, small(), mine)
    state = detector.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.items())


# ---------------------------------------------------------------------------------------------------------
# Second branches on a frozen model

SECOND = ".second_branch."
FINETUNE = "finetune.enabled=true"


def origins(recipe: Recipe) -> dict[str, str]:
    """Of each tensor that a second branch of a stage begins as a copy of: its name there, by that of the branch."""
    tsd, convs = recipe.model.stages[0].tsd, recipe.model.box_head.convs
    layers = ("class_branch.0", "class_branch.2") if tsd else ("fc1",) if convs else ("fc1", "fc2")
    names = {f"layers.{n}": layer for n, layer in enumerate(layers)} | {"classifier": "classifier"}
    return {
        f"stages.{n}{SECOND}{ours}.{part}": f"stages.{n}.box_head.{theirs}.{part}"
        for n in range(len(recipe.model.stages))
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("settings", [(), ("model.box_head.convs=2",), LATER, CASCADE])
@pytest.mark.parametrize("make", [small, plain_cross_entropy])
def test_second_branches_start_as_copies_or_as_they_are(tmp_path: Path, settings: tuple[str, ...], make: Any) -> None:
    theirs = model_file(tmp_path / "m.safetensors", make(*settings))
    for start in ("copy", "random"):
        recipe = make(*settings, FINETUNE, f"finetune.start={start}")
        before, after, sentence = started(tmp_path / "m.safetensors", recipe, THEIRS)
        ends = {"copy": "start as copies of its classification", "random": "start from random weights"}
        assert sentence.endswith(f"(5 of 5 classes known by name); second branches {ends[start]}")
        assert [key for key in theirs if not torch.equal(theirs[key], after[key])] == []
        branches = [key for key in after if key not in theirs]
        assert branches
        assert all(SECOND in key for key in branches)
        learnt = origins(recipe)
        assert set(learnt) == {key for key in branches if ".classification." not in key}
        for key in branches:
            expected = theirs[learnt[key]] if key in learnt and start == "copy" else before[key]
            assert torch.equal(after[key], expected), key
        counts = [key for key in branches if key.endswith(".counts")]
        assert len(counts) == (len(recipe.model.stages) if make is small else 0)
        assert all(after[key].sum() == 0 for key in counts)


@pytest.mark.parametrize("names", [THEIRS[::-1], ("cup", "tie")])
def test_second_branches_of_the_same_classes_in_another_order(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Both copies of a classifier hold the rows of each class, by its name."""
    theirs = model_file(tmp_path / "m.safetensors", small())
    _, after, _ = started(tmp_path / "m.safetensors", small(FINETUNE), names)
    for part in ("weight", "bias"):
        rows = theirs[f"stages.0.box_head.classifier.{part}"]
        expected = torch.cat([rows[[THEIRS.index(name) for name in names]], rows[-2:]])
        for own in ("box_head", "second_branch"):
            assert torch.equal(after[f"stages.0.{own}.classifier.{part}"], expected)


@pytest.mark.parametrize("names", [THEIRS, THEIRS[::-1]])
def test_a_model_s_own_second_branches_are_kept(tmp_path: Path, names: tuple[str, ...]) -> None:
    theirs = model_file(tmp_path / "m.safetensors", small(FINETUNE))
    recipe = small(FINETUNE, "finetune.start=random")
    before, after, sentence = started(tmp_path / "m.safetensors", recipe, names)
    assert sentence.endswith("; second branches go on from the model's own")
    for key, value in after.items():
        if names == THEIRS:
            expected = theirs[key]
        elif ".classification." in key:
            expected = before[key]
        elif rows_a_class(key) or f"{SECOND}classifier." in key:
            rows = rows_a_class(key) or 1
            by_class = theirs[key][: 5 * rows].unflatten(0, (5, rows)).flip(0).flatten(0, 1)
            expected = torch.cat([by_class, theirs[key][5 * rows :]])
        else:
            expected = theirs[key]
        assert torch.equal(value, expected), key
    # Without the section there is no place for them.
    with pytest.raises(
        UserError, match=r"'stages\.0\.second_branch\.[a-z.0]+' has no place: the recipe builds another"
    ):
        started(tmp_path / "m.safetensors", small(), names)


def test_what_stays_frozen_must_be_the_model_s(tmp_path: Path) -> None:
    """No class is learnt, and no number of the recipe may change what the weights compute."""
    path = tmp_path / "m.safetensors"
    model_file(path, small())
    cases = {
        "does not know 'pear', and with finetune.enabled it learns no new class": (small(), ("cup", "pear")),
        "does not know 'apple' and 2 more of the data's classes": (small(), ("apple", "cup", "pear", "fig")),
        "has classifier.loss = seesaw, the recipe eql-v2": (small("classifier.loss=eql-v2"), THEIRS),
        "has classifier.normalized = True, the recipe False": (small("classifier.normalized=false"), THEIRS),
        "has another form of classifier": (small("classifier.objectness=false"), THEIRS),
        "has model.roi_pooling.aligned = True, the recipe False": (small("model.roi_pooling.aligned=false"), THEIRS),
        "has model.pixel_mean = [123.675, 116.28, 103.53], the recipe [0.0, 0.0, 0.0]": (
            small("model.pixel_mean=[0, 0, 0]"), THEIRS,
        ),
    }  # fmt: skip
    for sentence, (recipe, names) in cases.items():
        recipe = recipe.model_copy(update={"finetune": small(FINETUNE).finetune})
        detector = fresh(recipe, names, seed=2)
        before = {key: value.clone() for key, value in detector.state_dict().items()}
        with pytest.raises(UserError) as caught:
            start_from(load_model(path), detector, recipe, categories_of(*names))
        message = str(caught.value)
        assert message.startswith(f"--init {path}: {sentence}")
        assert "\n" not in message
        assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())
    # What only training looks at may differ.
    free = (
        "classifier.p=0.5",
        "model.stages=[{iou: 0.6, weight: 0.5}]",
        "model.box_head.rois=16",
        "model.rpn.box_beta=1",
    )
    _, after, _ = started(path, small(FINETUNE, *free), THEIRS)
    assert len(after) > 100
