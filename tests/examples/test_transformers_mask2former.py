import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("transformers")
    path = Path(__file__).resolve().parents[2] / "examples" / "transformers_mask2former.py"
    spec = importlib.util.spec_from_file_location("example_mask2former", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(example):
    torch.manual_seed(0)
    return example.small_model()


def pictures(example, count: int):
    generator = torch.Generator().manual_seed(0)
    return example.pictures(count, example.SHARES, torch.arange(example.CLASSES), generator)


def loss_of(model, images, labels, masks) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)  # of the points at which masks are compared
    model.zero_grad()
    value = model(images, mask_labels=masks, class_labels=labels).loss
    value.backward()
    return value.detach(), model.class_predictor.weight.grad.clone()


def test_without_mitigation_it_is_mask2formers_own_loss(example, model):
    images, labels, masks = pictures(example, 4)
    own = model.criterion
    value, grad = loss_of(model, images, labels, masks)
    model.criterion = example.SeesawCriterion(model.config, model.weight_dict, p=0.0)
    ours, our_grad = loss_of(model, images, labels, masks)
    model.criterion = own
    torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grad, grad, rtol=1e-3, atol=1e-5)


def test_matched_queries_are_counted_in_every_layer(example, model):
    images, labels, masks = pictures(example, 4)
    own = model.criterion
    counts = example.use_seesaw(model).criterion.seesaw.counts
    layers = 1 + len(model(images, output_auxiliary_logits=True).auxiliary_logits)
    loss_of(model, images, labels, masks)
    model.criterion = own
    assert torch.equal(counts, layers * torch.cat(labels).bincount(minlength=example.CLASSES))


def test_class_losses_by_hand(example, model):
    criterion = example.SeesawCriterion(model.config, model.weight_dict).eval()
    criterion.seesaw.counts += torch.tensor([100, 50, 20, 10, 5, 3, 2, 1])
    logits = torch.randn(1, 3, 9, dtype=torch.float64)
    indices = [(torch.tensor([2]), torch.tensor([0]))]  # query 2 is object 0, of class 1
    loss = criterion.loss_labels(logits, [torch.tensor([1])], indices)["loss_cross_entropy"]
    prob, counts = logits[0].softmax(1), criterion.seesaw.counts.double()
    terms = (counts / counts[1]).clamp(max=1) ** 0.8 * logits[0, 2, :8].exp()
    among_classes = terms.sum().log() - logits[0, 2, 1]
    objectness = -(1 - prob[2, 8]).log() - 0.1 * prob[:2, 8].log().sum()
    torch.testing.assert_close(loss.double(), (objectness + among_classes) / 1.2, rtol=1e-5, atol=1e-6)


def test_average_precision_by_hand(example):
    """Two answers for one object: the better one is wrong, so precision is 1/2 where it is found."""
    mask = torch.zeros(1, example.SIZE, example.SIZE)
    mask[:, :20] = 1

    class Model(torch.nn.Module):
        def forward(self, images):
            logits = torch.full((1, 2, 9), -9.0)
            logits[0, :, 3] = torch.tensor([2.0, 1.0])
            logits[..., 8] = 0
            found = torch.stack([1 - 2 * mask[0], 2 * mask[0] - 1])[None]  # elsewhere, and right
            return type("Output", (), {"class_queries_logits": logits, "masks_queries_logits": found})

    result = example.average_precision(Model(), torch.zeros(1, 3, 1, 1), [torch.tensor([3])], [mask])
    assert result[3].item() == pytest.approx(50)


def test_it_learns(example, model):
    images, labels, masks = pictures(example, 8)
    own = model.criterion
    example.use_seesaw(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(15):
        value = model(images, mask_labels=masks, class_labels=labels).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    model.criterion = own
    assert values[-1] < 0.85 * values[0]
