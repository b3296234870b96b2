"""The script behind docs/results/long_tail.md: its AP is LVIS's, its steps those of a random sampler."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def long_tail(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import long_tail

    return long_tail


@pytest.fixture
def counts(long_tail):
    return long_tail.Counts(
        images=torch.tensor([5, 700, 40, 1, 300]), objects=torch.tensor([9, 900, 60, 1, 2500]), groups=tuple("rfcrf")
    )


def brute_force(scores, labels, evaluated, limit) -> list[float]:
    """AP of each class, from lists of detections."""
    images, candidates, classes = scores.shape
    detections = []
    for i in range(images):
        of_image = [(float(scores[i, k, c]), c, k) for k in range(candidates) for c in range(classes)]
        of_image.sort(reverse=True)
        detections += [(s, c, int(labels[i, k]) == c) for s, c, k in of_image[:limit] if evaluated[i, c]]
    detections.sort(reverse=True)
    result = []
    for c in range(classes):
        total = int((labels == c).sum())
        hits = [hit for _, own, hit in detections if own == c]
        curve = [(sum(hits[:n]) / total, sum(hits[:n]) / n) for n in range(1, len(hits) + 1)] if total else []
        best = [max([p for r, p in curve if r >= at / 100 - 1e-9], default=0.0) for at in range(101)]
        result.append(sum(best) / 101 if total else float("nan"))
    return result


@pytest.mark.parametrize("limit", [1, 4, 11, None])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_plain_loops(long_tail, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (7, 4), generator=generator)
    labels[labels == 3] = 5  # class 3 has no object; 5 is background
    scores = torch.rand(7, 4, 5, generator=generator)
    scores += 0.5 * torch.nn.functional.one_hot(labels, 6)[:, :, :5]
    evaluated = torch.rand(7, 5, generator=generator) < 0.4
    evaluated |= torch.nn.functional.one_hot(labels, 6)[:, :, :5].any(dim=1)
    found = long_tail.average_precision(scores, labels, evaluated, limit)
    expected = torch.tensor(brute_force(scores, labels, evaluated, limit), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)
    assert found[3].isnan()


def test_average_precision_by_hand(long_tail):
    """Of class 0 the hit ranks second of its two; with a single detection an image it is lost."""
    scores = torch.tensor([[[0.2, 0.7], [0.6, 0.1]]])
    labels, evaluated = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    assert long_tail.average_precision(scores, labels, evaluated, None).tolist() == pytest.approx([0.5, 0.5])
    assert long_tail.average_precision(scores, labels, evaluated, 3).tolist() == pytest.approx([0.5, 0])
    assert long_tail.average_precision(scores, labels, evaluated, 1).tolist() == [0, 0]
    # A detection of a class that nobody looked for in an image is no mistake.
    scores, labels = torch.cat([scores, scores]), torch.tensor([[0, 2], [2, 2]])
    evaluated = torch.tensor([[True, True], [False, True]])
    assert long_tail.average_precision(scores, labels, evaluated, None)[0] == pytest.approx(0.5)
    evaluated[1, 0] = True
    assert long_tail.average_precision(scores, labels, evaluated, None)[0] == pytest.approx(1 / 4)


def test_no_images_have_no_precision(long_tail):
    nothing = torch.zeros(0, 4, 3), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.bool)
    assert long_tail.average_precision(*nothing, None).isnan().all()


@pytest.mark.parametrize("name", ["cross-entropy", "eql", "seesaw", "seesaw-p0", "seesaw-q2"])
def test_weighing_a_row_is_repeating_its_sample(long_tail, counts, name):
    classification = long_tail.make_loss(long_tail.METHODS[name], counts, None).double()
    torch.manual_seed(0)
    times = torch.tensor([3, 1, 0, 5, 2])
    labels = torch.tensor([0, 1, 2, 5, 4])

    def gradient(points, labels, weights=None):
        weight = torch.linspace(-1, 1, 3 * classification.num_logits, dtype=torch.float64)
        weight = weight.view(3, -1).sin().requires_grad_()
        logits = points @ weight
        if weights is not None:
            long_tail.weigh_rows(logits, weights)
        loss = sum(classification.loss(logits, labels, torch.ones_like(labels, dtype=torch.bool)).values())
        return torch.autograd.grad(loss, weight)[0]

    points = torch.randn(5, 3, dtype=torch.float64)
    repeated = gradient(points.repeat_interleave(times, 0), labels.repeat_interleave(times))
    torch.testing.assert_close(gradient(points, labels, times / times.double().mean()), repeated)


def test_the_sampler_draws_three_of_background_for_an_object(long_tail, counts):
    weights = long_tail.sampler_weights(counts.cut(900))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[:5] / weights[3], torch.tensor([9.0, 900, 60, 1, 900]))
    torch.testing.assert_close(weights[5:].sum() / weights[:5].sum(), torch.tensor(3.0))


def test_cutting_the_tail_leaves_rare_classes_their_objects(long_tail, counts):
    assert counts.cut(50).tolist() == [9, 50, 50, 1, 50]
    assert counts.cut(None).tolist() == [9, 900, 60, 1, 2500]
    seesaw = long_tail.make_loss(long_tail.METHODS["seesaw"], counts, 50)
    assert seesaw.seesaw.counts.tolist() == [9, 50, 50, 1, 50]
    assert not seesaw.training
    eql = long_tail.make_loss(long_tail.METHODS["eql"], counts, 50)
    assert eql.spared.tolist() == [1, 0, 1, 1, 0]  # what is rare or common in LVIS, however deep the tail


def test_every_class_that_is_not_frequent_has_a_look_alike(long_tail, counts):
    means, families = long_tail.look_alikes(counts, torch.Generator().manual_seed(0))
    assert families[[1, 4]].tolist() == [1, 4]
    assert set(families.tolist()) <= {1, 4}
    assert (means[:, 0] == long_tail.OBJECTNESS).all()
    apart = torch.cdist(means, means)
    for c in (0, 2, 3):
        assert apart[c, families[c]] < 2.6
    assert apart[1, 4] > 2.6


def test_an_image_is_searched_for_its_classes_and_look_alikes(long_tail):
    families = torch.tensor([0] * 20 + [20] * 20)
    labels = torch.tensor([[3, 3, 5], [30, 31, 30]])
    chosen = long_tail.verified(labels, families, torch.Generator().manual_seed(0))
    assert chosen[0, [3, 5]].all()
    assert chosen[1, [30, 31]].all()
    for row, family in zip(chosen, (slice(0, 20), slice(20, 40)), strict=True):
        assert row[family].sum() >= 2 + long_tail.NEGATIVES
        assert row.sum() <= 2 + 2 * long_tail.NEGATIVES


def test_worlds_of_a_seed_are_equal(long_tail, counts, monkeypatch):
    monkeypatch.setattr(long_tail, "NATURAL", 100)
    one, other = (long_tail.make_world(counts, 3, torch.device("cpu")) for _ in range(2))
    assert torch.equal(one.candidates, other.candidates)
    assert torch.equal(one.evaluated, other.evaluated)
    labels = one.labels[:, : long_tail.OBJECTS].flatten()
    assert (one.labels[:, long_tail.OBJECTS :] == 5).all()
    # 100 by frequency, of no class fewer than eight; what fills no image is left over.
    assert 0 <= 26 + 8 + 8 + 8 + 72 - len(labels) < long_tail.OBJECTS
    assert one.evaluated.gather(1, one.labels[:, : long_tail.OBJECTS]).all()


def test_the_rate_warms_up_and_falls_twice(long_tail):
    factors = [long_tail.rate_factor(step) for step in (0, 9, 19, 79, 80, 109, 110, 119)]
    assert factors == pytest.approx([0.05, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_counts_are_read(long_tail, tmp_path, shared):
    (tmp_path / "c.csv").write_text(
        "id,name,frequency,image_count,instance_count\n1,cup,f,400,900\n2,saw,r,2,3\n", encoding="utf-8"
    )
    counts = long_tail.read_counts(tmp_path / "c.csv")
    assert (counts.images.tolist(), counts.objects.tolist(), counts.groups) == ([400, 2], [900, 3], ("f", "r"))
    lvis = long_tail.read_counts(shared / "data" / "lvis_v1_categories.csv")
    assert (len(lvis), int(lvis.objects.min()), int(lvis.objects.max())) == (1203, 1, 50552)


def test_missing_counts_end_in_a_sentence(long_tail, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        long_tail.read_counts(tmp_path / "none.csv")
    assert str(tmp_path / "none.csv") in stopped.value.code
    assert "\n" not in stopped.value.code


def test_the_script_writes_its_page(long_tail, counts, monkeypatch, tmp_path):
    tiny = {"STEPS": 6, "WARM_UP": 2, "RATES": (1.0, 3.0), "NATURAL": 50, "LIMITS": {"300": 12, "none": None}}
    for name, value in tiny.items():
        monkeypatch.setattr(long_tail, name, value)
    monkeypatch.setattr(long_tail, "read_counts", lambda: counts)
    monkeypatch.setattr(sys, "argv", ["long_tail.py", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    long_tail.main()
    torch.set_num_threads(threads)
    results = json.loads((tmp_path / "benchmarks/results/long_tail.json").read_text())
    assert results["classes"] == {"r": 2, "c": 1, "f": 2}
    assert results["objects"]["50:1"] == 160
    assert results["runs"].keys() == set(long_tail.DEPTHS)
    for methods in results["runs"].values():
        assert methods.keys() == set(long_tail.METHODS)
        for runs in methods.values():
            assert [run.keys() for run in runs] == [{"300", "none"}] * 2
            assert all(0 <= value <= 1 for run in runs for found in run.values() for value in found.values())
    for name, rate in results["budget"]["rates"].items():
        tried = {float(rate): found["AP"] for rate, found in results["tried"][name].items()}
        assert tried[rate] == max(tried.values())
    assert (tmp_path / "docs/images/long_tail.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "docs/results/long_tail.md").read_text()
    assert "not detection" in text
    assert all(title in text for title in results["titles"].values())
