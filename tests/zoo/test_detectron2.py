"""detectron2's Mask R-CNN, played by torchvision's with its geometry changed, against ours converted from it."""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, deform_conv2d, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from tailseg.errors import UserError
from tailseg.predict import Model, load
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import merge, validate
from tailseg.structures import Batch, RawDetections
from tailseg.zoo import detectron2 as zoo
from tailseg.zoo.conversion import coco_ids, convert
from tailseg.zoo.detectron2 import read_detectron2

PIXELS, SCORES, MASKS, FEATURES = 0.01, 1e-4, 1e-3, 1e-4
CLASSES = 7
SIZE = (256, 384)  # both a multiple of 64, so that all levels have their nominal strides
NARROW, CHANNELS, HIDDEN = (
    8,
    16,
    32,
)  # the backbone's share of ResNet-50's widths; of the neck and masks; of the box head
MEAN_BGR = (103.53, 116.28, 123.675)


class NarrowResNet(ResNet):
    """ResNet-50 or 101 with an eighth of the channels behind its stem."""

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // NARROW, *arguments, **options)


class LevelledPooling(nn.Module):
    """RoIAlign between pixel centres; a box of 224 pixels belongs to P4, and so on by factors of two."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _sizes: Any) -> Tensor:
        (own,) = boxes
        side = ((own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])).sqrt()
        levels = torch.floor(4 + torch.log2(side / 224 + 1e-8)).clamp(2, 5).long()
        pooled = []
        for box, level in zip(own, levels.tolist(), strict=True):
            scale = 1 / 2**level
            pooled.append(roi_align(features[str(level - 2)], [box[None]], self.size, scale, 0, aligned=True))
        return torch.cat(pooled)


@dataclass(frozen=True, kw_only=True)
class Dress:
    """What differs between models of detectron2."""

    stride_in_1x1: bool = True
    red_first: bool = False
    mean: tuple[float, float, float] = MEAN_BGR  # in the order of the colours
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    score_threshold: float = 0.05
    nms: float = 0.5
    detections: int = 100
    proposals: int = 1000
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)


PUBLISHED = Dress()


def model_of(dress: Dress, classes: int = CLASSES) -> MaskRCNN:
    """torchvision's model in detectron2's dress, with weights large enough that detections differ."""
    torch.manual_seed(0)
    body = NarrowResNet(Bottleneck, list(dress.blocks), norm_layer=FrozenBatchNorm2d)
    for layer in (body.layer2, body.layer3, body.layer4):
        if dress.stride_in_1x1:
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    widths = [256 // NARROW * 2**i for i in range(4)]
    backbone = BackboneWithFPN(body, {f"layer{i + 1}": str(i) for i in range(4)}, widths, CHANNELS)
    model = MaskRCNN(
        backbone,
        min_size=SIZE[0],
        max_size=SIZE[1],
        image_mean=list(dress.mean),
        image_std=list(dress.std),
        rpn_post_nms_top_n_test=dress.proposals,
        box_head=TwoMLPHead(CHANNELS * 49, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, classes + 1),
        mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, classes + 1),
        box_score_thresh=dress.score_threshold,
        box_nms_thresh=dress.nms,
        box_detections_per_img=dress.detections,
    )
    model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool = LevelledPooling(7), LevelledPooling(14)
    ratios = torch.tensor([0.5, 1.0, 2.0])
    half = torch.stack([1 / ratios.sqrt(), ratios.sqrt()], dim=1) / 2  # torchvision rounds its own
    model.rpn.anchor_generator.cell_anchors = [size * torch.cat([-half, half], 1) for size in (32, 64, 128, 256, 512)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in body.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.running_var.uniform_(1e-2, 2, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.weight.uniform_(0.3, 0.8, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
        body.bn1.running_var.fill_(2000.0 if max(dress.std) == 1 else 1.0)  # of pixels that have no deviation of 1
        for layer, scale in ((model.rpn.head.cls_logits, 0.3), (model.rpn.head.bbox_pred, 0.1)):
            layer.weight.normal_(0, scale, generator=generator)
        predictor = model.roi_heads.box_predictor
        predictor.cls_score.weight.normal_(0, 0.8, generator=generator)
        predictor.cls_score.bias.normal_(0, 0.5, generator=generator)
        predictor.bbox_pred.weight.normal_(0, 0.2, generator=generator)
        pyramid = model.backbone((picture().flip(0).float() - torch.tensor(dress.mean)[:, None, None])[None])
        for layer in model.backbone.fpn.inner_blocks:  # so that depth does not decide about the size of the features
            layer[0].weight /= pyramid["0"].std()
    return model.eval()


def picture() -> Tensor:
    """(3, H, W) uint8, R, G, B, with structure at several scales and another in each colour."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(1, 3, 9, 14, generator=generator)
    smooth = nn.functional.interpolate(coarse, SIZE, mode="bicubic")[0]
    noisy = smooth + 0.1 * torch.randn(3, *SIZE, generator=generator)
    return (noisy.clamp(0, 1) * 255).to(torch.uint8)


@torch.no_grad()
def theirs(model: MaskRCNN, dress: Dress, image: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Pyramid, and detections with masks of 28 x 28."""
    seen: dict[str, Any] = {}
    model.backbone.register_forward_hook(lambda _m, _i, output: seen.update(pyramid=list(output.values())))
    model.roi_heads.register_forward_hook(lambda _m, _i, output: seen.update(found=dict(output[0][0])))
    model([(image if dress.red_first else image.flip(0)).float()])
    return seen["pyramid"], seen["found"]


def names_of(blocks: Sequence[int]) -> dict[str, str]:
    """torchvision's name of a layer -> detectron2's."""
    names = {"backbone.body.conv1": "backbone.bottom_up.stem.conv1"}
    names["backbone.body.bn1"] = "backbone.bottom_up.stem.conv1.norm"
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            own, other = f"backbone.body.layer{stage}.{block}", f"backbone.bottom_up.res{stage + 1}.{block}"
            for i in (1, 2, 3):
                names |= {f"{own}.conv{i}": f"{other}.conv{i}", f"{own}.bn{i}": f"{other}.conv{i}.norm"}
            names[f"{own}.conv2.offset"] = f"{other}.conv2_offset"
        own, other = f"backbone.body.layer{stage}.0", f"backbone.bottom_up.res{stage + 1}.0"
        names |= {f"{own}.downsample.0": f"{other}.shortcut", f"{own}.downsample.1": f"{other}.shortcut.norm"}
    for level in range(4):
        names[f"backbone.fpn.inner_blocks.{level}.0"] = f"backbone.fpn_lateral{level + 2}"
        names[f"backbone.fpn.layer_blocks.{level}.0"] = f"backbone.fpn_output{level + 2}"
        for kind, part in (("inner_blocks", "lateral"), ("layer_blocks", "output")):
            names[f"backbone.fpn.{kind}.{level}.1"] = f"backbone.fpn_{part}{level + 2}.norm"
        for kind, part in (("mask_head", "mask_fcn"), ("box_head", "conv")):
            names[f"roi_heads.{kind}.{level}.0"] = f"roi_heads.{kind}.{part}{level + 1}"
            names[f"roi_heads.{kind}.{level}.1"] = f"roi_heads.{kind}.{part}{level + 1}.norm"
    return names | {
        "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
        "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_head.fc6": "roi_heads.box_head.fc1",
        "roi_heads.box_head.5": "roi_heads.box_head.fc1",
        "roi_heads.box_head.fc7": "roi_heads.box_head.fc2",
        "roi_heads.box_predictor.cls_score": "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred": "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_predictor.conv5_mask": "roi_heads.mask_head.deconv",
        "roi_heads.mask_predictor.mask_fcn_logits": "roi_heads.mask_head.predictor",
    }


def state_of(model: MaskRCNN, dress: Dress = PUBLISHED) -> dict[str, Tensor]:
    """detectron2's state dict: background is the last class, and has neither box nor mask."""
    names = names_of(dress.blocks)
    depth = len(model.rpn.head.conv)
    for i in range(depth):
        names[f"rpn.head.conv.{i}.0"] = "proposal_generator.rpn_head.conv" + (f".conv{i}" if depth > 1 else "")
    state = {}
    for key, value in model.state_dict().items():
        layer, part = key.rsplit(".", 1)
        other = f"{names[layer]}.{part}"
        if ".cls_score." in other:
            value = torch.cat([value[1:], value[:1]])
        elif ".bbox_pred." in other:
            value = value[4:]
        elif ".mask_head.predictor." in other:
            value = value[1:]
        state[other] = value
    return state


def save_pth(state: dict[str, Tensor], folder: Path) -> Path:
    """As detectron2's trainer does."""
    torch.save({"model": state, "iteration": 90_000, "optimizer": {"state": {}}}, folder / "model_final.pth")
    return folder / "model_final.pth"


def save_pkl(state: dict[str, Tensor], folder: Path) -> Path:
    """As its model zoo does."""
    arrays = {key: value.numpy() for key, value in state.items()}
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (folder / "model_final_a54504.pkl").write_bytes(pickle.dumps(content, 2))
    return folder / "model_final_a54504.pkl"


def class_names(folder: Path, classes: int = CLASSES) -> Path:
    rows = [{"id": i, "name": f"thing {i}"} for i in range(1, classes + 1)]
    (folder / "classes.json").write_text(json.dumps({"categories": rows}))
    return folder / "classes.json"


def converted(checkpoint: Path, *settings: str) -> Model:
    folder = checkpoint.parent
    convert(read_detectron2(checkpoint), folder / "o.safetensors", categories=class_names(folder), settings=settings)
    return load(folder / "o.safetensors", device="cpu")


def batch_of(image: Tensor) -> Batch:
    sizes = torch.tensor([image.shape[1:]])
    return Batch(
        images=image[None],
        image_sizes=sizes,
        original_sizes=sizes,
        image_ids=torch.zeros(1, dtype=torch.int64),
        boxes=torch.zeros(1, 1, 4),
        labels=torch.zeros(1, 1, dtype=torch.int64),
        valid=torch.zeros(1, 1, dtype=torch.bool),
        masks=torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        mask_frames=torch.zeros(1, 1, 4),
        absent=torch.zeros(1, 0, dtype=torch.bool),
        ignored=torch.zeros(1, 0, 0, dtype=torch.uint8),
    )


def assert_same(ours: Model, model: MaskRCNN, dress: Dress, at_least: int = 20) -> RawDetections:
    """Pyramid and detections."""
    image = picture()
    pyramid, found = theirs(model, dress, image)
    batch = batch_of(image)
    with torch.no_grad():
        for own, their in zip(ours.detector.pyramid(batch.images, batch.image_sizes), pyramid, strict=True):
            assert (own - their).abs().max() <= FEATURES * their.abs().max()
    (detections,) = ours.detector.detect(batch)
    assert len(found["scores"].unique()) == len(detections) >= at_least
    assert (detections.scores - found["scores"]).abs().max() <= SCORES
    # Those whose scores agree to six digits may change places, so each looks for its partner.
    same_label = detections.labels[:, None] == found["labels"] - 1
    distance = (detections.boxes[:, None] - found["boxes"]).abs().amax(2).where(same_label, torch.inf)
    partner = distance.argmin(1)
    assert len(partner.unique()) == len(partner)
    assert distance.gather(1, partner[:, None]).max() <= PIXELS
    assert (detections.scores - found["scores"][partner]).abs().max() <= SCORES
    assert (detections.masks - found["masks"][partner, 0]).abs().max() <= MASKS
    return detections


class SteeredConv(nn.Module):
    """A 3x3 deformable convolution by torchvision's operator, steered as by detectron2's ``conv2_offset``."""

    def __init__(self, conv: nn.Conv2d, rows: int) -> None:
        super().__init__()
        self.weight, self.stride, self.rows = conv.weight, conv.stride, rows
        self.offset = nn.Conv2d(conv.in_channels, rows, 3, conv.stride, padding=1)
        nn.init.normal_(self.offset.weight, std=0.1)
        nn.init.normal_(self.offset.bias, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows, down, logits = self.offset(x), None, None
        if self.rows == 27:
            down, right, logits = rows.chunk(3, dim=1)
            rows = torch.cat([down, right], dim=1)
        mask = None if logits is None else logits.sigmoid()
        return deform_conv2d(x, rows, self.weight, stride=self.stride, padding=1, mask=mask)


# ---------------------------------------------------------------------------------------------------------
# The same detections


@pytest.fixture(scope="module")
def published() -> MaskRCNN:
    return model_of(PUBLISHED)


@pytest.mark.parametrize("save", [save_pth, save_pkl])
def test_same_features_and_detections(published: MaskRCNN, tmp_path: Path, save: Callable[..., Path]) -> None:
    ours = converted(save(state_of(published), tmp_path))
    recipe = ours.recipe
    assert recipe.model.backbone.stride_in_1x1
    assert not recipe.model.backbone.pretrained
    assert (recipe.model.pixel_mean, recipe.model.pixel_std) == (MEAN_BGR[::-1], (1.0, 1.0, 1.0))
    assert (recipe.test.score_threshold, recipe.test.max_detections) == (0.05, 100)
    detections = assert_same(ours, published, PUBLISHED)
    assert len(detections.labels.unique()) >= 3
    sides = (detections.boxes[:, 2:] - detections.boxes[:, :2]).prod(1).sqrt()
    assert sides.min() < 112 <= sides.max()  # of more than one level
    assert detections.masks.std() > 0.02


@pytest.mark.parametrize("rows", [18, 27])
def test_deformable_convolutions(tmp_path: Path, rows: int) -> None:
    """In res4 and res5, of the first generation (the model zoo's) and of the second."""
    model = model_of(PUBLISHED)
    for layer in (model.backbone.body.layer3, model.backbone.body.layer4):
        for block in layer:
            block.conv2 = SteeredConv(block.conv2, rows)
    state = state_of(model)
    assert state["backbone.bottom_up.res5.2.conv2_offset.bias"].shape == (rows,)
    ours = converted(save_pth(state, tmp_path))
    assert ours.recipe.model.backbone.deformable_stages == (3, 4)
    assert_same(ours, model, PUBLISHED, at_least=10)


def test_an_rpn_of_two_convolutions(tmp_path: Path) -> None:
    """As in the baselines of 100 to 400 epochs (``MODEL.RPN.CONV_DIMS``)."""
    model = model_of(PUBLISHED)
    single, model.rpn.head = model.rpn.head, RPNHead(CHANNELS, 3, conv_depth=2)
    for part in ("cls_logits", "bbox_pred"):
        getattr(model.rpn.head, part).load_state_dict(getattr(single, part).state_dict())
    for layer in model.rpn.head.conv:
        nn.init.normal_(layer[0].weight, std=0.1)
    model.eval()
    ours = converted(save_pth(state_of(model), tmp_path))
    assert ours.recipe.model.rpn.convs == 2
    assert_same(ours, model, PUBLISHED)


@pytest.mark.parametrize("group", [False, True], ids=["batch norm", "group norm"])
def test_norm_and_convolutions_in_the_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: bool) -> None:
    """The baselines of 100 to 400 epochs: norm in neck and heads, four convolutions and one layer in the box head."""
    kind: Any = (lambda channels: nn.GroupNorm(32, channels)) if group else nn.BatchNorm2d
    if group:
        monkeypatch.setitem(globals(), "CHANNELS", 32)
    model = model_of(PUBLISHED)
    widths = [256 // NARROW * 2**i for i in range(4)]
    model.backbone.fpn = FeaturePyramidNetwork(widths, CHANNELS, LastLevelMaxPool(), norm_layer=kind)
    heads = model.roi_heads
    heads.box_head = FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS] * 4, [HIDDEN], norm_layer=kind)
    heads.mask_head = MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1, norm_layer=kind)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for part in (model.backbone.fpn, heads):
            for norm in part.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.running_var.uniform_(0.2, 2, generator=generator)
                    norm.running_mean.normal_(0, 0.1, generator=generator)
                    norm.bias.normal_(0, 0.1, generator=generator)
        for layer in model.backbone.fpn.inner_blocks:
            layer[0].weight /= 10
    model.eval()
    ours = converted(save_pth(state_of(model), tmp_path))
    sections, norm = ours.recipe.model, "group" if group else True
    assert (sections.neck.norm, sections.box_head.norm, sections.mask_head.norm) == (norm, norm, norm)
    assert sections.box_head.convs == 4
    assert_same(ours, model, PUBLISHED)


def cascade_of(model: MaskRCNN) -> dict[str, Tensor]:
    """Its state with three box heads, each with one box a RoI, instead of its own."""
    generator = torch.Generator().manual_seed(5)
    state = {key: value for key, value in state_of(model).items() if ".box_head." not in key}
    state = {key: value for key, value in state.items() if ".box_predictor." not in key}
    for stage in range(3):
        for layer, outward, inward, scale in (
            (f"box_head.{stage}.fc1", HIDDEN, CHANNELS * 49, 0.03),
            (f"box_head.{stage}.fc2", HIDDEN, HIDDEN, 0.3),
            (f"box_predictor.{stage}.cls_score", CLASSES + 1, HIDDEN, 0.5),
            (f"box_predictor.{stage}.bbox_pred", 4, HIDDEN, 0.1),
        ):
            state[f"roi_heads.{layer}.weight"] = torch.randn(outward, inward, generator=generator) * scale
            state[f"roi_heads.{layer}.bias"] = torch.randn(outward, generator=generator) * 0.1
    return state


@pytest.mark.parametrize("said", [False, True], ids=["model zoo", "configuration"])
def test_cascade(published: MaskRCNN, tmp_path: Path, said: bool) -> None:
    """Softmax of each stage, then their mean; masks of one head within the last boxes. Against a plain statement."""
    state = cascade_of(published)
    path = save_pth(state, tmp_path)
    weights = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
    if said:
        weights = (*weights[:2], (40.0, 40.0, 20.0, 20.0))
        rows, key = [list(row) for row in weights], "MODEL.ROI_BOX_CASCADE_HEAD"
        save_config(tmp_path, **{f"{key}.BBOX_REG_WEIGHTS": rows, f"{key}.IOUS": [0.5, 0.6, 0.65]})
    ours = converted(path)
    assert [stage.iou for stage in ours.recipe.model.stages] == [0.5, 0.6, 0.65 if said else 0.7]
    assert [stage.mask_weight > 0 for stage in ours.recipe.model.stages] == [False, False, True]
    rois = torch.tensor([[5, 7, 90, 130], [60, 20, 300, 120], [200, 100, 230, 140], [0, 0, 384, 256]]).float()
    labels = torch.tensor([0, 6, 2, 1])
    with torch.no_grad():
        features = ours.detector.extract_features(batch_of(picture()))
        levels = {str(i): maps for i, maps in enumerate(features.pyramid)}
        boxes, probabilities = rois, []
        for stage, weight in enumerate(weights):
            hidden = LevelledPooling(7)(levels, [boxes], None).flatten(1)
            layers = ("box_head.{}.fc1", "box_head.{}.fc2", "box_predictor.{}.cls_score", "box_predictor.{}.bbox_pred")
            fc1, fc2, scores, deltas = (
                [state[f"roi_heads.{layer.format(stage)}.{part}"] for part in ("weight", "bias")] for layer in layers
            )
            hidden = nn.functional.linear(nn.functional.linear(hidden, *fc1).relu(), *fc2).relu()
            probabilities.append(nn.functional.linear(hidden, *scores).softmax(1))
            moves = nn.functional.linear(hidden, *deltas) / torch.tensor(weight)
            size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
            centre, half = centre + moves[:, :2] * size, moves[:, 2:].exp() * size / 2
            boxes = torch.cat([centre - half, centre + half], 1).clamp(min=0)
            boxes = torch.minimum(boxes, torch.tensor([SIZE[1], SIZE[0]] * 2))
        heads = published.roi_heads
        seen = heads.mask_head(LevelledPooling(14)(levels, [boxes], None))
        masks = heads.mask_predictor(seen)[torch.arange(4), labels + 1].sigmoid()
        own = torch.cat([torch.zeros(4, 1), rois], 1)
        found, found_scores = ours.detector.predict_boxes(features, own, torch.tensor([SIZE]))
        found_masks, _ = ours.detector.predict_masks(features, torch.cat([own[:, :1], found[:, 0]], 1), labels)
    assert (boxes - rois).abs().max() > 5
    assert (found[:, 0] - boxes).abs().max() <= PIXELS
    assert (found_scores - torch.stack(probabilities).mean(0)[:, :-1]).abs().max() <= SCORES
    logits = torch.stack([p.log() for p in probabilities]).mean(0).softmax(1)
    assert (found_scores - logits[:, :-1]).abs().max() > 100 * SCORES  # which a mean of logits would show
    assert (found_masks - masks).abs().max() <= MASKS


def test_a_cascade_of_other_stages_than_configured(published: MaskRCNN, tmp_path: Path) -> None:
    path = save_pth(cascade_of(published), tmp_path)
    save_config(tmp_path, **{"MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [[10.0, 10.0, 5.0, 5.0]] * 2})
    with pytest.raises(UserError, match=r"config\.yaml: MODEL\.ROI_BOX_CASCADE_HEAD is for 2 stages, the checkpoint"):
        converted(path)


@pytest.mark.parametrize("scale", [None, 15.0])
def test_a_classifier_of_cosines(published: MaskRCNN, tmp_path: Path, scale: float | None) -> None:
    """TFA's: a row and a feature are compared by direction, times 20 or a scale that was learnt."""
    state = state_of(published)
    del state["roi_heads.box_predictor.cls_score.bias"]
    state |= {} if scale is None else {"roi_heads.box_predictor.scale": torch.tensor([scale])}
    ours = converted(save_pth(state, tmp_path))
    weight, hidden = state["roi_heads.box_predictor.cls_score.weight"], torch.randn(9, HIDDEN)
    expected = (scale or 20) * nn.functional.normalize(hidden) @ nn.functional.normalize(weight).t()
    with torch.no_grad():
        assert (ours.detector.stages[0].box_head.classifier(hidden) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("federated", [False, True])
def test_sigmoids(published: MaskRCNN, tmp_path: Path, federated: bool) -> None:
    """`USE_SIGMOID_CE`: the last row, of background, plays no part."""
    path = save_pth(state_of(published), tmp_path)
    head = {"USE_SIGMOID_CE": True, "USE_FED_LOSS": federated, "FED_LOSS_NUM_CLASSES": 40}
    save_config(tmp_path, **{f"MODEL.ROI_BOX_HEAD.{key}": value for key, value in head.items()})
    ours = converted(path)
    assert ours.recipe.classifier.loss == "federated"
    assert ours.recipe.classifier.sampled == (40 if federated else 1 << 20)
    hidden = torch.randn(9, HIDDEN)
    weight, bias = (state_of(published)[f"roi_heads.box_predictor.cls_score.{part}"] for part in ("weight", "bias"))
    box_head = ours.detector.stages[0].box_head
    with torch.no_grad():
        scores = box_head.classification.scores(box_head.classifier(hidden))
    assert (scores[:, :-1] - (hidden @ weight.t() + bias)[:, :-1].sigmoid()).abs().max() < 1e-5


def test_the_comparison_would_see_each_convention(published: MaskRCNN, tmp_path: Path) -> None:
    """The order of the colours, the strides and the sampling all show."""
    path = save_pth(state_of(published), tmp_path)
    _, found = theirs(published, PUBLISHED, picture())
    for i, setting in enumerate(
        (
            "model.backbone.stride_in_1x1=false",
            "model.roi_pooling.aligned=false",
            "model.rpn.rounded_anchors=true",
            "model.pixel_mean=[103.53, 116.28, 123.675]",
        )
    ):
        out = tmp_path / f"{i}.safetensors"
        convert(read_detectron2(path), out, categories=class_names(tmp_path), settings=[setting])
        (detections,) = load(out, device="cpu").detector.detect(batch_of(picture()))
        n = min(len(detections), len(found["boxes"]))
        assert (detections.boxes[:n] - found["boxes"][:n]).abs().max() > 10 * PIXELS, setting


def test_resnet_101(tmp_path: Path) -> None:
    dress = Dress(blocks=(3, 4, 23, 3))
    model = model_of(dress)
    ours = converted(save_pkl(state_of(model, dress), tmp_path))
    assert ours.recipe.model.backbone.name == "resnet101"
    assert_same(ours, model, dress, at_least=5)


# ---------------------------------------------------------------------------------------------------------
# config.yaml beside the checkpoint


def configured(**changes: Any) -> dict[str, Any]:
    """detectron2's configuration of Mask R-CNN R50-FPN, as it is dumped beside a checkpoint (in part)."""
    values: dict[str, Any] = {
        "VERSION": 2,
        "INPUT.FORMAT": "BGR",
        "INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],
        "INPUT.MIN_SIZE_TEST": 800,
        "INPUT.MAX_SIZE_TEST": 1333,
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.MASK_ON": True,
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.RPN.NMS_THRESH": 0.7,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.SMOOTH_L1_BETA": 0.0,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.0,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
        "TEST.DETECTIONS_PER_IMAGE": 100,
        **changes,
    }
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        target = nested
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    return nested


def save_config(folder: Path, **changes: Any) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(configured(**changes)))


def test_the_published_configuration_says_what_is_assumed(
    published: MaskRCNN, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_pth(state_of(published), tmp_path)
    assumed = converted(path).recipe
    assert caplog.text.count("has no config.yaml beside it") == 1
    caplog.clear()
    (tmp_path / "o.safetensors").unlink()
    save_config(tmp_path)
    assert converted(path).recipe == assumed
    assert not caplog.text


def test_red_first_and_other_settings(tmp_path: Path) -> None:
    dress = Dress(
        stride_in_1x1=False,
        red_first=True,
        mean=(120.0, 110.0, 100.0),
        std=(60.0, 50.0, 40.0),
        score_threshold=0.1,
        nms=0.4,
        detections=15,
        proposals=300,
    )
    model = model_of(dress)
    path = save_pth(state_of(model), tmp_path)
    save_config(
        tmp_path,
        **{
            "INPUT.FORMAT": "RGB",
            "MODEL.PIXEL_MEAN": [120.0, 110.0, 100.0],
            "MODEL.PIXEL_STD": [60.0, 50.0, 40.0],
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.1,
            "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.4,
            "MODEL.RPN.POST_NMS_TOPK_TEST": 300,
            "TEST.DETECTIONS_PER_IMAGE": 15,
        },
    )
    ours = converted(path)
    assert torch.equal(
        ours.detector.backbone.net["conv1"].weight, state_of(model)["backbone.bottom_up.stem.conv1.weight"]
    )
    assert_same(ours, model, dress, at_least=15)


def test_blue_first_with_other_pixels(tmp_path: Path) -> None:
    dress = Dress(stride_in_1x1=False, mean=(100.0, 110.0, 120.0), std=(40.0, 50.0, 60.0))
    model = model_of(dress)
    path = save_pth(state_of(model), tmp_path)
    save_config(
        tmp_path,
        **{
            "MODEL.PIXEL_MEAN": [100.0, 110.0, 120.0],
            "MODEL.PIXEL_STD": [40.0, 50.0, 60.0],
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
        },
    )
    ours = converted(path)
    assert ours.recipe.model.pixel_mean == (120.0, 110.0, 100.0)
    assert_same(ours, model, dress)


def test_every_key_has_its_place(published: MaskRCNN, tmp_path: Path) -> None:
    path = save_pth(state_of(published), tmp_path)
    save_config(
        tmp_path,
        **{
            "INPUT.MIN_SIZE_TRAIN": [500, 600],
            "INPUT.MIN_SIZE_TEST": 700,
            "INPUT.MAX_SIZE_TEST": 900,
            "MODEL.RPN.NMS_THRESH": 0.6,
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 1900,
            "MODEL.RPN.PRE_NMS_TOPK_TEST": 800,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1100,
            "MODEL.RPN.POST_NMS_TOPK_TEST": 700,
            "MODEL.RPN.SMOOTH_L1_BETA": 0.25,
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
            "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
            "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.5,
            "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIAlign",
            "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2,
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 256,
        },
    )
    recipe = converted(path, "test.nms_iou=0.3").recipe
    assert recipe.data.model_dump(include={"short_edges", "test_short_edge", "long_edge"}) == {
        "short_edges": (500, 600), "test_short_edge": 700, "long_edge": 900,
    }  # fmt: skip
    rpn = recipe.model.rpn
    assert (rpn.nms_iou, rpn.pre_nms_train, rpn.pre_nms_test) == (0.6, 1900, 800)
    assert (rpn.post_nms_train, rpn.post_nms_test, rpn.box_beta) == (1100, 700, 0.25)
    assert recipe.model.roi_pooling.model_dump() == {"sampling_ratio": 2, "aligned": False}
    assert (recipe.model.box_head.box_beta, recipe.model.box_head.rois) == (0.5, 256)
    assert not recipe.model.box_head.low_quality
    assert recipe.test.nms_iou == 0.3  # a setting goes over it


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[64], [128], [256], [512], [1024]]),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.33, 1.0, 3.0]]),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", [2.0, 2.0, 2.0, 2.0]),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", [20.0, 20.0, 10.0, 10.0]),
        ("MODEL.FPN.FUSE_TYPE", "avg"),
        ("MODEL.RESNETS.RES5_DILATION", 2),
        ("MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6"]),
        ("MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]),
        ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 16),
        ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"),
        ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 28),
        ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign"),
        ("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 2),
        ("INPUT.FORMAT", "YUV-BT.601"),
    ],
)
def test_what_would_give_other_detections_is_not_passed_over(
    published: MaskRCNN, tmp_path: Path, key: str, value: Any
) -> None:
    """It becomes a value of the recipe, or is refused by name."""
    path = save_pth(state_of(published), tmp_path)
    save_config(tmp_path)
    usual = read_detectron2(path).values
    save_config(tmp_path, **{key: value})
    try:
        assert read_detectron2(path).values != usual
    except UserError as error:
        message = str(error)
    else:
        message = f"{path}: {key}"
    assert message.startswith(str(tmp_path))
    assert key in message


@pytest.mark.parametrize("content", ["MODEL: [", "{", "\tx: 1", "!!python/object/apply:os.getcwd []"])
def test_a_broken_configuration(published: MaskRCNN, tmp_path: Path, content: str | bytes) -> None:
    path = save_pth(state_of(published), tmp_path)
    (tmp_path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"not valid YAML.*; fix or remove it$") as caught:
        read_detectron2(path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.yaml'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1, 2]", "text", "extends: demo/seesaw", "MODEL: 3"])
def test_a_config_yaml_of_something_else(published: MaskRCNN, tmp_path: Path, content: str) -> None:
    path = save_pth(state_of(published), tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    foreign = read_detectron2(path)
    assert len(foreign.remarks) == 1
    assert foreign.values["model"]["backbone"] == {"stride_in_1x1": True}


@pytest.mark.parametrize(
    "key",
    [
        "INPUT.FORMAT",
        "INPUT.MIN_SIZE_TRAIN",
        "MODEL.PIXEL_MEAN",
        "MODEL.PIXEL_STD",
        "MODEL.RESNETS.STRIDE_IN_1X1",
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "INPUT",
        "TEST",
        "MODEL.RPN",
    ],
)
def test_odd_values_give_a_recipe_or_one_sentence(
    published: MaskRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    path = save_pth(state_of(published), tmp_path)
    content = zoo.read_checkpoint(path)  # only the configuration beside it changes
    monkeypatch.setattr(zoo, "read_checkpoint", {path: content}.__getitem__)
    faults = []
    for odd in (None, "text", -1, 2.5, True, [], [None], [1, 2], {}, {"x": 1}, float("nan")):
        values = configured()
        *parents, last = key.split(".")
        target: Any = values
        for part in parents:
            target = target[part]
        target[last] = odd
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        try:
            values = merge(Recipe(name="").model_dump(mode="json"), read_detectron2(path).values)
            validate(values, "test")
        except UserError as error:
            if "\n" in str(error):
                faults.append(f"{odd!r}: several lines")
        except Exception as error:
            faults.append(f"{key} = {odd!r}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


# ---------------------------------------------------------------------------------------------------------
# What tensors and numbers of classes say


def test_old_checkpoints_carry_their_pixels_and_anchors(published: MaskRCNN, tmp_path: Path) -> None:
    state = state_of(published) | {
        "pixel_mean": torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
        "pixel_std": torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1),
        **{f"proposal_generator.anchor_generator.cell_anchors.{i}": torch.zeros(3, 4) for i in range(5)},
    }
    recipe = converted(save_pth(state, tmp_path)).recipe
    assert (recipe.model.pixel_mean, recipe.model.pixel_std) == ((3.0, 2.0, 1.0), (6.0, 5.0, 4.0))


def resized(state: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Heads for another number of classes."""
    sizes = {"cls_score": classes + 1, "bbox_pred": 4 * classes, "mask_head.predictor": classes}
    changed = dict(state)
    for key, value in state.items():
        for name, rows in sizes.items():
            if f"{name}." in key:
                changed[key] = torch.zeros(rows, *value.shape[1:])
    return changed


@pytest.mark.parametrize(
    ("classes", "expected"), [(1203, (1e-4, 300)), (1230, (1e-4, 300)), (80, (0.05, 100)), (1204, (0.05, 100))]
)
def test_thresholds_of_the_model_zoo(
    published: MaskRCNN, tmp_path: Path, classes: int, expected: tuple[float, int]
) -> None:
    path = save_pth(resized(state_of(published), classes), tmp_path)
    out = tmp_path / "o.safetensors"
    recipe, labels = convert(read_detectron2(path), out, categories=class_names(tmp_path, classes))
    assert (recipe.test.score_threshold, recipe.test.max_detections) == expected
    assert len(labels) == classes
    assert recipe.classifier.loss == "cross-entropy"


def test_coco_s_names_and_ids(published: MaskRCNN, tmp_path: Path) -> None:
    path = save_pth(resized(state_of(published), 80), tmp_path)
    _, labels = convert(read_detectron2(path), tmp_path / "o.safetensors")
    assert [(c.id, c.name) for c in labels[:3]] == [(1, "person"), (2, "bicycle"), (3, "car")]
    assert [(c.id, c.name) for c in labels[10:12]] == [(11, "fire hydrant"), (13, "stop sign")]
    assert (labels[79].id, labels[79].name) == (90, "toothbrush")
    assert {c.name for c in labels} == set(coco_ids())


def test_other_numbers_of_classes_need_names(published: MaskRCNN, tmp_path: Path) -> None:
    for classes in (CLASSES, 1203):
        path = save_pth(resized(state_of(published), classes), tmp_path)
        with pytest.raises(UserError, match=r"model_final\.pth: does not name its classes.*--categories"):
            convert(read_detectron2(path), tmp_path / "o.safetensors")


def test_resnext_of_the_model_zoo(published: MaskRCNN, tmp_path: Path) -> None:
    """Its weights come from elsewhere: strides in the 3x3 convolutions, deviations that are not 1."""
    state = state_of(published)
    for key, value in state.items():
        if ".conv2.weight" in key and "res" in key:
            state[key] = value[:, : value.shape[1] // 4]
    model = read_detectron2(save_pth(state, tmp_path)).values["model"]
    assert model["backbone"] == {"stride_in_1x1": False}
    assert model["pixel_std"] == [58.395, 57.12, 57.375]
    assert model["pixel_mean"] == [123.675, 116.28, 103.53]


def test_arrays_of_half_precision(published: MaskRCNN, tmp_path: Path) -> None:
    arrays = {key: value.numpy().astype(np.float16) for key, value in state_of(published).items()}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": arrays}, 2))
    ours = converted(tmp_path / "m.pkl")
    expected = torch.from_numpy(arrays["roi_heads.box_head.fc2.weight"]).float()
    assert torch.equal(ours.detector.stages[0].box_head.fc2.weight, expected)


# ---------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("theirs", "shape", "part"),
    [
        ("roi_heads.box_head.1.fc1.weight", (4, 4), "a cascade of another number of stages than 3"),
        ("proposal_generator.centernet_head.bbox_pred.weight", (4, 4, 3, 3), "CenterNet2's proposals"),
        ("roi_heads.box_predictor.cls_score.zs_weight", (4, 4), "Detic's and CenterNet2's classifier"),
        ("sem_seg_head.predictor.weight", (4, 4), "a semantic branch (Panoptic FPN)"),
        ("roi_heads.keypoint_head.conv_fcn1.weight", (4, 4), "a keypoint head"),
        ("backbone.bottom_up.res4.0.se.weight", (18, 4, 3, 3), "another backbone than ResNet and ResNeXt"),
        ("backbone.fpn_lateral6.weight", (4, 4, 1, 1), "another neck than FPN"),
    ],
)
def test_left_over_tensors_are_named(
    published: MaskRCNN, tmp_path: Path, theirs: str, shape: tuple[int, ...], part: str
) -> None:
    path = save_pth(state_of(published) | {theirs: torch.zeros(shape)}, tmp_path)
    with pytest.raises(UserError) as caught:
        convert(read_detectron2(path), tmp_path / "o.safetensors", categories=class_names(tmp_path))
    assert str(caught.value).startswith(f"{path}: tensors are left over: '{theirs}' of {part};")


def test_missing_tensors_are_named(published: MaskRCNN, tmp_path: Path) -> None:
    state = state_of(published)
    del state["proposal_generator.rpn_head.anchor_deltas.bias"]
    path = save_pth(state, tmp_path)
    with pytest.raises(UserError, match=r"tensors are missing: 'rpn\.deltas\.bias';"):
        convert(read_detectron2(path), tmp_path / "o.safetensors", categories=class_names(tmp_path))


def test_another_architecture(published: MaskRCNN, tmp_path: Path) -> None:
    for part, named in (("mask_head", "no mask head was found"), ("box_head", "no box head was found")):
        state = {key: value for key, value in state_of(published).items() if f"roi_heads.{part}" not in key}
        path = save_pth(state, tmp_path)
        with pytest.raises(UserError, match=rf"model_final\.pth: {named}"):
            convert(read_detectron2(path), tmp_path / "o.safetensors", categories=class_names(tmp_path))
