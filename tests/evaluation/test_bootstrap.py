"""AP of resampled images against the scorer on images that are literally repeated, LVIS's rules and all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from federated_sets import Content, Rows, federated_data
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import score_of

from tailseg.data.annotations.annotations import load_annotations
from tailseg.evaluation.bootstrap import ObjectCounts, class_aps, resampled
from tailseg.evaluation.ground_truth import GroundTruth, ground_truth_of
from tailseg.evaluation.ranked_matches import RankedMatches, ranked_matches
from tailseg.evaluation.reading import Cut, read_results


def repeated(data: Content, rows: Rows, weights: NDArray[np.int32]) -> tuple[Content, Rows]:
    """Every image as often as its weight says; copies stand together in the order of ids."""
    times = dict(zip(sorted(image["id"] for image in data["images"]), weights.tolist(), strict=True))

    def copies(items: Rows, key: str) -> Rows:
        return [{**item, key: 100 * item[key] + copy} for item in items for copy in range(times[item[key]])]

    annotations = copies(data["annotations"], "image_id")
    return {
        "images": copies(data["images"], "id"),
        "annotations": [{**row, "id": number} for number, row in enumerate(annotations, start=1)],
        "categories": data["categories"],
    }, copies(rows, "image_id")


def matched(folder: Path, data: Content, rows: Rows) -> tuple[GroundTruth, RankedMatches]:
    (folder / "data.json").write_text(json.dumps(data))
    truth = ground_truth_of(load_annotations(folder / "data.json", folder, masks=False), with_masks=False)
    return truth, matches_in(truth, rows, "bbox")


def matches_in(truth: GroundTruth, detections: Path | Rows, kind: str) -> RankedMatches:
    cut = Cut()
    columns = read_results(detections, "rows", truth.known, (kind,), cut)
    dataset = truth.dataset(columns.images, columns.categories)
    return ranked_matches(truth, dataset, columns.ranked(kind, cut), kind, cut.limit)


def aps_of(matches: RankedMatches, objects: ObjectCounts, weights: NDArray[np.int32]) -> list[NDArray[np.float64]]:
    """AP and AP50 of every class that is listed, not only of those with objects."""
    spread = []
    for values in class_aps(matches, objects, weights):
        assert values.shape == (len(objects.labels()), len(weights))
        spread.append(np.full((len(objects.starts) - 1, len(weights)), np.nan))
        spread[-1][objects.labels()] = values
    return spread


def assert_same(values: NDArray[np.float64], expected: list[float | None]) -> None:
    for value, wanted in zip(values.tolist(), expected, strict=True):
        assert np.isnan(value) if wanted is None else value == pytest.approx(wanted, abs=1e-12)


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_a_set_of_images_scores_as_its_images_repeated(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    data, rows = federated_data(seed)
    truth, matches = matched(tmp_path_factory.mktemp("data"), data, rows)
    weights = np.concatenate([np.ones((1, 6), np.int32), resampled(6, 3, seed)])
    ap, ap50 = aps_of(matches, ObjectCounts.of(truth), weights)
    assert ap.shape == ap50.shape == (4, 4)
    for row, values, values50 in zip(weights, ap.T, ap50.T, strict=True):
        scores = score_of(*repeated(data, rows, row), iou_types=["bbox"])
        assert_same(values, [category["bbox_AP"] for category in scores.per_category])
        there = ~np.isnan(values)
        if there.any():
            assert values[there].mean() == pytest.approx(scores.metrics["bbox"]["AP"], abs=1e-12)
            assert values50[there].mean() == pytest.approx(scores.metrics["bbox"]["AP50"], abs=1e-12)


def test_the_rules_change_the_result(tmp_path: Path) -> None:
    """The random sets above would not show a rule that none of them needs."""
    changed = {"neg_category_ids": 0, "not_exhaustive_category_ids": 0, "iscrowd": 0}
    for seed in range(12):
        data, rows = federated_data(seed)
        _, matches = matched(tmp_path, data, rows)
        for key in changed:
            other = json.loads(json.dumps(data))
            for item in other["images"] if key != "iscrowd" else other["annotations"]:
                item[key] = [] if key != "iscrowd" else 0
            _, without = matched(tmp_path, other, rows)
            changed[key] += not np.array_equal(matches.precision, without.precision)
    assert all(changed.values()), changed


def test_ties_between_images_keep_their_order(tmp_path: Path) -> None:
    data, rows = federated_data(4, images=9)
    for row in rows:
        row["score"] = {10: 0.5, 11: 0.5, 12: 0.25}.get(row["image_id"], row["score"])
    of_one = {(row["image_id"], row["category_id"], row["score"]): row for row in rows}  # none twice in an image
    rows = list(of_one.values())
    truth, matches = matched(tmp_path, data, rows)
    weights = resampled(9, 4, 1)
    ap, _ = aps_of(matches, ObjectCounts.of(truth), weights)
    for row, values in zip(weights, ap.T, strict=True):
        scores = score_of(*repeated(data, rows, row), iou_types=["bbox"])
        assert_same(values, [category["bbox_AP"] for category in scores.per_category])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_set_itself_on_lvis(shared: Path, kind: str) -> None:
    folder = shared / "data" / "lvis-val-100"
    annotations = load_annotations(folder / "lvis_val_100.json", folder)
    truth = ground_truth_of(annotations, with_masks=True)
    found = folder / "dets_bbox_segm.json.gz"
    matches = matches_in(truth, found, kind)
    ap, ap50 = aps_of(matches, ObjectCounts.of(truth), np.ones((1, 100), np.int32))
    scores = score_of(folder / "lvis_val_100.json", found, iou_types=[kind])
    assert_same(ap[:, 0], [row[f"{kind}_AP"] for row in scores.per_category])
    assert np.nanmean(ap50) == pytest.approx(scores.metrics[kind]["AP50"], abs=1e-12)


def test_many_classes_and_sets_are_taken_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, rows = federated_data(7, images=12)
    truth, matches = matched(tmp_path, data, rows)
    weights = resampled(12, 20, 0)
    at_once = aps_of(matches, ObjectCounts.of(truth), weights)
    monkeypatch.setattr("tailseg.evaluation.bootstrap.ELEMENTS", 40)
    monkeypatch.setattr("tailseg.evaluation.ranked_matches.DETECTIONS_AT_ONCE", 10)
    in_turn = matches_in(truth, rows, "bbox")
    for name in ("starts", "images", "right", "wrong", "precision"):
        np.testing.assert_array_equal(getattr(in_turn, name), getattr(matches, name))
    for one, other in zip(aps_of(in_turn, ObjectCounts.of(truth), weights), at_once, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_nothing_found_and_nothing_there(tmp_path: Path) -> None:
    data, rows = federated_data(2)
    truth, none = matched(tmp_path, data, [])
    objects = ObjectCounts.of(truth)
    ap, _ = aps_of(none, objects, np.ones((1, 6), np.int32))
    assert np.unique(ap[~np.isnan(ap)]).tolist() == [0.0]
    assert np.isnan(ap[2, 0])  # nothing is annotated as c3
    truth, matches = matched(tmp_path, data | {"annotations": []}, rows)
    ap, _ = aps_of(matches, ObjectCounts.of(truth), np.ones((2, 6), np.int32))
    assert np.isnan(ap).all()


def test_objects_are_counted_by_images(tmp_path: Path) -> None:
    data, rows = federated_data(2)
    truth, _ = matched(tmp_path, data, rows)
    objects = ObjectCounts.of(truth)
    counted = [row for row in data["annotations"] if not row["iscrowd"]]
    images = [{row["image_id"] for row in counted if row["category_id"] == 3 * i} for i in (1, 2, 3, 4)]
    assert objects.image_counts().tolist() == [len(ids) for ids in images]
    assert objects.images_with_any(np.array([0, 3])) == len(images[0] | images[3])
    assert objects.images_with_any(np.array([], np.int64)) == 0


def test_sets_are_drawn_with_replacement_and_the_same_each_time() -> None:
    weights = resampled(50, 400, 3)
    assert (weights.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(weights, resampled(50, 400, 3))
    assert (weights != resampled(50, 400, 4)).any()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.25)
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.05)  # binomial


def test_the_cost_is_that_of_classes_with_objects(tmp_path: Path) -> None:
    """Classes that are listed and do not occur change no digit and take no rows."""
    data, rows = federated_data(7, images=12)
    truth, matches = matched(tmp_path, data, rows)
    more = [{"id": 100 + i, "name": f"more {i}", "frequency": "r"} for i in range(5000)]
    truth_of_many, of_many = matched(tmp_path, data | {"categories": [*data["categories"], *more]}, rows)
    for name in ("images", "right", "wrong", "precision"):
        np.testing.assert_array_equal(getattr(of_many, name), getattr(matches, name))
    weights = resampled(12, 20, 0)
    for few, many in zip(
        class_aps(matches, ObjectCounts.of(truth), weights),
        class_aps(of_many, ObjectCounts.of(truth_of_many), weights),
        strict=True,
    ):
        assert len(few) == 3
        np.testing.assert_array_equal(few, many)


def test_no_objects_and_no_detections(tmp_path: Path) -> None:
    truth, matches = matched(tmp_path, federated_data(2)[0] | {"annotations": []}, [])
    assert (len(matches.images), matches.precision.shape, matches.starts.tolist()) == (0, (10, 101, 0), [0] * 5)
    assert class_aps(matches, ObjectCounts.of(truth), np.ones((2, 6), np.int32))[0].shape == (0, 2)
