import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "torchvision_retinanet.py"
    spec = importlib.util.spec_from_file_location("example_retinanet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SIZES |= {"min_size": 96, "max_size": 160}  # faster than its own, and the losses fall as far
    return module


@pytest.fixture(scope="module")
def photographs(example, shared):
    return example.read(shared / "data" / "coco128-lvis", 4)


def build(example, num_classes: int) -> RetinaNet:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(  # faster than its own
        backbone_name="resnet18",
        weights=None,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    model = RetinaNet(backbone, num_classes, **example.SIZES)
    return example.use_seesaw(model, num_classes)


@pytest.fixture(scope="module")
def trained(example, photographs) -> tuple[RetinaNet, list[str], torch.Tensor]:
    """The model after three passes over four photographs, the printed lines, and the labels that the loss was given."""
    num_classes, pairs = photographs
    model = build(example, num_classes)
    seesaw = model.head.classification_head.seesaw
    lines: list[str] = []
    seen: list[torch.Tensor] = []
    seesaw.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "print", lambda *parts: lines.append(" ".join(parts)), raising=False)
        example.train(model, pairs, passes=3)
    return model, lines, torch.cat(seen)


def brute_force(logits, targets, matched, counts, p=0.8):
    """The loss in float64, one anchor and one class at a time."""
    classes = objectness = 0.0
    positives = 0
    for image_logits, target, image_matched in zip(logits.double().tolist(), targets, matched, strict=True):
        for (*z, z_object), index in zip(image_logits, image_matched.tolist(), strict=True):
            if index == -2:
                continue
            probability = 1 / (1 + math.exp(-z_object))
            if index == -1:
                objectness -= 0.75 * probability**2 * math.log(1 - probability)
                continue
            objectness -= 0.25 * (1 - probability) ** 2 * math.log(probability)
            positives += 1
            i = int(target["labels"][index])
            others = 0.0
            for j, z_j in enumerate(z):
                ratio = max(counts[j], 1) / max(counts[i], 1)
                others += (min(1.0, ratio) ** p if j != i else 1.0) * math.exp(z_j)
            classes += -z[i] + math.log(others)
    return (classes + objectness) / max(positives, 1)


def a_case():
    """Two images of six anchors and three classes; the second image has no object."""
    torch.manual_seed(3)
    logits = torch.randn(2, 6, 4, requires_grad=True)
    targets = [{"labels": torch.tensor([2, 0])}, {"labels": torch.zeros(0, dtype=torch.int64)}]
    matched = [torch.tensor([0, -1, 1, 0, -2, 0]), torch.full((6,), -1)]
    return logits, targets, matched


def test_the_loss_is_seesaw_on_positive_anchors_plus_focal_loss_on_all(example):
    logits, targets, matched = a_case()
    head = example.SeesawHead(8, 1, 3).train()
    head.seesaw.counts += torch.tensor([5, 0, 40])
    loss = head.compute_loss(targets, {"cls_logits": logits}, matched)
    assert head.seesaw.counts.tolist() == [6, 0, 43]  # positive anchors, not objects
    assert loss.item() == pytest.approx(brute_force(logits, targets, matched, [6, 0, 43]), rel=1e-5)


def test_class_logits_learn_from_positive_anchors_and_objectness_from_all_but_the_ignored(example):
    logits, targets, matched = a_case()
    example.SeesawHead(8, 1, 3).train().compute_loss(targets, {"cls_logits": logits}, matched).backward()
    learns = logits.grad != 0
    positive = torch.stack(matched) >= 0
    assert torch.equal(learns[..., :3].all(dim=2), positive)
    assert torch.equal(learns[..., :3].any(dim=2), positive)
    assert torch.equal(learns[..., 3], torch.stack(matched) != -2)


def test_images_without_objects_have_a_loss_and_a_gradient(example):
    logits, targets, matched = a_case()
    head = example.SeesawHead(8, 1, 3).train()
    loss = head.compute_loss([targets[1]] * 2, {"cls_logits": logits}, [matched[1]] * 2)
    loss.backward()
    assert loss.item() == pytest.approx(brute_force(logits, [targets[1]] * 2, [matched[1]] * 2, [0] * 3), rel=1e-5)
    assert (logits.grad[..., :3] == 0).all()
    assert (logits.grad[..., 3] != 0).all()
    assert head.seesaw.counts.sum() == 0


def test_a_logit_that_is_not_a_number_makes_the_loss_not_a_number(example):
    logits, targets, matched = a_case()
    for column in (0, 3):
        broken = logits.detach().clone()
        broken[0, 0, column] = math.nan
        assert example.SeesawHead(8, 1, 3).compute_loss(targets, {"cls_logits": broken}, matched).isnan()


def test_the_sigmoid_in_torchvision_gives_the_scores_of_equation_4(example):
    torch.manual_seed(4)
    head = example.SeesawHead(8, 2, 3)
    features = [torch.randn(1, 8, 4, 4), torch.randn(1, 8, 2, 2)]
    with torch.no_grad():
        logits = head.train()(features)
        outputs = head.eval()(features)
    assert logits.shape == (1, 2 * (16 + 4), 4)
    assert outputs.shape == (1, 2 * (16 + 4), 3)
    for row, (*classes, z_object) in zip(outputs[0].sigmoid().tolist(), logits[0].double().tolist(), strict=True):
        objectness = 1 / (1 + math.exp(-z_object))
        total = sum(math.exp(z) for z in classes)
        assert row == pytest.approx([objectness * math.exp(z) / total for z in classes], abs=1e-6)
        assert sum(row) == pytest.approx(objectness, abs=1e-6)


def test_scores_stay_in_0_1_for_huge_logits(example):
    logits = torch.tensor([[1e4, -1e4, 0.0, 1e4], [1e4, -1e4, 0.0, -1e4]])
    scores = example.SeesawHead(8, 1, 3).scores(logits).logit().sigmoid()
    assert scores.tolist() == [[1, 0, 0], [0, 0, 0]]


def test_the_losses_are_finite_and_fall(trained):
    _, lines, _ = trained
    totals = [float(re.search(r"total (\S+),", line)[1]) for line in lines]
    assert len(totals) == 3
    assert all(math.isfinite(total) for total in totals)
    assert totals[2] < totals[0]
    assert all(re.search(r"classification \d.*bbox_regression \d", line) for line in lines)


def test_the_counts_are_the_labels_of_the_positive_anchors(photographs, trained):
    num_classes, pairs = photographs
    model, _, seen = trained
    counts = model.head.classification_head.seesaw.counts
    assert counts.shape == (num_classes,)
    assert counts.tolist() == seen.bincount(minlength=num_classes).tolist()
    present = torch.cat([target["labels"] for _, target in pairs]).unique()
    assert counts[present].min() >= 3  # low-quality matches give each object an anchor, and there were three passes
    assert counts.sum() == counts[present].sum()


def test_inference_gives_scores_in_0_1_and_classes_from_0_on(photographs, trained):
    num_classes, pairs = photographs
    model = trained[0].eval()
    model.score_thresh = 1e-6
    with torch.no_grad():
        (found,) = model([pairs[0][0]])
    assert len(found["scores"]) > 0
    assert ((found["scores"] > 0) & (found["scores"] <= 1)).all()
    assert ((found["labels"] >= 0) & (found["labels"] < num_classes)).all()


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
        (path.parents[1] / "docs" / "anywhere.md").read_text().split("\n## A one-stage detector\n")[1].split("\n## ")[0]
    )
    shown = [line for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    code = path.read_text().splitlines()
    assert len(shown) > 5
    assert [line for line in shown if line not in code] == []
