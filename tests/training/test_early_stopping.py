"""Early stopping: what counts as better, by hand."""

import pytest

from tailseg.training.early_stopping import evaluations_since_best


@pytest.mark.parametrize(
    ("reached", "since"),
    [
        ([], 0),
        ([0.0], 0),
        ([0.1, 0.2, 0.3], 0),
        ([0.1, 0.3, 0.2], 1),
        ([0.3, 0.3, 0.3], 2),  # as good is no better
        ([0.3, 0.1, 0.2, 0.4, 0.1], 1),
        ([None, None], 2),
        ([0.2, None], 1),
        ([None, 0.0], 0),
    ],
)
def test_evaluations_since_the_best(reached, since):
    assert evaluations_since_best(reached) == since
