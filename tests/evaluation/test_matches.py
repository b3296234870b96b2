"""Matches at IoU 0.5 against a plain statement of the rules of LVIS, and what follows from them."""

import numpy as np
import pytest
from matched import matches_by_hand
from tiny import score_of

from tailseg.evaluation import analysis
from tailseg.evaluation.matches import Matches
from tailseg.evaluation.metrics import ScoreOptions

SIDE = 100


def overlap(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def random_set(seed):
    """Two classes on four images, every class looked for; one image's dogs are not annotated exhaustively; crowds."""
    rng = np.random.default_rng(seed)
    images = [{"id": i, "height": SIDE, "width": SIDE} for i in (4, 2, 9, 7)]
    images[1] |= {"neg_category_ids": [1, 2], "not_exhaustive_category_ids": [2]}
    truth, found = [], []
    for image in images:
        for _ in range(rng.integers(0, 7)):
            box = [*rng.integers(0, 60, 2).tolist(), *rng.integers(10, 40, 2).tolist()]
            place = {"image_id": image["id"], "category_id": int(rng.integers(1, 3))}
            crowd = int(rng.random() < 0.1)
            truth.append({"id": len(truth) + 1, **place, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd})
            for _ in range(rng.integers(0, 3)):
                near = [max(v + int(d), 1) for v, d in zip(box, rng.integers(-6, 7, 4), strict=True)]
                found.append({**place, "bbox": near, "score": float(rng.permutation(10_000)[0] / 10_000)})
    categories = [{"id": 1, "name": "cat", "frequency": "f"}, {"id": 2, "name": "dog", "frequency": "f"}]
    return {"images": images, "annotations": truth, "categories": categories}, found


def plain(data, found):
    """(score, right) of each detection that counts, and for each object that counts the score that found it."""
    open_pairs = {(i["id"], c) for i in data["images"] for c in i.get("not_exhaustive_category_ids", [])}
    found_with = {o["id"]: -np.inf for o in data["annotations"] if not o["iscrowd"]}
    counted = []
    for row in sorted(found, key=lambda row: -row["score"]):
        place = row["image_id"], row["category_id"]
        here = [o for o in data["annotations"] if (o["image_id"], o["category_id"]) == place]
        free = [o for o in here if not o["iscrowd"] and found_with[o["id"]] == -np.inf]
        best = max(free, key=lambda o: overlap(row["bbox"], o["bbox"]), default=None)
        if best is not None and overlap(row["bbox"], best["bbox"]) >= 0.5:
            found_with[best["id"]] = row["score"]
            counted.append((row["score"], True))
        elif place not in open_pairs and not any(o["iscrowd"] and inside(row["bbox"], o["bbox"]) for o in here):
            counted.append((row["score"], False))
    return sorted(counted), sorted(found_with.values())


def inside(box, crowd):
    """Half of the box lies in the crowd."""
    width = min(box[0] + box[2], crowd[0] + crowd[2]) - max(box[0], crowd[0])
    height = min(box[1] + box[3], crowd[1] + crowd[3]) - max(box[1], crowd[1])
    return max(width, 0) * max(height, 0) >= 0.5 * box[2] * box[3]


@pytest.mark.parametrize("seed", range(8))
def test_matches_are_those_of_a_plain_statement(seed, monkeypatch):
    kept: list[Matches] = []
    original = analysis.matches_of

    def spied(*arguments):
        kept.append(original(*arguments))
        return kept[-1]

    monkeypatch.setattr(analysis, "matches_of", spied)
    data, found = random_set(seed)
    scores = score_of(data, found, iou_types=["bbox"], options=ScoreOptions(analyse=True))
    (matches,) = kept
    counted, found_with = plain(data, found)
    assert sorted(zip(matches.scores.tolist(), matches.right.tolist(), strict=True)) == counted
    assert sorted(matches.found_with.tolist()) == found_with
    assert matches.average_precision() == pytest.approx(scores.metrics["bbox"]["AP50"], abs=1e-12)
    assert [found[row]["score"] for row in matches.rows] == matches.scores.tolist()


def test_counts_and_classes_by_hand():
    matches = matches_by_hand()
    assert matches.counts(0.5) == (2, 1, 2)
    assert matches.counts(0.0) == (3, 2, 1)
    assert matches.counts(2.0) == (0, 0, 4)
    parts = [(n, s.tolist(), r.tolist(), objects) for n, s, r, objects in matches.by_class()]
    assert parts == [(0, [0.9, 0.8, 0.3], [True, False, True], 3), (2, [0.7, 0.2], [True, False], 1)]
    # Class 0: recall 1/3 at precision 1 (34 points), 2/3 at 2/3 (33 points); class 2: all at precision 1.
    assert matches.average_precision() == pytest.approx(((34 + 33 * 2 / 3) / 101 + 1) / 2)


def test_nothing():
    none, everything = np.zeros(5, bool), np.ones(4, bool)
    empty = matches_by_hand().of(none, ~everything)
    assert (empty.counts(0.5), empty.average_precision(), list(empty.by_class())) == ((0, 0, 0), None, [])
    assert matches_by_hand().of(none, everything).average_precision() == 0
