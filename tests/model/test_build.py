"""What is built of recipes: every loss and head trains, detects and gets the settings meant for it."""

import pytest
import timm
import torch
from recipe_stages import CASCADE, plain_stage

from tailseg.errors import UserError
from tailseg.layers.carafe import CarafeUpsample
from tailseg.losses import CLASSIFICATIONS, ClassStatistics
from tailseg.model.build import build_detector
from tailseg.model.tsd import TsdBoxHead
from tailseg.recipes.classifiers import CLASSIFIERS
from tailseg.recipes.resolve import BUILT_IN, resolve
from tailseg.recipes.values import diff, override
from tailseg.structures import Batch

CLASSES = 5


def batch() -> Batch:
    """Two images of 64 pixels, with two objects and with none."""
    side = 30
    return Batch(
        images=torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        image_sizes=torch.full((2, 2), 64),
        original_sizes=torch.full((2, 2), 128),
        image_ids=torch.tensor([1, 2]),
        boxes=torch.tensor([[[4.0, 4, 40, 40], [30, 30, 60, 60]], [[0, 0, 0, 0], [0, 0, 0, 0]]]),
        labels=torch.tensor([[0, 4], [0, 0]]),
        valid=torch.tensor([[True, True], [False, False]]),
        masks=torch.full((2, 2, side, side), 255, dtype=torch.uint8),
        mask_frames=torch.tensor([[[4.0, 4, 40, 40], [30, 30, 60, 60]], [[0, 0, 1, 1], [0, 0, 1, 1]]]),
        absent=torch.tensor([[False, True, False, False, False], [True] * 5]),
        ignored=torch.zeros(2, 0, 0, dtype=torch.uint8),
    )


STATISTICS = ClassStatistics(
    num_images=2000, images=torch.tensor([1, 5, 20, 300, 1500]), instances=torch.tensor([1, 9, 40, 700, 4000])
)
EVERY_LOSS = [(name, ()) for name in BUILT_IN if "table2" not in name] + [  # those are in test_table2.py
    ("demo/cross-entropy", (f"classifier.loss={n}",)) for n in CLASSIFIERS
]


@pytest.mark.parametrize(("name", "settings"), EVERY_LOSS)
def test_recipe_trains_and_detects(name: str, settings: tuple[str, ...]) -> None:
    small = ["model.backbone.pretrained=false", "test.max_detections=7", "model.rpn.post_nms_test=50"]
    if name.startswith(("table1", "own")):  # at full size these are row 1 of table 2 with another classifier
        small += ["model.box_head.rois=32", "model.box_head.max_positive=8", "model.neck.channels=64"]
    if name in ("htc", "scnet"):
        small += ["model.neck.channels=32", "model.mask_head.channels=32", "model.box_head={rois: 32, width: 64}"]
    recipe = resolve(name, [*settings, *small])
    torch.manual_seed(0)
    detector = build_detector(recipe, CLASSES, STATISTICS)
    losses = detector.train()(batch())
    seesaw = recipe.classifier.loss == "seesaw"
    own = ["classes", "box", "mask", *(["objectness"] if seesaw else [])]
    if len(recipe.model.stages) > 1:
        own = [f"stage{number}.{loss}" for number in (1, 2, 3) for loss in own]
    if name == "scnet":  # one mask head, and a context encoder
        own = [*own, "context"]
        own.remove("stage1.mask")
        own.remove("stage2.mask")
    assert set(losses) == {"rpn_objectness", "rpn_box", *own}
    assert all(loss.shape == () and torch.isfinite(loss) for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    gradients = [p.grad is not None and bool(p.grad.isfinite().all()) for p in detector.parameters() if p.requires_grad]
    assert all(gradients)
    classification = detector.stages[0].box_head.classification
    assert isinstance(classification, CLASSIFICATIONS[recipe.classifier.loss])
    assert bool((detector.stages[0].box_head.classifier.bias == classification.initial_bias).all())
    found = detector.eval().detect(batch())
    assert [f.image_hw for f in found] == [(128, 128)] * 2
    for detections in found:
        assert 0 < len(detections) <= 7
        assert detections.boxes.shape == (len(detections), 4)
        assert detections.masks.shape == (len(detections), 28, 28)
        assert int(detections.labels.max()) < CLASSES
        assert torch.equal(detections.scores, detections.scores.sort(descending=True).values)


@pytest.mark.parametrize("loss", CLASSIFIERS)
def test_a_model_of_every_loss_is_complete_in_its_state(loss: str) -> None:
    recipe = resolve("demo/cross-entropy", [f"classifier.loss={loss}", *NARROW])
    trained = build_detector(recipe, CLASSES, STATISTICS).train()
    trained(batch())
    loaded = build_detector(recipe, CLASSES)
    buffers = loaded.stages[0].box_head.classification.buffers()
    unknown = [b for b in buffers if b.is_floating_point() and bool(b.isnan().all())]
    assert bool(unknown) == (CLASSIFICATIONS[loss].needs_statistics)
    loaded.load_state_dict(trained.state_dict())
    for ours, theirs in zip(loaded.train()(batch()).values(), trained(batch()).values(), strict=True):
        assert bool(torch.isfinite(ours))
        assert bool(torch.isfinite(theirs))
    pairs = zip(loaded.eval().detect(batch()), trained.eval().detect(batch()), strict=True)
    assert all(torch.equal(ours.scores, theirs.scores) for ours, theirs in pairs)


NARROW = [
    "model.backbone={name: resnet18, pretrained: false, options: {channels: [8, 16, 24, 32]}}",
    "model.neck.channels=16",
    "model.box_head.width=16",
    "model.mask_head={channels: 8, convs: 1}",
]


def test_the_cascade_of_public_checkpoints() -> None:
    """Row 4 without a context encoder, and with a mask head in every stage that weighs as much as the stage."""
    recipe = resolve("table2/cascade-mask-rcnn")
    stages = [stage | {"mask_weight": stage["weight"]} for stage in CASCADE]
    found = diff(resolve("table2/01-mask-rcnn"), recipe)
    assert [key for key, _, _ in found] == [
        *("model.rpn.post_nms_train", "model.rpn.box_beta", "model.rpn.inside_image"),
        *("model.box_head.class_agnostic", "model.box_head.box_beta", "model.box_head.low_quality"),
        "model.stages",
    ]
    assert found[-1] == ("model.stages", [plain_stage()], stages)
    detector = build_detector(override(recipe, NARROW), CLASSES)
    assert [stage.mask_head is not None for stage in detector.stages] == [True] * 3
    assert [(stage.weight, stage.mask_weight) for stage in detector.stages] == [(1, 1), (0.5, 0.5), (0.25, 0.25)]
    assert [detector.context, detector.mask_iou] == [None, None]
    losses = detector.train()(batch())
    assert {name for name in losses if "mask" in name} == {f"stage{t}.mask" for t in (1, 2, 3)}


def test_settings_reach_the_parts_of_table_2() -> None:
    settings = [
        "model.context={weight: 2, convs: 6, residual: true, norm: false, unlabelled: ignored}",
        "model.mask_iou={weight: 0.75, channels: 6, width: 10}",
        "model.mask_head.class_agnostic=true",
        "model.tsd={shift_width: 9, gamma: 0.2, class_margin: 0.1, box_margin: 0.4, constrain_classes: false}",
        "model.tsd.zero_init_shifts=true",
        "model.tsd.detach_targets=true",
        "model.stages.1.tsd=false",
        "classifier={normalized: true, temperature: 7}",
    ]
    detector = build_detector(resolve("table2/06-mask-scoring", [*NARROW, *settings]), CLASSES)
    context, scoring = detector.context, detector.mask_iou
    assert context is not None
    assert scoring is not None
    assert (detector.context_weight, len(context.convs), context.residual, len(context.norms)) == (2, 6, True, 0)
    assert (context.unlabelled, context.classifier.weight.shape) == ("ignored", (CLASSES, 16))
    assert (detector.mask_iou_weight, scoring.convs[0].weight.shape) == (0.75, (6, 17, 3, 3))
    assert (scoring.fc2.weight.shape, scoring.predictor.weight.shape) == ((10, 10), (1, 10))
    assert scoring.class_agnostic
    assert [isinstance(stage.box_head, TsdBoxHead) for stage in detector.stages] == [True, False, True]
    for head in (detector.stages[0].box_head, detector.stages[2].box_head):
        assert (head.gamma, head.class_margin, head.box_margin) == (0.2, 0.1, 0.4)
        assert (head.constrain_classes, head.detach_targets, head.box_beta) == (False, True, 1.0)
        assert head.shared[0].weight.shape == (9, 16 * 49)
        assert all((shift[-1].weight == 0).all() for shift in (head.class_shift, head.box_shift))
        assert head.classifier.temperature == head.sibling_classifier.temperature == 7
        assert head.regressor.out_features == head.sibling_regressor.out_features == 4
    assert [stage.box_head.stds for stage in detector.stages] == [tuple(stage["stds"]) for stage in CASCADE]
    mask_head = detector.stages[2].mask_head
    assert (mask_head.class_agnostic, len(mask_head.norms)) == (True, 1)
    assert isinstance(mask_head.upsample, CarafeUpsample)
    plain = build_detector(resolve("table2/06-mask-scoring", NARROW), CLASSES)
    assert (plain.context_weight, len(plain.context.norms), plain.context.unlabelled) == (3, 4, "negative")
    assert (plain.mask_iou_weight, plain.mask_iou.predictor.weight.shape) == (0.5, (CLASSES, 1024))
    head = plain.stages[0].box_head
    assert (head.gamma, head.class_margin, head.box_margin, head.constrain_classes) == (0.1, 0.3, 0.3, True)


def test_a_part_without_weight_is_not_there() -> None:
    settings = ["model.context.weight=0", "model.mask_iou.weight=0"]
    detector = build_detector(resolve("table2/06-mask-scoring", [*NARROW, *settings]), CLASSES)
    assert [detector.context, detector.mask_iou] == [None, None]
    assert not any(name.startswith(("context", "mask_iou")) for name in detector.state_dict())


def test_convolutions_of_the_box_heads_are_in_every_stage() -> None:
    detector = build_detector(resolve("table2/04-htc-lite", [*NARROW, "model.box_head.convs=4"]), CLASSES)
    for stage in detector.stages:
        assert (len(stage.box_head.convs), len(stage.box_head.norms), stage.box_head.fc2) == (4, 4, None)


@pytest.mark.parametrize("settings", [["classifier.normalized=true"], ["classifier.loss=group-softmax"]])
def test_tau_norm_needs_one_plain_row_a_class(settings: list[str]) -> None:
    assert resolve("demo/cross-entropy", ["test.tau_norm=0.7"]).test.tau_norm == 0.7
    with pytest.raises(UserError, match=r"recipe: test.tau_norm = 0.7 does not go with .*; set it to 0"):
        build_detector(resolve("demo/cross-entropy", ["test.tau_norm=0.7", *settings]), CLASSES)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if not name.startswith("demo")])
def test_pixels_are_scaled_as_for_the_weights(name: str) -> None:
    """Frozen stages and batch norms with fixed statistics could not make up for other numbers."""
    model = resolve(name).model
    trained = timm.get_pretrained_cfg(model.backbone.name)
    assert trained is not None
    assert model.pixel_mean == pytest.approx([255 * mean for mean in trained.mean], abs=0.5)
    assert model.pixel_std == pytest.approx([255 * std for std in trained.std], abs=0.5)
