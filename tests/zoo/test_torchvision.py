"""torchvision's own Mask R-CNN, with random weights, against ours converted from it, in one process."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    MaskRCNN,
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from tailseg.errors import UserError
from tailseg.predict import Model, load
from tailseg.structures import Batch, RawDetections
from tailseg.zoo import conversion
from tailseg.zoo import torchvision as zoo
from tailseg.zoo.conversion import convert
from tailseg.zoo.torchvision import NAME, PUBLISHED, read_torchvision

PIXELS, SCORES, MASKS, FEATURES = 0.01, 1e-4, 1e-3, 1e-4
CLASSES = 7  # background included
CHANNELS, HIDDEN = 16, 64  # of the narrow model's neck and masks; of its box head
SIZE = (203, 330)  # neither side a multiple of 32, and P6 has another stride than 64


class NarrowResNet(ResNet):
    """ResNet-50 with an eighth of the channels behind its stem."""

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *arguments, **options)


def narrow(norm: Callable[..., nn.Module]) -> MaskRCNN:
    """Every layer of torchvision's model, with fewer channels."""
    body = NarrowResNet(Bottleneck, [3, 4, 6, 3], norm_layer=norm)
    backbone = BackboneWithFPN(body, {f"layer{i + 1}": str(i) for i in range(4)}, [32, 64, 128, 256], CHANNELS)
    return MaskRCNN(
        backbone,
        min_size=SIZE[0],
        max_size=SIZE[1],
        box_head=TwoMLPHead(CHANNELS * 49, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, CLASSES),
        mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, CLASSES),
    )


def full_size(classes: int) -> MaskRCNN:
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    return MaskRCNN(backbone, num_classes=classes, min_size=SIZE[0], max_size=SIZE[1])


def with_weights(make: Callable[..., MaskRCNN], *arguments: Any, eps: float = 1e-5) -> MaskRCNN:
    """Random weights and statistics, large enough that detections differ from each other."""
    torch.manual_seed(0)
    model = make(*arguments)
    wider = 4 if make is narrow else 1  # each output sums a sixteenth of the terms
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.backbone.body.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                module.eps = eps
                module.running_var.uniform_(1e-4, 2, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.weight.uniform_(0.2, 0.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
        for layer, scale in ((model.rpn.head.cls_logits, 3), (model.rpn.head.bbox_pred, 1)):
            layer.weight.normal_(0, 0.05 * scale * wider, generator=generator)
        predictor = model.roi_heads.box_predictor
        predictor.cls_score.weight.normal_(0, 0.2 * wider**2, generator=generator)
        predictor.cls_score.bias.normal_(0, 0.5, generator=generator)
        predictor.bbox_pred.weight.normal_(0, 0.05 * wider, generator=generator)
        if make is narrow:  # whose RoIs resemble each other: no class is to be the largest of all
            logits: list[Tensor] = []
            hook = predictor.cls_score.register_forward_hook(lambda _m, _i, output: logits.append(output))
            model.eval()([image().float() / 255])
            hook.remove()
            predictor.cls_score.bias -= logits[0].mean(0)
    return model.eval()


def image() -> Tensor:
    """(3, H, W) uint8 with structure at several scales."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(1, 3, 9, 14, generator=generator)
    smooth = nn.functional.interpolate(coarse, SIZE, mode="bicubic")[0]
    noisy = smooth + 0.1 * torch.randn(3, *SIZE, generator=generator)
    return (noisy.clamp(0, 1) * 255).to(torch.uint8)


@torch.no_grad()
def theirs(model: MaskRCNN, picture: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Pyramid, detections with masks of 28 x 28, and proposals."""
    seen: dict[str, object] = {}
    model.backbone.register_forward_hook(lambda _m, _i, output: seen.update(pyramid=output))
    model.rpn.register_forward_hook(lambda _m, _i, output: seen.update(proposals=output[0][0]))
    model.roi_heads.register_forward_hook(lambda _m, _i, output: seen.update(found=dict(output[0][0])))
    model([picture.float() / 255])
    return seen["pyramid"], seen["found"], seen["proposals"]


def converted(model: MaskRCNN, folder: Path, *settings: str, name: str = "model.pth") -> Model:
    torch.save(model.state_dict(), folder / name)
    classes = model.roi_heads.box_predictor.cls_score.out_features - 1
    categories = folder / "classes.json"
    listed = ",".join(f'{{"id": {i}, "name": "thing {i}"}}' for i in range(1, classes + 1))
    categories.write_text(f'{{"categories": [{listed}]}}')
    convert(
        read_torchvision(str(folder / name)),
        folder / "model.safetensors",
        categories=None if classes == 90 else categories,
        settings=settings,
    )
    return load(folder / "model.safetensors", device="cpu")


def batch_of(picture: Tensor) -> Batch:
    height, width = picture.shape[1:]
    return Batch(
        images=nn.functional.pad(picture, (0, -width % 32, 0, -height % 32))[None],
        image_sizes=torch.tensor([[height, width]]),
        original_sizes=torch.tensor([[height, width]]),
        image_ids=torch.zeros(1, dtype=torch.int64),
        boxes=torch.zeros(1, 1, 4),
        labels=torch.zeros(1, 1, dtype=torch.int64),
        valid=torch.zeros(1, 1, dtype=torch.bool),
        masks=torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        mask_frames=torch.zeros(1, 1, 4),
        absent=torch.zeros(1, 0, dtype=torch.bool),
        ignored=torch.zeros(1, 0, 0, dtype=torch.uint8),
    )


def assert_same_detections(ours: RawDetections, found: dict[str, Tensor], at_least: int = 20) -> None:
    """Row by row, in order of score."""
    assert len(ours) == len(found["scores"])
    assert len(ours) >= at_least
    assert (ours.scores - found["scores"]).abs().max() <= SCORES
    assert torch.equal(ours.labels, found["labels"] - 1)
    assert (ours.boxes - found["boxes"]).abs().max() <= PIXELS
    assert (ours.masks - found["masks"][:, 0]).abs().max() <= MASKS


def assert_same(ours: Model, model: MaskRCNN, at_least: int) -> dict[str, Tensor]:
    """Features, proposals and detections; returns theirs of the last."""
    picture = image()
    pyramid, found, proposals = theirs(model, picture)
    batch = batch_of(picture)
    with torch.no_grad():
        features = ours.detector.pyramid(batch.images, batch.image_sizes)
        for own, their in zip(features, pyramid.values(), strict=True):
            assert (own - their).abs().max() <= FEATURES * their.abs().max()
        own = ours.detector.rpn.propose(
            ours.detector.rpn(features), batch.image_sizes, training=ours.detector.rpn.training
        )
    assert int(own.valid.sum()) == len(proposals)
    # Those whose scores agree to six digits may change places, so each looks for its partner.
    distance = (own.boxes[0][own.valid[0]][:, None] - proposals).abs().amax(2)
    assert distance.amin(0).max() <= PIXELS
    assert distance.amin(1).max() <= PIXELS
    assert_same_detections(ours.detector.detect(batch)[0], found, at_least)
    return found


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_same_features_proposals_and_detections(norm, tmp_path):
    model = with_weights(narrow, norm)
    found = assert_same(converted(model, tmp_path), model, at_least=20)
    assert len(found["labels"].unique()) > 2


def narrow_v2() -> MaskRCNN:
    """Every layer of torchvision's version 2, with fewer channels."""
    body = NarrowResNet(Bottleneck, [3, 4, 6, 3], norm_layer=nn.BatchNorm2d)
    return MaskRCNN(
        BackboneWithFPN(
            body,
            {f"layer{i + 1}": str(i) for i in range(4)},
            [32, 64, 128, 256],
            CHANNELS,
            norm_layer=nn.BatchNorm2d,
        ),
        min_size=SIZE[0],
        max_size=SIZE[1],
        rpn_head=RPNHead(CHANNELS, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS] * 4, [HIDDEN], norm_layer=nn.BatchNorm2d),
        box_predictor=FastRCNNPredictor(HIDDEN, CLASSES),
        mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1, norm_layer=nn.BatchNorm2d),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, CLASSES),
    )


def test_version_2(tmp_path):
    """Batch norm in neck and heads, a box head of convolutions, an RPN of two."""
    model = with_weights(narrow_v2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in (model.backbone.fpn, model.roi_heads):
            for norm in part.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.running_var.uniform_(0.2, 2, generator=generator)
                    norm.running_mean.normal_(0, 0.1, generator=generator)
                    norm.weight.uniform_(0.5, 1.5, generator=generator)
                    norm.bias.normal_(0, 0.1, generator=generator)
        for layer in model.rpn.head.conv:  # as initialised, all anchors score alike
            layer[0].weight.normal_(0, 0.2, generator=generator)
    ours = converted(model, tmp_path)
    sections = ours.recipe.model
    assert (sections.neck.norm, sections.rpn.convs, sections.box_head.convs) == (True, 2, 4)
    assert sections.mask_head.norm
    assert_same(ours, model, at_least=10)


def test_names_and_shapes_of_version_2_at_full_size(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "save_model", lambda *_, **__: None)
    state = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    torch.save(state, tmp_path / "m.pth")
    foreign = read_torchvision(str(tmp_path / "m.pth"))
    assert not foreign.unknown
    recipe, labels = convert(foreign, tmp_path / "o.safetensors")
    assert len(labels) == 90
    assert (recipe.model.neck.norm, recipe.model.box_head.width) == (True, 1024)


def test_the_published_weights_have_no_eps(tmp_path):
    """torchvision sets the eps of batch norm to 0 for them, and only for them. At full size."""
    model = with_weights(full_size, 91, eps=0.0)
    ours = converted(model, tmp_path, name=Path(PUBLISHED.url).name)
    assert ours.recipe.model.backbone.norm_eps == 0
    # Random rows of 91 classes come close to the threshold: score and order still agree.
    assert_same(ours, model, at_least=1)
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    labelled = [(c.id, c.name) for c in ours.categories]
    assert labelled[:11] == list(enumerate(names))[1:12]
    assert labelled[11] == (12, "unused 12")
    assert (len(labelled), labelled[-1]) == (90, (90, "toothbrush"))


def test_eps_by_setting(tmp_path, caplog):
    model = with_weights(narrow, FrozenBatchNorm2d, eps=0.0)
    ours = converted(model, tmp_path, "model.backbone.norm_eps=0")
    assert "norm_eps=0" in caplog.text
    assert_same_detections(ours.detector.detect(batch_of(image()))[0], theirs(model, image())[1])


def test_names_before_0_13(tmp_path):
    """Layers lay one level higher then; the published file still has those names."""
    model = with_weights(narrow, nn.BatchNorm2d)
    renamed = {}
    for key, value in model.state_dict().items():
        for new, old in (
            *(
                (f"fpn.{kind}.{i}.0.", f"fpn.{kind}.{i}.")
                for kind in ("inner_blocks", "layer_blocks")
                for i in range(4)
            ),
            ("rpn.head.conv.0.0.", "rpn.head.conv."),
            *((f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.") for i in range(4)),
        ):
            key = key.replace(new, old)
        renamed[key] = value
    assert "rpn.head.conv.weight" in renamed
    assert "roi_heads.mask_head.mask_fcn4.bias" in renamed
    torch.save({"model": renamed, "epoch": 12}, tmp_path / "old.pth")
    torch.save(model.state_dict(), tmp_path / "new.pth")
    old, new = (read_torchvision(str(tmp_path / name)).state for name in ("old.pth", "new.pth"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in new)


@pytest.fixture(scope="module")
def as_it_comes() -> dict[str, Tensor]:
    """State dict of torchvision's model for COCO, untrained."""
    return maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()


def test_coco_annotations_name_the_classes_by_id(as_it_comes, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "save_model", lambda *_, **__: None)  # 170 MB
    torch.save(as_it_comes, tmp_path / "m.pth")
    categories = tmp_path / "coco.json"
    categories.write_text('{"categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}]}')
    foreign = read_torchvision(str(tmp_path / "m.pth"))
    _, labels = convert(foreign, tmp_path / "o.safetensors", categories=categories)
    assert [(labels[i].id, labels[i].name) for i in (0, 2, 89)] == [(1, "unused 1"), (3, "car"), (90, "brush")]
    categories.write_text('{"categories": [{"id": 91, "name": "brush"}]}')
    with pytest.raises(UserError, match=f"{categories}: has a category 91, but the model's go from 1 to 90"):
        convert(foreign, tmp_path / "p.safetensors", categories=categories)


def test_unnamed_classes_are_asked_for(tmp_path):
    model = with_weights(narrow, nn.BatchNorm2d)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"m\.pth: does not name its classes.*--categories"):
        convert(read_torchvision(str(tmp_path / "m.pth")), tmp_path / "o.safetensors")


def test_another_architecture_is_refused_by_name(tmp_path):
    names = "maskrcnn_resnet50_fpn and maskrcnn_resnet50_fpn_v2"
    with pytest.raises(UserError, match=rf"maskrcnn_resnet50_fpn_v3: is neither a file.*there are {names}$"):
        read_torchvision("maskrcnn_resnet50_fpn_v3")
    state = with_weights(narrow, nn.BatchNorm2d).state_dict()
    state["roi_heads.keypoint_head.0.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "m.pth")
    categories = tmp_path / "c.json"
    categories.write_text(f'{{"categories": [{",".join(f"""{{"id": {i}, "name": "n{i}"}}""" for i in range(1, 7))}]}}')
    with pytest.raises(UserError, match=r"left over: 'roi_heads.keypoint_head.0.weight' of a keypoint head"):
        convert(read_torchvision(str(tmp_path / "m.pth")), tmp_path / "o.safetensors", categories=categories)


@pytest.fixture
def kept_at(tmp_path, monkeypatch) -> Path:
    """The place of the published file."""
    monkeypatch.setattr(zoo.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"


def test_published_weights_by_name(as_it_comes, kept_at, tmp_path, monkeypatch):
    """The file that torchvision downloads is taken as the published weights, and downloaded once."""
    monkeypatch.setattr(conversion, "save_model", lambda *_, **__: None)  # 170 MB
    asked = []

    def download(url: str, **options: object) -> None:
        asked.append((url, options["weights_only"], options["check_hash"]))
        kept_at.parent.mkdir(parents=True)
        torch.save(as_it_comes, kept_at)

    monkeypatch.setattr(zoo.torch.hub, "load_state_dict_from_url", download)
    for _ in range(2):
        foreign = read_torchvision(NAME)
    assert asked == [(PUBLISHED.url, True, True)]
    assert foreign.values["model"]["backbone"] == {"norm_eps": 0.0}
    recipe, _ = convert(foreign, tmp_path / "m.safetensors")
    assert (recipe.test.score_threshold, recipe.test.max_detections) == (0.05, 100)


def test_version_2_by_name(kept_at, tmp_path, monkeypatch):
    """Its batch norm was trained, with the usual eps."""
    monkeypatch.setattr(conversion, "save_model", lambda *_, **__: None)  # 180 MB
    state = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    asked = []

    def download(url: str, **options: object) -> None:
        asked.append(url)
        kept_at.parent.mkdir(parents=True)
        torch.save(state, kept_at.with_name(Path(url).name))

    monkeypatch.setattr(zoo.torch.hub, "load_state_dict_from_url", download)
    foreign = read_torchvision("maskrcnn_resnet50_fpn_v2")
    assert asked == [MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url]
    recipe, labels = convert(foreign, tmp_path / "m.safetensors")
    model = recipe.model
    assert (model.backbone.norm_eps, model.rpn.convs, model.box_head.convs, model.neck.norm) == (None, 2, 4, True)
    assert len(labels) == 90


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("no route to host"), "no route to host"),
        (URLError(OSError("[Errno -2] Name or service not known")), "[Errno -2] Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
    ],
)
def test_without_a_network_the_place_of_the_file_is_told(kept_at, monkeypatch, error, reason):
    timeouts = []

    def offline(url: str, **options: object) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr(zoo.torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as caught:
        read_torchvision(NAME)
    assert str(caught.value) == (
        f"maskrcnn_resnet50_fpn: {PUBLISHED.url} cannot be downloaded ({reason}); fetch it elsewhere and put it at "
        f"{kept_at}"
    )
    assert timeouts == [30.0]
    assert socket.getdefaulttimeout() is None


def test_a_broken_file_at_that_place_is_told(kept_at):
    kept_at.parent.mkdir(parents=True)
    kept_at.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=rf"^{kept_at}: is damaged or was cut off"):
        read_torchvision(NAME)
