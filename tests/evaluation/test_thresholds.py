"""Thresholds with the best F1: by hand, and against trying every score."""

import numpy as np
import pytest
from matched import matches_by_hand

from tailseg.evaluation.thresholds import best_threshold, class_thresholds, common_threshold, thresholds_content


def test_by_hand():
    # F1 at 0.9, 0.8, 0.3: 2/4, 2/5, 4/6.
    found = best_threshold(np.array([0.9, 0.8, 0.3]), np.array([True, False, True]), 3)
    assert (found.score, found.precision, found.recall, found.right) == (0.3, 2 / 3, 2 / 3, 2)
    assert found.f1 == pytest.approx(2 / 3)
    assert best_threshold(np.array([0.9]), np.array([False]), 3) is None
    assert best_threshold(np.empty(0), np.empty(0, bool), 3) is None


@pytest.mark.parametrize("seed", range(10))
def test_no_other_score_has_a_better_f1(seed):
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.integers(0, 20, 40) / 19)  # with ties
    right, objects = rng.random(40) < scores, 45
    found = best_threshold(scores, right, objects)
    shown = scores >= found.score
    ours = 2 * right[shown].sum() / (shown.sum() + objects)
    assert ours == max(2 * right[scores >= s].sum() / ((scores >= s).sum() + objects) for s in scores)
    assert found.precision == right[shown].mean()
    assert found.recall == right[shown].sum() / objects


@pytest.mark.parametrize(
    "score", [0.57, 0.123456, 0.99999, 1e-7, 1.0, 0.00005, 1.8599999e-4, 3e-310, 0.0, -0.123456, 7e300]
)
def test_a_threshold_is_never_above_its_score(score):
    """Or what has just this score, which it was made for, would not be shown."""
    found = best_threshold(np.array([score]), np.array([True]), 1).score
    assert score - abs(score) * 1e-3 <= found <= score
    assert found == float(f"{found:.3e}")  # four digits


def test_low_scores_are_told_apart():
    """As of a model after few steps: what is shown from the stated score on is what is stated of it."""
    scores, right = np.array([1.9e-4, 1.8e-4, 1.2e-4, 1.2e-4]), np.array([True, True, False, False])
    found = best_threshold(scores, right, 2)
    assert (found.score, found.precision) == (1.8e-4, 1)
    assert (scores >= found.score).tolist() == right.tolist()


def test_of_all_and_of_each_class():
    matches = matches_by_hand()
    # In order 0.9 right, 0.8 wrong, 0.7, 0.3 right, 0.2 wrong; F1 2/5, 2/6, 4/7, 6/8, 6/9.
    found = common_threshold(matches)
    assert found.content() == {"score": 0.3, "precision": 0.75, "recall": 0.75, "F1": 0.75}
    assert {number: own.score for number, own in class_thresholds(matches).items()} == {0: 0.3, 2: 0.7}
    assert common_threshold(matches.of(np.zeros(5, bool), np.ones(4, bool))) is None


def test_the_file():
    """Few right detections, none, or a name that another class has too: the default."""
    rows = [
        ("cat", 0.4, 5),
        ("dog", 0.6, 4),
        ("owl", None, 0),
        ("elk", 0.2, 9),
        ("elk", 0.3, 9),
        ("a</script>", 0.1, 7),
    ]
    classes = [{"name": name, "threshold": threshold, "right": right} for name, threshold, right in rows]
    found = thresholds_content(classes, {"score": 0.31, "F1": 0.5})
    assert found == {"default": 0.31, "classes": {"cat": 0.4, "a</script>": 0.1}}
    assert thresholds_content([], None) == {"default": 0.5, "classes": {}}
