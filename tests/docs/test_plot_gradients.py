"""The gradients that docs/gradients.md states are those of the code, and its plot is drawn."""

import math
import sys
from pathlib import Path

import pytest
import torch

from tailseg.losses import CLASSIFICATIONS, ClassStatistics

FOLDER = Path(__file__).resolve().parents[2] / "docs"
OBJECTS = (5000, 700, 30, 4)  # class 0 is frequent, class 3 rare
IMAGES = (3000, 500, 25, 4)
NUM_IMAGES = 10_000
CLASSES = 4
RARE = 3
POINTS = [(0.3, -0.2, 0.5, 0.1, -0.4), (2.0, 0.0, -1.0, -3.0, 0.5), (-1.0, 0.2, 0.4, 2.5, 1.0)]  # background last


def own_gradient(name: str, z: tuple[float, ...], label: int, prepare=None, **options) -> float:
    """Autograd's gradient on the rare class's logit from one RoI."""
    kind = CLASSIFICATIONS[name]
    if kind.needs_statistics:
        options["statistics"] = ClassStatistics(
            num_images=NUM_IMAGES, images=torch.tensor(IMAGES), instances=torch.tensor(OBJECTS)
        )
    classification = kind(CLASSES, **options).double().eval()
    if prepare:
        prepare(classification)
    values = [*z, *[0.7] * (CLASSES + 1)][: classification.num_logits]
    logits = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    loss = sum(classification.loss(logits, torch.tensor([label]), torch.tensor([True])).values())
    return float(torch.autograd.grad(loss, logits)[0][0, RARE])


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def softmax(z: list[float], j: int = RARE) -> float:
    return math.exp(z[j]) / sum(math.exp(value) for value in z)


def check(name: str, z: tuple[float, ...], expected: dict[int, float], prepare=None, **options) -> None:
    for label, value in expected.items():
        assert own_gradient(name, z, label, prepare, **options) == pytest.approx(value, rel=1e-5, abs=1e-12), label


@pytest.mark.parametrize("z", POINTS)
def test_cross_entropy(z):
    p = softmax(z)
    check("cross-entropy", z, {0: p, RARE: p - 1, CLASSES: p})


@pytest.mark.parametrize("z", POINTS)
def test_class_balanced(z):
    effective = [(1 - 0.999**n) / (1 - 0.999) for n in OBJECTS]
    weights = [CLASSES / e / sum(1 / other for other in effective) for e in effective]
    p = softmax(z)
    check("class-balanced", z, {0: weights[0] * p, RARE: weights[RARE] * (p - 1), CLASSES: p})


@pytest.mark.parametrize("z", POINTS)
def test_ldam(z):
    def lowered(label: int) -> list[float]:
        margin = 0.5 * (min(OBJECTS) / OBJECTS[label]) ** 0.25
        return [value - 20 * margin * (k == label) for k, value in enumerate(z)]

    check("ldam", z, {0: softmax(lowered(0)), RARE: softmax(lowered(RARE)) - 1, CLASSES: softmax(z)})


@pytest.mark.parametrize("z", POINTS)
def test_logit_adjustment(z):
    shares = [CLASSES * n / sum(OBJECTS) for n in OBJECTS] + [1.0]
    p = softmax([value + math.log(share) for value, share in zip(z, shares, strict=True)])
    check("logit-adjustment", z, {0: p, RARE: p - 1, CLASSES: p})


@pytest.mark.parametrize("z", POINTS)
@pytest.mark.parametrize("q", [0.0, 2.0])
def test_seesaw(z, q):
    def with_factors(label: int) -> list[float]:
        sigma = [softmax(z[:CLASSES], k) for k in range(CLASSES)]
        mitigation = [min(1, n / OBJECTS[label]) ** 0.8 for n in OBJECTS]
        compensation = [max(1, s / max(sigma[label], 0.01)) ** q for s in sigma]
        pairs = zip(mitigation, compensation, strict=True)
        return [value + math.log(m * c) for value, (m, c) in zip(z, pairs, strict=False)]

    expected = {0: softmax(with_factors(0)), RARE: softmax(with_factors(RARE)) - 1, CLASSES: 0.0}
    check("seesaw", z, expected, lambda c: c.seesaw.counts.copy_(torch.tensor(OBJECTS)), q=q)


@pytest.mark.parametrize("z", POINTS)
def test_eql(z):
    s = sigmoid(z[RARE])
    check("eql", z, {0: 0.0, RARE: s - 1, CLASSES: s})


@pytest.mark.parametrize("z", POINTS)
@pytest.mark.parametrize("ratio", [0.05, 0.7, 1.1])
def test_eql_v2(z, ratio):
    def prepare(classification):
        classification.positive_gradients.fill_(3 * ratio)
        classification.negative_gradients.fill_(3)

    s, f = sigmoid(z[RARE]), sigmoid(12 * (ratio - 0.8))
    check("eql-v2", z, {0: f * s, RARE: (1 + 4 * (1 - f)) * (s - 1), CLASSES: f * s}, prepare)


@pytest.mark.parametrize("z", POINTS)
@pytest.mark.parametrize("drawn", [0.0, 1.0])
def test_federated(z, drawn):
    def prepare(classification):
        classification.draw = lambda labels, valid: torch.tensor(
            [1.0, 0.0, 0.0, 1.0 if int(labels[0]) == RARE else drawn], dtype=torch.float64
        )

    s = sigmoid(z[RARE])
    check("federated", z, {0: drawn * s, RARE: s - 1, CLASSES: drawn * s}, prepare)


@pytest.mark.parametrize("z", POINTS)
def test_focal(z):
    s = sigmoid(z[RARE])
    push = 0.75 * s**2 * (s - 2 * (1 - s) * math.log(1 - s))
    pull = 0.25 * (1 - s) ** 2 * ((1 - s) - 2 * s * math.log(s))
    check("focal", z, {0: push, RARE: -pull, CLASSES: push})


@pytest.mark.parametrize("z", POINTS)
@pytest.mark.parametrize("thresholds", [(10, 100, 1000), (1000,)])
def test_group_softmax(z, thresholds):
    """A step of one RoI: only a group that has the label counts it, and class 1 shares the rare one's at (1000,)."""
    group = [k for k in range(CLASSES) if sum(OBJECTS[k] >= t for t in thresholds) == 0]
    p = softmax([*(z[k] for k in group), 0.7], group.index(RARE))
    expected = dict.fromkeys(group, p) | {RARE: p - 1, CLASSES: 0.0, 0: 0.0}
    check("group-softmax", z, expected, thresholds=thresholds)


def test_group_softmax_with_an_own_sample_counts_others_too():
    statistics = ClassStatistics(num_images=NUM_IMAGES, images=torch.tensor(IMAGES), instances=torch.tensor(OBJECTS))
    classification = CLASSIFICATIONS["group-softmax"](CLASSES, statistics=statistics).double()
    logits = torch.zeros(3, classification.num_logits, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([RARE, 0, CLASSES])
    loss = classification.loss(logits, labels, torch.ones(3, dtype=torch.bool))["classes"]
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient[:, RARE], torch.tensor([-0.5, 0.5, 0.5], dtype=torch.float64) / 3)


def test_script_draws_the_page_s_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import plot_gradients

    rows = [f"{n},{n}" for n in (400, 200, 90, 60, 30, 12, 10, 6, 3, 1)]
    (tmp_path / "counts.csv").write_text("\n".join(rows))
    monkeypatch.setattr(plot_gradients, "DRAWS", 100)
    arguments = ["--counts", str(tmp_path / "counts.csv"), "--num-images", "1000", "--out", str(tmp_path / "g.png")]
    monkeypatch.setattr(sys, "argv", ["plot_gradients.py", *arguments])
    plot_gradients.main()
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in plot_gradients.LOSSES)


def test_counts_that_are_none_are_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from plot_gradients import read_counts

    (tmp_path / "counts.csv").write_text("3,3\n2,0\n1,1\n")
    with pytest.raises(ValueError, match="all positive"):
        read_counts(tmp_path / "counts.csv")


@pytest.mark.parametrize("content", [None, "a,b\n"])
def test_wrong_counts_end_in_a_sentence(tmp_path, monkeypatch, capsys, content):
    monkeypatch.syspath_prepend(str(FOLDER))
    import plot_gradients

    path = tmp_path / "counts.csv"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["plot_gradients.py", "--counts", str(path), "--out", str(tmp_path / "p.png")])
    with pytest.raises(SystemExit) as stopped:
        plot_gradients.main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert f"{path}: " in errors
    assert "give a CSV with a line images,instances a class" in errors
    assert not (tmp_path / "p.png").exists()


def test_tail_gradients_by_hand(tmp_path, monkeypatch, capsys):
    """Three classes of 1, 1 and 100 objects, all logits equal, three background RoIs an object."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import plot_tail_gradients as tail

    images, instances = torch.tensor([1, 1, 1000]), torch.tensor([1, 1, 100])
    # p = 1/4 of each class and background: 101 pushes of 1/4 against a pull of 3/4, and 306 of background.
    objects, both = tail.ratios("cross-entropy", images, instances)
    assert objects[0] == pytest.approx(101 / 3, rel=1e-5)
    assert both[0] == pytest.approx((101 + 306) / 3, rel=1e-5)
    objects, both = tail.ratios("Seesaw, p = 0", images, instances)
    assert objects[0] == pytest.approx(101 / 2, rel=1e-5)  # p = 1/3 of each class, background apart
    assert both[0] == objects[0]
    factor = 100**-0.8
    objects, _ = tail.ratios("Seesaw, p = 0.8", images, instances)
    assert objects[0] == pytest.approx((1 / 3 + 100 * factor / (1 + 2 * factor)) / (2 / 3), rel=1e-5)
    objects, both = tail.ratios("EQL", images, instances)
    assert objects.tolist() == pytest.approx([0, 0, 2 * 0.001 / 100 / 0.999], rel=1e-3)
    assert both[0] == pytest.approx(306 * 0.001 / 0.999, rel=1e-3)

    rows = ["id,name,frequency,image_count,instance_count", "1,a,r,1,1", "2,b,r,1,1", "3,c,f,1000,5000"]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    monkeypatch.setattr(tail, "CATEGORIES", tmp_path / "c.csv")
    monkeypatch.setattr(sys, "argv", ["plot_tail_gradients.py", "--out", str(tmp_path / "g.png")])
    tail.main()
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*tail.LOSSES, *tail.DEPTHS))


def test_tail_gradients_without_the_counts_end_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import plot_tail_gradients as tail

    with pytest.raises(SystemExit) as stopped:
        tail.read_categories(tmp_path / "none.csv")
    assert str(tmp_path / "none.csv") in stopped.value.code
