"""``--init coco`` and checkpoints of other projects as the start of a training."""

import pickle
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson
import pytest
import torch
from tiny import assert_refused, options, tailseg
from torch import nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import Bottleneck, ResNet

from tailseg.checkpoint import load_model
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve
from tailseg.training.weight_init import read_init
from tailseg.zoo import start
from tailseg.zoo.start import project_of, starting_model

PUBLISHED = "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
CHANNELS, HIDDEN = 16, 64  # of the neck and the masks; of the box head
# table1/seesaw, as narrow as the model below.
NARROW = (
    "model.backbone.options={channels: [8, 16, 32, 64]}",
    f"model.neck.channels={CHANNELS}",
    f"model.box_head={{width: {HIDDEN}, rois: 32, max_positive: 8}}",
    f"model.mask_head.channels={CHANNELS}",
    "model.rpn={pre_nms_train: 50, pre_nms_test: 50, post_nms_train: 40, post_nms_test: 20}",
    "data={batch_per_device: 2, workers: 0, short_edges: [64], test_short_edge: 64, long_edge: 64, mask_grid: 28}",
    "schedule={epochs: 1, milestones: [], warmup_steps: 0}",
    "optimizer.lr=0.001",
    "test.max_detections=20",
)


class NarrowResNet(ResNet):
    """ResNet-50 with an eighth of the channels behind its stem."""

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **settings: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *arguments, **settings)


def narrow_coco_model() -> MaskRCNN:
    """torchvision's model for COCO with every layer narrower, and random weights."""
    torch.manual_seed(0)
    body = NarrowResNet(Bottleneck, [3, 4, 6, 3])
    backbone = BackboneWithFPN(body, {f"layer{i + 1}": str(i) for i in range(4)}, [32, 64, 128, 256], CHANNELS)
    return MaskRCNN(
        backbone,
        box_head=TwoMLPHead(CHANNELS * 49, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, 91),
        mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, 91),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our cache and torchvision's are empty."""
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """A narrow model where torchvision keeps what it downloads."""
    path = tmp_path / "hub" / "checkpoints" / PUBLISHED
    path.parent.mkdir(parents=True)
    torch.save(narrow_coco_model().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, one of which COCO has."""
    settings = SyntheticSettings(classes=4, train_images=4, val_images=2, size=64, rarest=3)
    folder = write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)
    for split in ("train", "val"):
        content = orjson.loads((folder / f"{split}.json").read_bytes())
        content["categories"][1]["name"] = "cat"
        (folder / f"{split}.json").write_bytes(orjson.dumps(content))
    return folder


def test_coco_is_converted_once(downloaded: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = starting_model("coco")
    assert path.parent == cache / "converted"
    found = load_model(path)
    assert found.recipe.model.backbone.norm_eps == 0  # as torchvision sets it for these weights alone
    assert [(c.id, c.name) for c in found.categories][16] == (17, "cat")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(start, "convert", None)
    assert starting_model("coco") == path
    # Another file of the same name is another model.
    monkeypatch.undo()
    monkeypatch.setenv("TAILSEG_CACHE", str(cache))
    model = narrow_coco_model()
    model.rpn.head.cls_logits.bias.data.add_(1)
    torch.save(model.state_dict(), downloaded)
    assert starting_model(downloaded) != path


def test_the_configuration_beside_a_checkpoint_makes_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says of detectron2's models what tensors do not."""
    path, made = tmp_path / "m.pth", []
    torch.save({"model": {"proposal_generator.rpn_head.conv.weight": torch.zeros(1)}}, path)

    def convert(foreign: Any, out: Path) -> None:
        made.append(foreign)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()

    monkeypatch.setattr(start, "convert", convert)
    monkeypatch.setitem(start.READERS, "detectron2", lambda path: path.with_name("config.yaml").is_file())
    alone = starting_model(path)
    (tmp_path / "config.yaml").write_text("MODEL: {}")
    beside = starting_model(path)
    (tmp_path / "config.yaml").write_text("MODEL: {MASK_ON: true}")
    changed = starting_model(path)
    assert len({alone, beside, changed}) == 3
    assert starting_model(path) == changed
    (tmp_path / "config.yaml").unlink()
    assert starting_model(path) == alone
    assert made == [False, True, True]


def test_a_training_starts_from_coco(downloaded: Path, data: Path, tmp_path: Path) -> None:
    """Recipe `table1/seesaw`, as the README says: all but the classifier is COCO's, the class that it knows by name."""
    done = tailseg(
        "train", "table1/seesaw", "--data", data, "--out", tmp_path / "run", "--init", "coco", *options(NARROW)
    )
    assert done.returncode == 0, done.stderr
    assert f"--init {downloaded}: a model of torchvision, converted to " in done.stderr
    assert "1 of 4 classes known by name; the classifier starts again" in done.stderr
    assert "they were trained with model.backbone.norm_eps = 0.0 (here None)" in done.stderr
    assert "model.rpn.rounded_anchors = True (here False)" in done.stderr
    first = load_model(starting_model("coco")).state
    last = load_model(tmp_path / "run").state
    frozen = [key for key in last if key.startswith(("backbone.net.conv1", "backbone.net.layer1", "backbone.net.bn1"))]
    assert len(frozen) > 50
    assert all(torch.equal(last[key], first[key]) for key in frozen)
    # Two steps from there, so still near: the neck, and the mask of the class that COCO knows.
    for key, rows in (("neck.lateral_convs.3.weight", (..., ...)), ("stages.0.mask_head.predictor.weight", (1, 16))):
        ours, theirs = last[key][rows[0]], first[key][rows[1]]
        assert 0 < (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_a_checkpoint_of_another_project_is_given_directly(data: Path, tmp_path: Path) -> None:
    state = {"model": {f"module.{key}": value for key, value in narrow_coco_model().state_dict().items()}}
    torch.save(state, tmp_path / "theirs.pth")
    done = tailseg(
        "train", "table1/cross-entropy", "--data", data, "--out", tmp_path / "run", "--init", tmp_path / "theirs.pth",
        *options(NARROW),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "theirs.pth: a model of torchvision, converted to " in done.stderr
    assert "1 of 4 classes known by name); they were trained with" in done.stderr
    assert "classifier starts again" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("torchvision", "roi_heads.box_predictor.cls_score.weight"),
        ("torchvision", "module.roi_heads.box_predictor.cls_score.weight"),
        ("mmdet", "roi_head.bbox_head.fc_cls.weight"),
        ("mmdet", "roi_head.bbox_head.0.fc_cls.weight"),
        ("detectron2", "proposal_generator.rpn_head.conv.weight"),
        ("detectron2", "backbone.bottom_up.stem.conv1.weight"),
    ],
)
@pytest.mark.parametrize("nest", ["", "model", "state_dict"])
def test_projects_are_told_by_names_of_tensors(tmp_path: Path, kind: str, key: str, nest: str) -> None:
    state: dict[str, Any] = {key: torch.zeros(2)}
    torch.save({nest: state} if nest else state, tmp_path / "m.pth")
    assert project_of(tmp_path / "m.pth") == kind


def test_models_and_runs_of_ours_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("last.safetensors", "best.safetensors"):
        (tmp_path / "run" / name).touch()
        assert starting_model(tmp_path / "run") == tmp_path / "run" / name
    assert starting_model(str(tmp_path / "gone.safetensors")) == tmp_path / "gone.safetensors"  # told where it is read


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_what_cannot_be_a_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--init cocoo: there is no such file; did you mean coco\?$"):
        starting_model("cocoo")
    with pytest.raises(UserError, match=r"^--init gone.pth: there is no such file; give coco, a model, a run"):
        starting_model("gone.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet.pth: is no Mask R-CNN of .* \(its first tensor is 'conv1.weight'\)"):
        starting_model(tmp_path / "resnet.pth")
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps({"model": Runs(tmp_path / "ran")}))
    with pytest.raises(UserError, match=r"evil.pth: "):
        starting_model(evil)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: this folder holds no best.safetensors or last.safetensors"):
        starting_model(tmp_path / "empty")


def test_classes_without_names_are_asked_for(tmp_path: Path, cache: Path) -> None:
    model = narrow_coco_model()
    model.roi_heads.box_predictor = FastRCNNPredictor(HIDDEN, 7)
    model.roi_heads.mask_predictor = MaskRCNNPredictor(CHANNELS, CHANNELS, 7)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"does not name its classes.*--categories.*`tailseg convert torchvision` has"):
        starting_model(tmp_path / "m.pth")
    assert not list(cache.rglob("*.safetensors"))


def test_offline_the_command_says_where_to_put_the_file(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    done = tailseg("train", "table1/seesaw", "--data", data, "--out", tmp_path / "run", "--init", "coco", "--quiet")
    assert_refused(done, "https://download.pytorch.org", f"put it at {tmp_path}/hub/checkpoints/{PUBLISHED}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_at_full_size_the_rows_of_table_1_can_start_from_coco(tmp_path: Path) -> None:
    path = tmp_path / "hub" / "checkpoints" / PUBLISHED
    path.parent.mkdir(parents=True)
    torch.save(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict(), path)
    model = starting_model("coco")
    categories = load_model(model).categories[:5]
    for recipe in ("table1/cross-entropy", "table1/eql", "table1/seesaw"):
        assert read_init(model, resolve(recipe), categories).path == model
    for recipe in ("small/seesaw", "table2/03-carafe"):
        with pytest.raises(UserError, match=r"the recipe builds another architecture; train with the model's own"):
            read_init(model, resolve(recipe), categories)
    shutil.rmtree(tmp_path / "cache")  # 170 MB


def test_a_recipe_with_another_backbone_is_refused_before_the_download(data: Path, tmp_path: Path) -> None:
    with patch.object(start, "published_file") as download:
        done = tailseg("train", "small/seesaw", "--data", data, "--out", tmp_path / "run", "--init", "coco")
    assert_refused(done, "--init coco", "the recipe has tf_efficientnet_lite0; take own/fast")
    assert not download.called
