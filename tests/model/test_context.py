"""The context encoder against the recordings, plain pooling and its words; average precision against its definition."""

import math

import pytest
import torch
from tiny import made
from torch import Tensor
from torch.nn import functional as F

from tailseg.model.context import ContextEncoder, mean_inside, multilabel_average_precision


def encoder_of(build: dict, state: dict[str, Tensor]) -> ContextEncoder:
    """The encoder with a recorded one's weights; it counts pairs of convolutions as a block."""
    residual = build["conv_to_res"]
    encoder = made(
        ContextEncoder, build["in_channels"], build["num_classes"], convs=build["num_convs"], residual=residual
    )
    encoder.load_state_dict({own_name(key): value for key, value in state.items()})
    return encoder


def own_name(name: str) -> str:
    part, *rest = name.split(".")
    if part == "fc":
        return f"classifier.{rest[0]}"
    block, layer, kind = rest
    number = int(block) if layer == "conv" else 2 * int(block) + int(layer[-1]) - 1
    return f"convs.{number}.{kind}"


def padded_labels(labels: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Labels of all images in a row as (B, G) with a column more than needed, and which are valid."""
    groups = [F.pad(group, (0, max(counts) + 1 - len(group))) for group in labels.split(counts)]
    return torch.stack(groups), torch.arange(max(counts) + 1) < torch.tensor(counts).unsqueeze(1)


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_recorded(recorded, check, name):
    case, inputs, state, outputs = next(c for c in recorded("head_global_context") if c[0]["name"] == name)
    encoder = encoder_of(case["settings"]["build"], state)
    feature = inputs["feature"].clone().requires_grad_()
    image_sizes = torch.tensor([feature.shape[2:]] * 2) * 64  # without padding
    logits, context = encoder(feature, image_sizes)
    check(case, "logits", logits, outputs["logits"])
    check(case, "context", context[:, :, None, None], outputs["context"])
    labels, valid = padded_labels(inputs["labels"], case["settings"]["labels_per_image"])
    loss = 3 * encoder.loss(logits, labels, valid, torch.zeros_like(logits, dtype=torch.bool))
    check(case, "loss", loss, outputs["loss"])
    check(
        case,
        "loss_grad.feature",
        torch.autograd.grad(loss, feature, retain_graph=True)[0],
        outputs["loss_grad.feature"],
    )
    (((logits**2).sum() + (context**2).sum()) / 2).backward()
    check(case, "grad.feature", feature.grad, outputs["grad.feature"])
    parameters = dict(encoder.named_parameters())
    norms = [parameters[own_name(key)].grad.double().norm() for key in case["settings"]["parameters"]]
    check(case, "param_grad_norms", torch.stack(norms), outputs["param_grad_norms"])


@pytest.mark.parametrize("residual", [False, True])
def test_batch_norm_follows_every_convolution(residual):
    torch.manual_seed(0)
    encoder = made(ContextEncoder, 5, 3, convs=4, residual=residual, norm=True).double()
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules()) == 4
    assert all(conv.bias is None for conv in encoder.convs)
    for norm in encoder.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    feature = torch.randn(3, 5, 4, 6, dtype=torch.float64)

    def layer(number: int, x: Tensor) -> Tensor:
        """Convolution and batch norm by the statistics of this batch."""
        x = F.conv2d(x, encoder.convs[number].weight, padding=1)
        centred = x - x.mean(dim=(0, 2, 3), keepdim=True)
        x = centred / (x.var(dim=(0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * encoder.norms[number].weight.view(-1, 1, 1) + encoder.norms[number].bias.view(-1, 1, 1)

    if residual:
        middle = feature + layer(1, layer(0, feature).relu())
        expected = middle + layer(3, layer(2, middle).relu())
    else:
        expected = layer(3, layer(2, layer(1, layer(0, feature).relu()).relu()).relu()).relu()
    _, context = encoder(feature, torch.tensor([[256, 384]] * 3))
    torch.testing.assert_close(context, expected.mean(dim=(2, 3)), rtol=1e-10, atol=1e-10)


def test_pooling_by_hand():
    cells = torch.arange(12.0).view(1, 1, 3, 4).repeat(5, 1, 1, 1)  # 0..3, 4..7, 8..11; centres at 32, 96, 160, 224
    # Nothing outside; the second column's centre on the border; just before it; smaller than half a cell; one row.
    image_sizes = torch.tensor([[192, 256], [192, 96], [192, 95], [20, 30], [50, 200]])
    means = mean_inside(cells, image_sizes, 64)[:, 0]
    assert means.tolist() == [5.5, (0 + 1 + 4 + 5 + 8 + 9) / 6, 4, 0, 1]


def test_an_image_without_padding_is_pooled_as_a_whole():
    maps = torch.randn(1, 4, 50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in range(1, 50):  # multiples of 32 pixels, to which batches are padded; the last level halves by rounding up
        cells = (k + 1) // 2
        own = maps[:, :, :cells, : cells + 3]
        image_sizes = torch.tensor([[32 * k, 32 * (k + 6)]])
        torch.testing.assert_close(mean_inside(own, image_sizes, 64), own.mean(dim=(2, 3)), rtol=1e-12, atol=1e-12)


def test_the_context_does_not_depend_on_the_padding():
    torch.manual_seed(0)
    encoder = made(ContextEncoder, 4, 3, convs=1)
    torch.nn.init.zeros_(encoder.convs[0].weight)  # a 1x1 kernel: 3x3 ones see one cell across the image's border
    torch.nn.init.normal_(encoder.convs[0].weight[:, :, 1, 1])
    feature = torch.randn(1, 4, 5, 6)
    image_sizes = torch.tensor([[300, 380]])
    alone = encoder(feature, image_sizes)
    padded = encoder(F.pad(feature, (0, 3, 0, 7), value=9.0), image_sizes)
    for a, b in zip(alone, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def loss_by_words(logits: Tensor, objects: list[list[int]], absent: list[list[int]] | None) -> float:
    """Negative log likelihood of each class that counts, by image, class by class."""
    terms = []
    for row, here, gone in zip(logits.tolist(), objects, absent or objects, strict=True):
        for c, z in enumerate(row):
            if absent is None or c in here or c in gone:
                terms.append(math.log1p(math.exp(-z if c in here else z)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("unlabelled", ["negative", "ignored"])
def test_loss_by_words(unlabelled):
    torch.manual_seed(0)
    encoder = made(ContextEncoder, 4, 6, unlabelled=unlabelled)
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[2, 2, 5, 0], [0, 1, 4, 3], [3, 3, 3, 3]])
    valid = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    absent = torch.zeros(3, 6, dtype=torch.bool)
    absent[0, [1, 2]] = True  # class 2 is annotated all the same
    absent[2, 4] = True
    loss = encoder.loss(logits, labels, valid, absent)
    known = [[1, 2], [], [4]] if unlabelled == "ignored" else None
    assert loss.item() == pytest.approx(loss_by_words(logits, [[2, 5], [0], []], known), rel=1e-12)
    loss.backward()
    learnt = logits.grad != 0
    if known:
        assert learnt.nonzero().tolist() == [[0, 1], [0, 2], [0, 5], [1, 0], [2, 4]]
    else:
        assert learnt.all()
    assert torch.autograd.gradcheck(lambda z: encoder.loss(z, labels, valid, absent), logits)


def test_annotated_exhaustively_both_readings_agree():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 9), torch.randint(9, (4, 5))
    valid = torch.rand(4, 5) < 0.7
    absent = torch.tensor([[c not in row[ok] for c in range(9)] for row, ok in zip(labels, valid, strict=True)])
    losses = [
        made(ContextEncoder, 2, 9, unlabelled=choice).loss(logits, labels, valid, absent)
        for choice in ("negative", "ignored")
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_nothing_known_gives_zero_with_gradients():
    encoder = made(ContextEncoder, 4, 3, unlabelled="ignored")
    logits, _ = encoder(torch.randn(2, 4, 3, 3), torch.tensor([[192, 192]] * 2))
    loss = encoder.loss(
        logits,
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, 0, dtype=torch.bool),
        torch.zeros(2, 3, dtype=torch.bool),
    )
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in encoder.parameters())


@pytest.mark.parametrize("unlabelled", ["negative", "ignored"])
def test_no_images(unlabelled):
    encoder = made(ContextEncoder, 4, 3, unlabelled=unlabelled)
    logits, context = encoder(torch.zeros(0, 4, 3, 3), torch.zeros(0, 2, dtype=torch.int64))
    assert (logits.shape, context.shape) == ((0, 3), (0, 4))
    none = torch.zeros(0, 2, dtype=torch.int64)
    loss = encoder.loss(logits, none, none.bool(), torch.zeros(0, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0


def test_initial_weights():
    torch.manual_seed(0)
    encoder = made(ContextEncoder, 64, 300)
    for conv in encoder.convs:
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
        assert (conv.bias == 0).all()
    assert encoder.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    torch.testing.assert_close(encoder.classifier.bias.sigmoid(), torch.full((300,), 0.01))


def test_gradients_in_float64():
    torch.manual_seed(0)
    for residual in (False, True):
        encoder = made(ContextEncoder, 2, 3, convs=2, residual=residual).double()
        feature = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        image_sizes = torch.tensor([[192, 100], [90, 192]])
        assert torch.autograd.gradcheck(lambda x, e=encoder, hws=image_sizes: e(x, hws), feature)


def test_low_precision_gives_float32_near_the_exact_result():
    torch.manual_seed(0)
    encoder = made(ContextEncoder, 32, 20)
    torch.nn.init.normal_(encoder.classifier.weight, std=0.2)
    feature, image_sizes = torch.randn(2, 32, 5, 7), torch.tensor([[320, 448], [200, 300]])
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(feature.bfloat16(), image_sizes)
        loss = encoder.loss(
            low[0], torch.tensor([[3], [4]]), torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 20).bool()
        )
    exact = encoder.double()(feature.double(), image_sizes)
    assert loss.dtype == torch.float32
    for ours, theirs in zip(low, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_an_odd_number_of_convolutions_has_no_pairs():
    with pytest.raises(ValueError, match="even number of convolutions, received 3"):
        made(ContextEncoder, 4, 3, convs=3, residual=True)


def average_precision(scores: list[float], present: list[bool]) -> float:
    """Mean precision of one class's images, sorted by hand."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    found, precisions = 0, []
    for rank, image in enumerate(ranked, 1):
        if present[image]:
            found += 1
            precisions.append(found / rank)
    return sum(precisions) / len(precisions) if precisions else math.nan


def test_average_precision_by_hand():
    logits = torch.tensor([[3.0, 1.0], [2.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    present = torch.tensor([[True, False], [False, True], [True, False], [False, False]])
    expected = torch.tensor([(1 / 1 + 2 / 3) / 2, 1 / 2], dtype=torch.float64)  # equal scores: in the order of images
    torch.testing.assert_close(multilabel_average_precision(logits, present), expected)


@pytest.mark.parametrize("partly", [False, True])
def test_average_precision_by_words(partly):
    torch.manual_seed(0)
    logits = torch.randn(40, 12).mul(4).round()  # many equal scores
    present = torch.rand(40, 12) < torch.linspace(0, 1, 12)
    known = torch.rand(40, 12) < 0.6
    ours = multilabel_average_precision(logits, present, known if partly else None)
    assert ours.isnan()[0]
    for c in range(12):
        kept = known[:, c] if partly else torch.ones(40, dtype=torch.bool)
        theirs = average_precision(logits[kept, c].tolist(), present[kept, c].tolist())
        assert ours[c].item() == pytest.approx(theirs, rel=1e-12, nan_ok=True)


def test_average_precision_of_no_images():
    assert multilabel_average_precision(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).isnan().all()
