import copy
import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

LOSSES = {
    "loss_box_reg",
    "loss_mask",
    "loss_roi_classes",
    "loss_roi_objectness",
    "loss_objectness",
    "loss_rpn_box_reg",
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "torchvision_mask_rcnn.py"
    spec = importlib.util.spec_from_file_location("example_mask_rcnn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SIZES |= {"min_size": 96, "max_size": 160}  # faster than its own, and the losses fall as far
    return module


@pytest.fixture(scope="module")
def photographs(example, shared):
    return example.read(shared / "data" / "coco128-lvis", 4)


def build(example, num_classes: int, **settings) -> MaskRCNN:
    torch.manual_seed(0)
    small = example.SIZES | {"box_batch_size_per_image": 64} | settings
    model = example.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=1 + num_classes, rpn_post_nms_top_n_test=50, **small
    )
    heads = model.roi_heads  # narrow masks, whose four layers take most of the time
    heads.mask_head, heads.mask_predictor = MaskRCNNHeads(256, (32,), 1), MaskRCNNPredictor(32, 32, 1 + num_classes)
    return example.use_seesaw(model, num_classes)


@pytest.fixture(scope="module")
def trained(example, photographs) -> tuple[MaskRCNN, list[str]]:
    """The model after three passes over four photographs, and the lines that were printed meanwhile."""
    num_classes, pairs = photographs
    model = build(example, num_classes)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "print", lambda *parts: lines.append(" ".join(parts)), raising=False)
        example.train(model, pairs, passes=3)
    return model, lines


def test_photographs_come_with_boxes_labels_and_masks_that_agree(photographs):
    num_classes, pairs = photographs
    assert num_classes == 80
    assert len(pairs) == 4
    for image, target in pairs:
        height, width = image.shape[1:]
        assert min(height, width) <= 96
        assert max(height, width) <= 160
        assert image.max() <= 1
        assert target["labels"].min() >= 1
        assert target["labels"].max() <= num_classes
        assert target["masks"].shape == (len(target["boxes"]), height, width)
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            extent = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (extent - box).abs().max() <= 2  # pixels


def test_the_losses_are_finite_and_fall(trained):
    _, lines = trained
    totals = [float(re.search(r"total ([\d.]+),", line)[1]) for line in lines]
    assert len(totals) == 3
    assert totals[2] < 0.9 * totals[0]
    for line in lines:
        parts = dict(re.findall(r"(loss_\w+) (\S+?)(?:,|$)", line))
        assert set(parts) == LOSSES
        assert all(math.isfinite(float(value)) for value in parts.values())


def test_classes_of_the_photographs_are_counted_and_no_others(photographs, trained):
    _, pairs = photographs
    counts = trained[0].roi_heads.box_predictor.classification.seesaw.counts
    present = torch.cat([target["labels"] for _, target in pairs]).unique() - 1
    assert counts[present].min() >= 3  # ground truth is among the proposals, and there were three passes
    assert counts.sum() == counts[present].sum()


def test_the_loss_gets_the_labels_of_the_rois_in_our_order(example, photographs, monkeypatch):
    num_classes, pairs = photographs
    model = build(example, num_classes).train()
    classification = model.roi_heads.box_predictor.classification
    received, of_torchvision = [], []
    loss, select = classification.loss, example.RoIHeads.select_training_samples

    def watched_loss(logits, labels, valid):
        received.append((logits, labels, valid))
        return loss(logits, labels, valid)

    def watched_select(*arguments):
        chosen = select(*arguments)
        of_torchvision.append(torch.cat(chosen[2]))
        return chosen

    monkeypatch.setattr(classification, "loss", watched_loss)
    monkeypatch.setattr(example.RoIHeads, "select_training_samples", watched_select)
    losses = model([pairs[0][0]], [pairs[0][1]])
    ((logits, labels, valid),), (theirs,) = received, of_torchvision
    assert logits.shape == (len(labels), num_classes + 2)
    assert valid.all()
    assert labels.tolist() == [num_classes if label == 0 else label - 1 for label in theirs.tolist()]
    assert {num_classes, *(pairs[0][1]["labels"] - 1).tolist()} == set(labels.tolist())
    with torch.no_grad():
        classification.eval()
        expected = loss(logits, labels, valid)  # counted already
    assert losses["loss_roi_classes"].item() == pytest.approx(expected["classes"].item())
    assert losses["loss_roi_objectness"].item() == pytest.approx(expected["objectness"].item())


def test_softmax_in_torchvision_gives_the_scores_of_equation_4(example):
    torch.manual_seed(1)
    num_classes = 3
    predictor = example.SeesawPredictor(FastRCNNPredictor(8, 1 + num_classes), num_classes).eval()
    torch.nn.init.normal_(predictor.cls_score.bias)
    features = torch.randn(5, 8)
    with torch.no_grad():
        rows = F.softmax(predictor(features)[0], -1)
        logits = predictor.cls_score(features).double().tolist()
    for row, (*classes, is_object, background) in zip(rows.tolist(), logits, strict=True):
        objectness = math.exp(is_object) / (math.exp(is_object) + math.exp(background))
        total = sum(math.exp(z) for z in classes)
        expected = [1 - objectness, *(objectness * math.exp(z) / total for z in classes)]
        assert row == pytest.approx(expected, abs=1e-6)
        assert sum(row) == pytest.approx(1, abs=1e-6)


def test_without_mitigation_the_losses_sum_to_torchvisions_cross_entropy(example):
    torch.manual_seed(2)
    num_classes = 4
    predictor = example.SeesawPredictor(FastRCNNPredictor(8, 1 + num_classes), num_classes)
    predictor.classification.seesaw.p = 0.0
    logs, _ = predictor(torch.randn(20, 8))
    labels = torch.randint(1 + num_classes, (20,))
    ours = torch.where(labels == 0, num_classes, labels - 1)
    losses = predictor.classification.loss(predictor.logits, ours, torch.ones(20, dtype=torch.bool))
    assert sum(losses.values()).item() == pytest.approx(F.cross_entropy(logs, labels).item(), rel=1e-5)


def test_inference_gives_scores_in_0_1_classes_from_1_on_and_masks(photographs, trained):
    num_classes, pairs = photographs
    model = copy.deepcopy(trained[0]).eval()  # as an average of weights is kept
    model.roi_heads.score_thresh = 0.0
    image = pairs[0][0]
    rows = []
    softmax = F.softmax
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", lambda *arguments: rows.append(softmax(*arguments)) or rows[-1])
        (found,) = model([image])
    assert len(found["scores"]) > 0
    assert ((found["scores"] >= 0) & (found["scores"] <= 1)).all()
    assert ((found["labels"] >= 1) & (found["labels"] <= num_classes)).all()
    assert found["masks"].shape == (len(found["scores"]), 1, *image.shape[1:])
    torch.testing.assert_close(rows[0].sum(dim=1), torch.ones(len(rows[0])))


def test_an_image_without_objects_trains_objectness_alone(example, photographs):
    num_classes, pairs = photographs
    model = build(example, num_classes).train()
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, *pairs[0][0].shape[1:], dtype=torch.uint8),
    }
    losses = model([pairs[0][0]], [empty])
    sum(losses.values()).backward()
    assert losses["loss_roi_classes"] == 0
    assert losses["loss_roi_objectness"] > 0
    gradient = model.roi_heads.box_predictor.cls_score.weight.grad
    assert (gradient[:num_classes] == 0).all()
    assert (gradient[num_classes:] != 0).any()


def test_the_counts_are_saved_and_loaded_with_the_weights(example, photographs, trained):
    name = "roi_heads.box_predictor.classification.seesaw.counts"
    fresh = build(example, photographs[0])
    assert fresh.state_dict()[name].sum() == 0
    fresh.load_state_dict(trained[0].state_dict())
    assert torch.equal(fresh.state_dict()[name], trained[0].state_dict()[name])
    assert fresh.state_dict()[name].sum() > 0


def test_a_wrong_folder_is_answered_with_one_sentence(example, tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere: no such folder or file; give a folder with train\.json"):
        example.main([str(tmp_path / "nowhere")])


def test_the_folder_is_required(example, capsys):
    with pytest.raises(SystemExit) as exit_info:
        example.main([])
    assert exit_info.value.code == 2
    assert "folder" in capsys.readouterr().err


def test_the_code_on_the_page_is_that_of_the_example(example):
    path = Path(example.__file__)
    section = (
        (path.parents[1] / "docs" / "anywhere.md").read_text().split("\n## A two-stage detector\n")[1].split("\n## ")[0]
    )
    shown = [line for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    code = path.read_text().splitlines()
    assert len(shown) > 5
    assert [line for line in shown if line not in code] == []
