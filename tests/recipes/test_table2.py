"""The rows of Table 2: a step and an inference each, and whole runs of the real command in miniature."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_stages import CASCADE, plain_stage
from safetensors.torch import load_file
from tiny import SMALL_RECIPE, assert_done, meta_without_values, noise_batch, options, tailseg
from torch import Tensor

from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.evaluation.tta import detect_views, views_of
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.ladder import REPORT, costs
from tailseg.recipes.resolve import BUILT_IN, resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import diff, override
from tailseg.structures import Batch, RawDetections
from tailseg.training.finetune import Branches, Frozen, join
from tailseg.training.loop import Run

ROWS = tuple(REPORT)
CLASSES = 1203  # of LVIS v1

# ---------------------------------------------------------------------------------------------------------
# What each row changes


def steps(proposals: int, *, full_size: bool) -> dict[str, list[tuple[str, object, object]]]:
    """What each row of table 2 changes of the one before.

    The miniature has class-agnostic boxes and a bound on its gradients from the start.
    """
    return {
        "02-sync-bn": [("model.backbone.train_norm", False, True), ("model.mask_head.norm", False, True)],
        "03-carafe": [("model.mask_head.upsample", "deconv", "carafe")],
        "04-htc-lite": [
            ("model.rpn.post_nms_train", proposals, 2 * proposals),
            ("model.rpn.box_beta", 0.0, pytest.approx(1 / 9)),
            ("model.rpn.inside_image", False, True),
            *([("model.box_head.class_agnostic", False, True)] if full_size else []),
            ("model.box_head.box_beta", 0.0, 1.0),
            ("model.box_head.low_quality", True, False),
            ("model.context.weight", 0.0, 3.0),
            ("model.context.norm", False, True),
            ("model.stages", [plain_stage()], CASCADE),
        ],
        "05-tsd": [
            ("model.stages", CASCADE, [stage | {"tsd": True} for stage in CASCADE]),
            *([("optimizer.clip", None, 35.0)] if full_size else []),
        ],
        "06-mask-scoring": [("model.mask_iou.weight", 0.0, 0.5)],
        "08-neck": [
            ("model.neck.kind", "fpn", "fpg"),
            *([] if full_size else [("model.neck.pathways", 9, 5)]),
            ("model.neck.deformable", False, True),
            ("model.neck.carafe", False, True),
        ],
        "10-seesaw": [
            ("model.tsd.constrain_classes", True, False),
            ("classifier.loss", "cross-entropy", "seesaw"),
            ("classifier.normalized", False, True),
            ("classifier.objectness", None, True),
            ("classifier.p", None, 0.8),
            ("classifier.q", None, 0.0),
        ],
        **(LARGE if full_size else SMALL),
    }


LARGE = {
    "07-augmentation": [
        ("data.test_short_edge", 800, 1280),
        ("data.long_edge", 1333, 1280),
        ("data.long_edges", None, [768, 1792]),
        ("data.crop", None, 1280),
        ("data.instaboost", 0.0, 0.5),
        ("schedule.epochs", 24, 45),
        ("schedule.milestones", [16, 22], [30, 40]),
    ],
    "09-backbone": [
        ("model.backbone.name", "resnet50.tv_in1k", "resnest200e"),
        ("model.backbone.deformable_stages", [], [2, 3, 4]),
        ("model.pixel_mean", [123.675, 116.28, 103.53], [123.68, 116.779, 103.939]),
        ("model.pixel_std", [58.395, 57.12, 57.375], [58.393, 57.12, 57.375]),
    ],
    "11-finetune": [
        ("data.sampler", "random", "repeat-factor"),
        ("schedule.epochs", 45, 12),
        ("schedule.milestones", [30, 40], [8, 11]),
        ("finetune.enabled", False, True),
    ],
    "12-tta": [("test.tta", False, True)],
}
SMALL = {
    "07-augmentation": [
        ("data.long_edges", None, [77, 179]),
        ("data.crop", None, 128),
        ("data.instaboost", 0.0, 0.5),
    ],
    "09-backbone": [
        ("model.backbone.name", "tf_efficientnet_lite0", "tf_efficientnet_lite2"),
    ],
    "11-finetune": [
        ("data.sampler", "random", "repeat-factor"),
        ("data.repeat_threshold", 0.001, 0.02),
        ("schedule.epochs", 2, 1),
        ("finetune.enabled", False, True),
    ],
    "12-tta": [("test.tta", False, True)],
}


@pytest.mark.parametrize(
    ("table", "expected"),
    [("table2", steps(1000, full_size=True)), ("demo-table2", steps(200, full_size=False))],
)
def test_every_row_of_table_2_is_one_step(table: str, expected: dict[str, list[tuple[str, object, object]]]) -> None:
    names = [name.split("/")[1] for name in BUILT_IN if name.startswith((f"{table}/0", f"{table}/1"))]
    assert names == ["01-mask-rcnn", *sorted(expected)]
    assert names == list(REPORT)
    for before, name in pairwise(names):
        assert diff(resolve(f"{table}/{before}"), resolve(f"{table}/{name}")) == expected[name], name


def test_where_the_rows_of_table_2_start() -> None:
    """Mask R-CNN with cross-entropy, trained twice as long; in miniature with narrow heads for what comes."""
    assert diff(resolve("table1/cross-entropy"), resolve("table2/01-mask-rcnn")) == [
        ("schedule.epochs", 12, 24),
        ("schedule.milestones", [8, 11], [16, 22]),
    ]
    changed = {key for key, _, _ in diff(resolve("demo/cross-entropy"), resolve("demo-table2/01-mask-rcnn"))}
    narrow = {"model.tsd.shift_width", "model.mask_iou.channels", "model.mask_iou.width"}
    assert changed == narrow | {"optimizer.lr", "optimizer.clip"}
    for table in ("table2", "demo-table2"):
        model = resolve(f"{table}/01-mask-rcnn").model
        assert [model.mask_iou.weight, model.context.weight] == [0, 0]
        assert [stage.tsd for stage in model.stages] == [False]


# ---------------------------------------------------------------------------------------------------------
# Parameters, by hand


def conv(inputs: int, outputs: int, side: int, bias: bool = True) -> int:
    return inputs * outputs * side**2 + bias * outputs


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def norm(channels: int) -> int:
    return 2 * channels


def bottleneck(inputs: int, width: int, shortcut: bool) -> int:
    """1x1, 3x3, 1x1 of four times the width, each with a norm; a 1x1 shortcut where the size changes."""
    convs = conv(inputs, width, 1, False) + conv(width, width, 3, False) + conv(width, 4 * width, 1, False)
    ends = conv(inputs, 4 * width, 1, False) + norm(4 * width) if shortcut else 0
    return convs + 2 * norm(width) + norm(4 * width) + ends


def resnet_stage(inputs: int, width: int, blocks: int) -> int:
    return bottleneck(inputs, width, True) + (blocks - 1) * bottleneck(4 * width, width, False)


def split_attention_block(inputs: int, width: int, shortcut: bool, deformable: bool) -> int:
    """ResNeSt's bottleneck: the 3x3 in two groups makes two splits, a small network weighs them."""
    hidden = max(width * 2 // 4, 32)
    splits = conv(width, 2 * width, 3, False) // 2 + norm(2 * width)
    weights = conv(width, hidden, 1) + norm(hidden) + conv(hidden, 2 * width, 1)
    ends = conv(inputs, width, 1, False) + norm(width) + conv(width, 4 * width, 1, False) + norm(4 * width)
    around = conv(inputs, 4 * width, 1, False) + norm(4 * width) if shortcut else 0
    return ends + splits + weights + around + (conv(width, 3 * 9, 3) if deformable else 0)


def resnest_stage(inputs: int, width: int, blocks: int, deformable: bool) -> int:
    first = split_attention_block(inputs, width, True, deformable)
    return first + (blocks - 1) * split_attention_block(4 * width, width, False, deformable)


ROI = 256 * 7 * 7  # inputs of a box head
STEM = conv(3, 64, 7, False) + norm(64)
FROZEN = STEM + resnet_stage(64, 64, 3)
RESNEST_STEM = sum(conv(i, o, 3, False) + norm(o) for i, o in ((3, 64), (64, 64), (64, 128)))
RESNEST_FROZEN = RESNEST_STEM + resnest_stage(128, 64, 3, False)
RESNEST200 = RESNEST_FROZEN + sum(
    resnest_stage(i, w, n, True) for i, w, n in ((256, 128, 24), (512, 256, 36), (1024, 512, 3))
)
RESNET50 = FROZEN + resnet_stage(256, 128, 4) + resnet_stage(512, 256, 6) + resnet_stage(1024, 512, 3)
FPN = sum(conv(c, 256, 1) for c in (256, 512, 1024, 2048)) + 4 * conv(256, 256, 3)
RPN = conv(256, 256, 3) + conv(256, 3, 1) + conv(256, 3 * 4, 1)
HIDDEN = linear(ROI, 1024) + linear(1024, 1024)
CLASSIFIER = linear(1024, CLASSES + 1)  # and background
MASK_HEAD = 4 * conv(256, 256, 3) + conv(256, 256, 2) + conv(256, CLASSES, 1)
ROW_1 = RESNET50 + FPN + RPN + HIDDEN + CLASSIFIER + linear(1024, 4 * CLASSES) + MASK_HEAD

AGNOSTIC_HEAD = HIDDEN + CLASSIFIER + linear(1024, 4)
CARAFE = conv(256, 64, 1) + conv(64, 2 * 2 * 5 * 5, 3)
CONTEXT = 4 * (conv(256, 256, 3, False) + norm(256)) + linear(256, CLASSES)
SHIFTS = linear(ROI, 256) + (linear(256, 256) + linear(256, 2 * 7 * 7)) + (linear(256, 256) + linear(256, 2))
TSD_HEAD = SHIFTS + 3 * HIDDEN + 2 * CLASSIFIER + 2 * linear(1024, 4)  # classes, boxes, sibling
MASK_IOU = (
    *(conv(256 + 1, 256, 3), 3 * conv(256, 256, 3)),
    *(linear(256 * 7 * 7, 1024), linear(1024, 1024), linear(1024, CLASSES)),
)

GRID_3X3, GRID_1X1 = conv(256, 256, 3, False) + norm(256), conv(256, 256, 1, False) + norm(256)
GRID = (  # 35 active cells of 9 pathways, 30 of them with a finer level below, 26 with a coarser one above
    *(sum(conv(c, 256, 1) for c in (256, 512, 1024, 2048)), 35 * 2 * GRID_1X1, 5 * conv(256, 256, 3)),
    *(30 * (conv(256, 64, 1) + conv(64, 5 * 5, 3) + GRID_3X3), 26 * (GRID_3X3 + conv(256, 3 * 9, 3))),
)
SEESAW_LOGITS = 1024 + 1  # a row more: foreground and background instead of background
SECOND_BRANCHES = 3 * (HIDDEN + CLASSIFIER + SEESAW_LOGITS)

ADDED = {  # by each row to the one before
    "02-sync-bn": 4 * (norm(256) - 256),  # the mask head's convolutions lose their bias; the backbone has its norms
    "03-carafe": CARAFE - conv(256, 256, 2),
    "04-htc-lite": 3 * AGNOSTIC_HEAD - (HIDDEN + CLASSIFIER + linear(1024, 4 * CLASSES)) + CONTEXT,
    "05-tsd": 3 * (TSD_HEAD - AGNOSTIC_HEAD),
    "06-mask-scoring": sum(MASK_IOU),
    "07-augmentation": 0,
    "08-neck": sum(GRID) - FPN,
    "09-backbone": RESNEST200 - RESNET50,
    "10-seesaw": 3 * 2 * SEESAW_LOGITS,
    "11-finetune": SECOND_BRANCHES,
    "12-tta": 0,
}
PARAMETERS = {
    "01-mask-rcnn": 50_440_322,
    "02-sync-bn": 50_441_346,
    "03-carafe": 50_253_094,
    "04-htc-lite": 78_263_169,
    "05-tsd": 175_458_261,
    "06-mask-scoring": 192_949_640,
    "07-augmentation": 192_949_640,
    "08-neck": 233_766_196,
    "09-backbone": 281_771_641,
    "10-seesaw": 281_777_791,
    "11-finetune": 327_170_206,
    "12-tta": 327_170_206,
}


@pytest.mark.parametrize("row", ROWS)
def test_parameters_are_those_of_the_layers(row: str) -> None:
    with torch.device("meta"), meta_without_values():
        detector = build_detector(resolve(f"table2/{row}"), CLASSES)
    total = sum(p.numel() for p in detector.parameters())
    assert total == PARAMETERS[row]
    assert total == ROW_1 + sum(ADDED[other] for other in ROWS[1 : ROWS.index(row) + 1])
    frozen = FROZEN if row < "09" else RESNEST_FROZEN
    assert total - sum(p.numel() for p in detector.parameters() if p.requires_grad) == frozen
    if row in ROWS[-2:]:
        assert sum(p.numel() for p in Branches(detector).parameters()) == SECOND_BRANCHES


def test_the_ladder_tells_the_parameters() -> None:
    assert {row: cost.parameters for row, cost in costs()[0].items()} == PARAMETERS


# ---------------------------------------------------------------------------------------------------------
# A step and an inference

# Two rows have all layers at their full size, and between them every layer that there is but the second branches, whose
# sizes are counted above; the others have fewer channels. All of them look at less: 32 RoIs an image instead of 512,
# 100 proposals instead of 1000 or 2000, 20 detections instead of 300, two views instead of ten, small images. Without
# weights of ImageNet, timm would have every residual block begin as the identity, in which nothing has a gradient.
FULL_SIZE = ("01-mask-rcnn", "10-seesaw")
FEWER = (
    "test.tta_long_edges=[96]",
    "model.backbone.options={zero_init_last: false}",
    "model.box_head.rois=32",
    "model.box_head.max_positive=8",
    "model.rpn.post_nms_train=100",
    "model.rpn.post_nms_test=100",
    "test.max_detections=20",
)
NARROW = (
    "model.backbone.options={zero_init_last: false, channels: [8, 16, 24, 32]}",
    "model.neck.channels=16",
    "model.box_head.width=16",
    "model.mask_head.channels=8",
    "model.tsd.shift_width=8",
    "model.mask_iou={channels: 8, width: 16}",
)
BOX_HEAD = {"classes", "box"}
TSD = BOX_HEAD | {"sibling_classes", "sibling_box", "pc_classes", "pc_box"}
SEESAW_TSD = (TSD - {"pc_classes"}) | {"objectness", "sibling_objectness"}
ALWAYS = {"rpn_objectness", "rpn_box"}
LOSSES = {
    **dict.fromkeys(ROWS[:3], ALWAYS | BOX_HEAD | {"mask"}),
    **{
        row: ALWAYS | {"context", "stage3.mask"} | {f"stage{t}.{name}" for t in (1, 2, 3) for name in names}
        for row, names in zip(ROWS[3:10], (BOX_HEAD, TSD, TSD, TSD, TSD, TSD, SEESAW_TSD), strict=True)
    },
    **{row: {f"stage{t}.{name}" for t in (1, 2, 3) for name in ("classes", "objectness")} for row in ROWS[10:]},
}
for row in ROWS[5:10]:
    LOSSES[row] |= {"stage3.mask_iou"}


def scene() -> Batch:
    return noise_batch((96, 128), (92, 120), objects=4, num_classes=CLASSES, seed=0, corner=40, sides=(16, 52))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """A row's detector after one training step, forward and backward, and one inference."""

    row: str
    detector: Detector
    batches_seen: dict[str, int]  # by each batch norm, in the training step
    losses: dict[str, Tensor]
    detections: list[RawDetections]


@pytest.fixture(scope="module", params=ROWS)
def stepped(request: pytest.FixtureRequest) -> Stepped:
    row = request.param
    torch.manual_seed(0)
    recipe = override(resolve(f"table2/{row}"), FEWER if row in FULL_SIZE else (*FEWER, *NARROW))
    detector = build_detector(recipe, CLASSES).to(memory_format=torch.channels_last).train()
    if recipe.finetune.enabled:
        frozen, branches = Frozen(detector, bf16=False), Branches(detector).requires_grad_(True)
        losses = branches(join([frozen(image(scene(), i), seed=i) for i in range(2)]))
    else:
        losses = detector(scene())
    torch.stack(list(losses.values())).sum().backward()
    seen = {k: int(v) for k, v in detector.state_dict().items() if k.endswith("num_batches_tracked")}
    return Stepped(
        row=row,
        detector=detector,
        batches_seen=seen,
        losses={name: value.detach() for name, value in losses.items()},
        detections=detections(detector.eval(), recipe),
    )


def image(batch: Batch, number: int) -> Batch:
    return Batch(**{name: getattr(batch, name)[number : number + 1] for name in Batch.__dataclass_fields__})


def detections(detector: Detector, recipe: Recipe) -> list[RawDetections]:
    """Of the scene, or, with test-time augmentation, of its pictures without their padding, at twice their size."""
    batch, views = scene(), views_of(recipe)
    if not views:
        return detector.detect(batch)
    pictures = [pixels[:, :h, :w] for pixels, (h, w) in zip(batch.images, batch.image_sizes.tolist(), strict=True)]
    twice = [picture.repeat_interleave(2, 1).repeat_interleave(2, 2) for picture in pictures]
    arrays = [picture.permute(1, 2, 0).contiguous().numpy() for picture in twice]
    return [detect_views(detector, array, views) for array in arrays]


def test_losses_are_those_of_the_row_and_finite(stepped: Stepped) -> None:
    assert stepped.losses.keys() == LOSSES[stepped.row]
    values = {name: float(value) for name, value in stepped.losses.items()}
    assert all(math.isfinite(value) and value > 0 for value in values.values()), values
    if stepped.row == "01-mask-rcnn" or stepped.row in ROWS[10:]:
        return  # random weights with the batch statistics of none: features are out of scale
    if stepped.row >= "10":  # a class loss counts positives alone; objectness starts between two
        for number, weight in enumerate([1.0, 0.5, 0.25], start=1):
            assert values[f"stage{number}.objectness"] == pytest.approx(math.log(2) * weight, rel=0.3)
        return
    # Before it has learnt anything a classifier is nearly uniform: ln 1204, times the stage's weight.
    prefix, weights = ("", [1.0]) if len(stepped.detector.stages) == 1 else ("stage{}.", [1.0, 0.5, 0.25])
    for number, weight in enumerate(weights, start=1):
        assert values[prefix.format(number) + "classes"] == pytest.approx(math.log(CLASSES + 1) * weight, rel=0.3)


def test_every_parameter_that_learns_has_a_finite_gradient(stepped: Stepped) -> None:
    for name, parameter in stepped.detector.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # From row 4 on anchors must lie inside the image, which those of P4 to P6 cannot here.
        unused = stepped.row in ROWS[3:] and name.startswith(("neck.output_convs.2", "neck.output_convs.3"))
        assert unused or parameter.grad.count_nonzero() > 0, name


def test_batch_statistics_are_learnt_where_the_row_says(stepped: Stepped) -> None:
    learning = {name for name, count in stepped.batches_seen.items() if count > 0}
    norms = {name.rpartition(".")[0] for name in learning}
    resnet, resnest = (sum(n * each + 1 for n in blocks) for blocks, each in (((4, 6, 3), 3), ((24, 36, 3), 4)))
    expected = 0
    if stepped.row in ROWS[1:10]:
        expected += 4  # mask head
        expected += resnest if stepped.row in ROWS[8:] else resnet  # layer2 to layer4
    if stepped.row in ROWS[3:10]:
        expected += 4  # context encoder
    if stepped.row in ROWS[7:10]:
        expected += 35 + 35 + 30 + 26  # grid
    assert len(norms) == expected
    assert not [name for name in norms if (".bn1" in name and "layer" not in name) or "layer1" in name]


def test_detections_of_an_untrained_model_are_sound(stepped: Stepped) -> None:
    assert [found.image_hw for found in stepped.detections] == [(192, 256), (184, 240)]
    for found in stepped.detections:
        height, width = found.image_hw
        assert len(found) == 20
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert (found.scores.diff() <= 0).all()
        assert found.masks.shape == (20, 28, 28)
        assert ((found.masks >= 0) & (found.masks <= 1)).all()
        if stepped.row in ROWS[5:]:
            assert found.mask_scores is not None
            assert ((found.mask_scores >= 0) & (found.mask_scores <= found.scores)).all()
        else:
            assert found.mask_scores is None


# ---------------------------------------------------------------------------------------------------------
# Whole runs in miniature

IMAGES, STEPS, STOPPED = 8, 8, 3
TINY = (
    *SMALL_RECIPE,
    "optimizer={name: adamw, lr: 0.01, weight_decay: 0.01, clip: 10}",
    "schedule={epochs: 2, milestones: [], warmup_steps: 2, warmup_factor: 0.1}",
    "training.evaluate_every=2",
    "training.log_steps=1",
)
SMALL_VIEWS = ("data.long_edges=[40, 90]", "data.crop=64")  # from row 7 on
DEFORMABLE = "model.backbone.deformable_stages=[4]"
NARROW_NECK = "model.neck.pathways=2"
ENTRY = ("10-seesaw", (*SMALL_VIEWS, DEFORMABLE, NARROW_NECK, "training.precision=bf16"))
# What a run has to keep is in the last two: row 6 has the parts of 2 to 5, row 10 those of 7 to 9.
CASES = [
    *(pytest.param(row, (), id=row, marks=pytest.mark.nightly) for row in ("01-mask-rcnn", "04-htc-lite")),
    pytest.param("06-mask-scoring", (), id="06-mask-scoring"),
    pytest.param(*ENTRY, id="10-seesaw-bf16"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = SyntheticSettings(classes=4, train_images=IMAGES, val_images=2, size=64, rarest=3)
    return write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)


Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A function: row and settings -> the folder of its run, from the beginning to the end."""
    made: dict[tuple[str, tuple[str, ...]], Path] = {}

    def make(row: str, settings: tuple[str, ...]) -> Path:
        if (row, settings) not in made:
            made[row, settings] = tmp_path_factory.mktemp("whole") / "run"
            assert_done(tailseg(*training(row, settings, data, made[row, settings])))
        return made[row, settings]

    return make


def training(row: str, settings: tuple[str, ...], data: Path, out: Path) -> list[object]:
    """The command that trains a row in miniature."""
    start = ["train", f"demo-table2/{row}", "--data", data, "--out", out, "--quiet"]
    return [*start, *options((*TINY, *settings))]


def logged(out: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows if "loss" in row]


def detected(out: Path) -> list[dict[str, Any]]:
    """What was found; scores of a model that has hardly learnt are often all 0."""
    found: list[dict[str, Any]] = json.loads((out / "detections.json").read_text())
    assert found
    return found


@pytest.mark.parametrize(("row", "settings"), CASES)
def test_a_run_learns_is_resumed_exactly_and_evaluated(
    row: str, settings: tuple[str, ...], data: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = trained(row, settings), tmp_path / "parts"
    files = {"last", "best", "trainer"}
    assert {f"{name}.safetensors" for name in files} <= {path.name for path in whole.iterdir()}
    losses = [line["loss"] for line in logged(whole)]
    assert [line["step"] for line in logged(whole)] == list(range(1, STEPS + 1))
    assert sum(losses[-4:]) < sum(losses[:4]), losses

    stop_after(STOPPED, monkeypatch)
    assert tailseg(*training(row, settings, data, parts)).returncode == 130
    assert [line["step"] for line in logged(parts)] == list(range(1, STOPPED + 1))
    stop_after(-1, monkeypatch)
    assert_done(tailseg(*training(row, settings, data, parts), "--resume"))
    assert logged(parts) == logged(whole)
    for name in files:
        ours, theirs = (load_file(out / f"{name}.safetensors") for out in (parts, whole))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    state = load_file(whole / "last.safetensors")
    assert any(int(v) == STEPS for k, v in state.items() if k.endswith("batches_tracked")) == (row != ROWS[0])

    assert_done(tailseg("eval", whole / "last.safetensors", "--data", data, "--out", tmp_path / "eval", "--quiet"))
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics.keys() == {"bbox", "segm"}
    assert all(0 <= metrics[kind]["AP"] <= 1 for kind in metrics)
    if "training.precision=bf16" not in settings:  # in which training evaluates, and `tailseg eval` does not
        assert metrics == json.loads((whole / "metrics.json").read_text())
        assert detected(tmp_path / "eval") == detected(whole)


def test_the_entry_is_finetuned_and_tested_on_views(
    data: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 10, 11 and 12 one after the other, row 11 stopped in the middle and resumed."""
    entry, whole, parts = trained(*ENTRY), tmp_path / "whole", tmp_path / "parts"
    start = entry / "last.safetensors"
    finetune = (*SMALL_VIEWS, DEFORMABLE, NARROW_NECK, "finetune.views=2")
    assert_done(tailseg(*training("11-finetune", finetune, data, whole), "--init", start))
    stop_after(3, monkeypatch)
    assert tailseg(*training("11-finetune", finetune, data, parts), "--init", start).returncode == 130
    stop_after(-1, monkeypatch)
    assert_done(tailseg(*training("11-finetune", finetune, data, parts), "--resume"))
    assert logged(parts) == logged(whole)
    before, after, resumed = (load_file(out / "last.safetensors") for out in (entry, whole, parts))
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert {key.split(".")[2] for key in after.keys() - before.keys()} == {"second_branch"}
    assert [key for key in after if not torch.equal(after[key], resumed[key])] == []

    model = whole / "last.safetensors"
    assert_done(tailseg("eval", model, "--data", data, "--out", tmp_path / "eval", "--quiet"))
    assert detected(tmp_path / "eval") == detected(whole)
    views = ("--tta", "--set", "test.tta_long_edges=[48, 80]", "--out", tmp_path / "views")
    assert_done(tailseg("eval", model, "--data", data, "--quiet", *views))
    metrics = json.loads((tmp_path / "views" / "metrics.json").read_text())
    assert all(0 <= metrics[kind]["AP"] <= 1 for kind in ("bbox", "segm"))
    assert detected(tmp_path / "views") != detected(whole)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on runs stop after this step, as if told to by a signal."""
    stopper: Callable[[Run, list[int]], bool] = lambda self, stop: self.step == step  # noqa: E731
    monkeypatch.setattr(Run, "agreed", stopper)
