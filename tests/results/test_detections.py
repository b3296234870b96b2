"""The results object: what it holds, how it is indexed, and what each of its forms says."""

import base64
import builtins
import dataclasses
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hotcoco import mask as rle
from PIL import Image

import tailseg
from tailseg.data.annotations.annotations import Category
from tailseg.errors import UserError
from tailseg.evaluation.results import ResultsWriter
from tailseg.results.detections import Detections
from tailseg.structures import RawDetections

CATEGORIES = (Category(5, "fork", "f", 9, 9), Category(7, "egg_cup", "r", 1, 1), Category(40, "owl", "c", 3, 3))
HW = (60, 80)


def raw(count: int = 3, *, mask_scores: bool = False) -> RawDetections:
    """Blobs in boxes with fractions; the second object's mask is a ring, the third's two halves apart."""
    y, x = np.mgrid[:28, :28] - 13.5
    radius = np.hypot(x, y)
    grids = np.stack([radius < 13, (radius < 13) & (radius > 6), abs(x) > 6]).astype(np.float32)
    return RawDetections(
        image_hw=HW,
        boxes=torch.tensor([[2.3, 3.1, 32.7, 39.4], [40, 10, 80, 50], [10, 41.5, 41, 60]])[:count],
        scores=torch.tensor([0.75, 0.5, 0.3])[:count],
        labels=torch.tensor([2, 1, 2])[:count],
        masks=torch.from_numpy(grids)[:count],
        mask_scores=torch.tensor([0.25, 0.5, 0.125])[:count] if mask_scores else None,
    )


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (*HW, 3), dtype=np.uint8)


def make(count: int = 3, **options: Any) -> Detections:
    return Detections(raw(count, **options), CATEGORIES, picture(), "a/p.jpg")


# ---------------------------------------------------------------------------------------------------------
# As a list


def test_fields() -> None:
    found = make()
    assert isinstance(found, tailseg.Detections)
    assert found.image_hw == HW
    assert found.boxes.tolist() == raw().boxes.tolist()
    assert found.scores.tolist() == pytest.approx([0.75, 0.5, 0.3])
    assert found.labels.tolist() == [2, 1, 2]
    assert found.names == ["owl", "egg_cup", "owl"]
    assert found.category_ids == [40, 7, 40]
    assert found.categories == CATEGORIES
    assert found.mask_scores is None
    assert make(mask_scores=True).mask_scores.tolist() == [0.25, 0.5, 0.125]
    assert found.source == "a/p.jpg"
    assert (found.picture == picture()).all()


def test_iteration_gives_one_object_after_the_other() -> None:
    found = make(mask_scores=True)
    parts = list(found)
    assert [len(part) for part in parts] == [1, 1, 1]
    assert [part.names for part in parts] == [["owl"], ["egg_cup"], ["owl"]]
    assert [part.mask_scores.item() for part in parts] == [0.25, 0.5, 0.125]
    assert all(part.source == "a/p.jpg" and part.picture is found.picture for part in parts)
    assert list(make(0)) == []
    assert [one.masks.sum().item() for one in found] == found.masks.sum(dim=(1, 2)).tolist()


def test_indexing() -> None:
    found = make()
    assert isinstance(found[0], Detections)
    assert found[0].scores.tolist() == [0.75]
    assert found[-1].boxes.tolist() == raw().boxes[2:].tolist()
    assert found[1:].labels.tolist() == [1, 2]
    assert found[found.scores > 0.4].names == ["owl", "egg_cup"]
    assert found[[name == "owl" for name in found.names]].scores.tolist() == pytest.approx([0.75, 0.3])
    assert found[np.array([2, 0])].scores.tolist() == pytest.approx([0.3, 0.75])
    assert found[[]].names == []
    with pytest.raises(IndexError, match="object 3 of 3 does not exist: valid are 0 to 2"):
        found[3]
    with pytest.raises(TypeError, match="received str 'owl'"):
        found["owl"]


def test_length_truth_and_text() -> None:
    assert (len(make()), len(make(0))) == (3, 0)
    assert make()
    assert not make(0)
    assert repr(make()) == "<Detections: 3 objects (2 owl, 1 egg_cup) in a/p.jpg, 60 x 80 pixels>"
    assert repr(make()[0]) == "<Detections: 1 object (1 owl) in a/p.jpg, 60 x 80 pixels>"
    assert repr(Detections(raw(0), CATEGORIES)) == "<Detections: 0 objects, 60 x 80 pixels>"
    many = RawDetections(
        image_hw=HW,
        boxes=torch.zeros(13, 4),
        scores=torch.zeros(13),
        labels=torch.tensor([4, *range(12)]),
        masks=torch.zeros(13, 28, 28),
    )
    assert repr(Detections(many, [Category(i, f"c{i}", "f", 1, 1) for i in range(12)])) == (
        "<Detections: 13 objects (2 c4, 1 c0, 1 c1, 1 c2, 1 c3, 1 c5, 1 c6, 1 c7, 1 c8, 1 c9 and 2 more classes), "
        "60 x 80 pixels>"
    )
    evil = Detections(raw(1), [Category(1, "\x1b[2J", "f", 1, 1)] * 3)
    assert repr(evil) == r"<Detections: 1 object (1 \x1b[2J), 60 x 80 pixels>"


def test_it_can_be_sent_to_another_process() -> None:
    again = pickle.loads(pickle.dumps(make()))
    assert again.to_dict() == make().to_dict()
    assert (again.picture == picture()).all()


# ---------------------------------------------------------------------------------------------------------
# The picture


def test_a_file_is_read_when_its_pixels_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "p.png"
    Image.fromarray(picture()).save(file)
    found = Detections(raw(), CATEGORIES, file)
    assert found.source == str(file)
    assert (found.picture == picture()).all()
    assert (found[0].plot() == make()[0].plot()).all()
    assert not any(isinstance(value, np.ndarray) for value in vars(found).values())  # nothing of it is kept
    Image.fromarray(picture()[:-1]).save(file)
    with pytest.raises(UserError) as error:
        found.plot()
    assert str(error.value) == (
        f"{file}: has 59 x 80 pixels, but 60 x 80 when its objects were found; predict again"
    )  # fmt: skip
    file.unlink()
    with pytest.raises(UserError, match=r"p\.png"):
        found.crops()
    assert len(found.polygons()) == 3  # needs no pixels


def test_without_a_picture() -> None:
    found = Detections(raw(), CATEGORIES)
    assert found.source is None
    with pytest.raises(UserError, match="came without their picture"):
        found.plot()
    with pytest.raises(ValueError, match=r"expected a picture of \(60, 80\) pixels, received \(80, 60\)"):
        Detections(raw(), CATEGORIES, np.zeros((80, 60, 3), np.uint8))


# ---------------------------------------------------------------------------------------------------------
# Masks


def test_masks_are_those_of_the_run_lengths() -> None:
    found = make()
    assert found.masks.shape == (3, *HW)
    assert found.masks.dtype == torch.bool
    decoded = [rle.decode(row["segmentation"]).astype(bool) for row in found.to_coco()]
    assert np.array_equal(found.masks.numpy(), np.stack(decoded))
    assert found.masks[1, 30, 42]
    assert not found.masks[1, 30, 60]  # the hole of the ring
    assert make(0).masks.shape == (0, *HW)


def test_a_full_grid_is_the_pixels_whose_centres_lie_in_the_box() -> None:
    full = RawDetections(
        image_hw=(20, 30),
        boxes=torch.tensor([[2.0, 3, 12, 9], [0, 0, 30, 20], [5, 5, 5, 5], [-9, -9, -1, -1]]),
        scores=torch.ones(4),
        labels=torch.zeros(4, dtype=torch.int64),
        masks=torch.ones(4, 28, 28),
    )
    found = Detections(full, CATEGORIES, np.zeros((20, 30, 3), np.uint8))
    expected = np.zeros((4, 20, 30), bool)
    expected[0, 3:9, 2:12] = expected[1] = True
    assert np.array_equal(found.masks.numpy(), expected)
    corners = {tuple(corner) for corner in found.polygons()[0][0].tolist()}
    assert corners == {(2, 3), (12, 3), (12, 9), (2, 9)}
    assert found.polygons()[2:] == [[], []]  # without area, and outside
    assert [crop.shape for crop in found.crops(masked=True)] == [(6, 10, 4), (20, 30, 4), (1, 1, 4), (1, 1, 4)]
    assert found.to_pandas()["area"].tolist() == [60, 600, 0, 0]


def test_polygons_make_the_same_masks_again() -> None:
    found = make()
    assert [len(pieces) for pieces in found.polygons()] == [1, 1, 2]
    for pieces, mask in zip(found.polygons(), found.masks.numpy(), strict=True):
        assert all(piece.ndim == 2 and piece.shape[1] == 2 and piece.dtype == np.float64 for piece in pieces)
        merged = rle.merge([rle.frPoly(piece.ravel().tolist(), *HW) for piece in pieces])
        assert np.array_equal(rle.decode(merged).astype(bool), mask)
    assert make(0).polygons() == []


def test_crops() -> None:
    found = make()
    plain, masked = found.crops(), found.crops(masked=True)
    assert [crop.shape for crop in plain] == [(37, 31, 3), (40, 40, 3), (19, 31, 3)]
    for crop, with_mask, mask, (x, y) in zip(
        plain, masked, found.masks.numpy(), [(2, 3), (40, 10), (10, 41)], strict=True
    ):
        h, w = crop.shape[:2]
        assert np.array_equal(crop, picture()[y : y + h, x : x + w])
        assert np.array_equal(with_mask[..., :3], crop)
        assert np.array_equal(with_mask[..., 3], 255 * mask[y : y + h, x : x + w])
        assert mask.sum() == (with_mask[..., 3] > 0).sum()  # nothing of the mask lies outside
    plain[0][:] = 0
    assert (found.picture == picture()).all()
    assert make(0).crops() == []


# ---------------------------------------------------------------------------------------------------------
# Files and other tools


def test_to_dict_and_json() -> None:
    found = make()
    content = found.to_dict()
    assert {key: value for key, value in content.items() if key != "detections"} == {
        "image": "a/p.jpg", "height": 60, "width": 80,
    }  # fmt: skip
    first, second, third = content["detections"]
    assert (first["category_id"], first["category"], first["score"]) == (40, "owl", 0.75)
    assert first["bbox"] == pytest.approx([2.3, 3.1, 30.4, 36.3], abs=1e-5)
    assert (second["category_id"], second["category"], second["bbox"]) == (7, "egg_cup", [40, 10, 40, 40])
    assert "mask_score" not in third
    assert json.loads(found.to_json()) == content
    assert make(0).to_dict()["detections"] == []
    rows = make(mask_scores=True).to_dict()["detections"]
    assert [row["mask_score"] for row in rows] == [0.25, 0.5, 0.125]
    assert [row["score"] for row in rows] == pytest.approx([0.75, 0.5, 0.3])


@pytest.mark.parametrize("mask_scores", [False, True])
def test_to_coco_gives_the_rows_of_a_results_file(mask_scores: bool, tmp_path: Path) -> None:
    found = make(mask_scores=mask_scores)
    rows = found.to_coco(image_id=9)
    assert [row["image_id"] for row in rows] == [9, 9, 9]
    assert [row["category_id"] for row in rows] == [40, 7, 40]
    assert [row["score"] for row in rows] == pytest.approx([0.25, 0.5, 0.125] if mask_scores else [0.75, 0.5, 0.3])
    assert json.loads(json.dumps(rows)) == rows
    with ResultsWriter(tmp_path / "r.json") as writer:
        writer.add(9, raw(mask_scores=mask_scores), [5, 7, 40])
    written = orjson.loads((tmp_path / "r.json").read_bytes())
    assert [list(row) for row in written] == [list(row) for row in rows]
    for ours, theirs in zip(rows, written, strict=True):
        assert ours["segmentation"] == theirs["segmentation"]
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-5)
    assert "image_id" not in found.to_coco()[0]
    assert make(0).to_coco(image_id=9) == []


def test_to_labelme(caplog: pytest.LogCaptureFixture) -> None:
    content = make().to_labelme()
    assert (content["imagePath"], content["imageHeight"], content["imageWidth"]) == ("p.jpg", 60, 80)
    assert content["imageData"] is None
    assert [shape["label"] for shape in content["shapes"]] == ["owl", "egg_cup", "owl", "owl"]
    assert [shape["group_id"] for shape in content["shapes"]] == [None, None, 1, 1]
    assert [shape["score"] for shape in content["shapes"]] == pytest.approx([0.75, 0.5, 0.3, 0.3])
    assert json.loads(json.dumps(content)) == content
    masks = make().masks.numpy()
    for shape, mask in zip(content["shapes"][:2], masks, strict=False):
        drawn = rle.decode(rle.frPoly(np.ravel(shape["points"]).tolist(), *HW)).astype(bool)
        assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9
    assert not caplog.records
    empty = Detections(
        RawDetections(**{**fields(raw(2)), "masks": torch.stack([raw().masks[0], torch.zeros(28, 28)])}), CATEGORIES
    )
    content = empty.to_labelme()
    assert len(content["shapes"]) == 1
    assert content["imagePath"] == ""
    assert "objects without a mask left out" in caplog.text
    twins = Detections(raw(1), [Category(i, "owl", "f", 1, 1) for i in (1, 2, 3)])
    with pytest.raises(UserError, match="the categories 1 and 2 are both called 'owl'"):
        twins.to_labelme()


def fields(record: RawDetections) -> dict[str, Any]:
    return {name: getattr(record, name) for name in RawDetections.__dataclass_fields__}


@pytest.mark.parametrize("count", [0, 3])
def test_to_supervision(count: int) -> None:
    supervision = pytest.importorskip("supervision")
    found, theirs = make(count), make(count).to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert len(theirs) == count
    assert np.array_equal(theirs.xyxy, found.boxes.numpy())
    assert np.array_equal(theirs.mask, found.masks.numpy())
    assert np.array_equal(theirs.confidence, found.scores.numpy())
    assert theirs.class_id.tolist() == found.labels.tolist()
    assert theirs["class_name"].tolist() == found.names
    drawn = supervision.MaskAnnotator().annotate(picture(), theirs)
    inside = found.masks.any(dim=0).numpy()
    assert (drawn[~inside] == picture()[~inside]).all()
    assert (drawn[inside] != picture()[inside]).any() == bool(count)
    assert theirs[theirs.confidence > 0.4]["class_name"].tolist() == found.names[:2]


@pytest.mark.parametrize("count", [0, 3])
def test_to_pandas(count: int) -> None:
    pandas = pytest.importorskip("pandas")
    table = make(count).to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert list(table) == ["image", "category_id", "category", "score", "x1", "y1", "x2", "y2", "area"]
    assert len(table) == count
    assert table["category"].tolist() == ["owl", "egg_cup", "owl"][:count]
    assert table["area"].tolist() == make(count).masks.sum(dim=(1, 2)).tolist()
    assert table["x2"].tolist() == make(count).boxes[:, 2].tolist()
    if count:
        assert table.groupby("category")["score"].max().to_dict() == {"egg_cup": 0.5, "owl": 0.75}
        assert make(mask_scores=True).to_pandas()["mask_score"].tolist() == [0.25, 0.5, 0.125]


@pytest.mark.parametrize(
    ("method", "package", "command"),
    [
        ("to_supervision", "supervision", "pip install 'tailseg[supervision]'"),
        ("to_pandas", "pandas", "pip install pandas"),
    ],
)
def test_packages_that_are_missing(method: str, package: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError) as error:
        getattr(make(), method)()
    assert str(error.value) == f"{method}() needs {package}: {command}"


# ---------------------------------------------------------------------------------------------------------
# Pictures


def test_plot_draws_all_objects_on_a_copy() -> None:
    found = make()
    drawn = found.plot()
    assert drawn.shape == (8 * 60, 8 * 80, 3)  # a small picture is enlarged
    assert drawn.dtype == np.uint8
    assert (found.picture == picture()).all()
    plain = make(0).plot()
    for y, x in ((20, 17), (30, 43), (50, 12)):  # inside each mask
        assert (drawn[8 * y, 8 * x] != plain[8 * y, 8 * x]).any()
    assert (drawn[8 * 58 : 8 * 59, 8 * 60 :] == plain[8 * 58 : 8 * 59, 8 * 60 :]).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".bmp", ".tif"])
def test_save_a_picture(suffix: str, tmp_path: Path) -> None:
    make().save(tmp_path / f"drawn{suffix}")
    read = np.asarray(Image.open(tmp_path / f"drawn{suffix}").convert("RGB")).astype(int)
    assert read.shape == (480, 640, 3)
    difference = np.abs(read - make().plot())
    assert difference.max() == 0 if suffix in (".png", ".bmp", ".tif") else difference.mean() < 6


def test_save_json_and_faults(tmp_path: Path) -> None:
    Detections(raw(), CATEGORIES).save(str(tmp_path / "p.json"))
    assert json.loads((tmp_path / "p.json").read_text())["detections"] == make().to_dict()["detections"]
    for name in ("drawn", "drawn.txt", "drawn.pdf"):
        with pytest.raises(UserError, match=r"names no format; use \.png, \.jpg, \.webp or \.json"):
            make().save(tmp_path / name)
    with pytest.raises(UserError, match=r"none/p\.png: could not be written \(No such file or directory\)"):
        make().save(tmp_path / "none" / "p.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.json"]


def shown(html: str) -> np.ndarray:
    """The pixels of the picture in a notebook."""
    content = re.search('src="data:image/png;base64,([^"]*)"', html)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_a_large_picture_is_shrunk_before_it_is_drawn_on() -> None:
    """To half: the object stands where it was, and its outline is as thick as in any picture of that size."""
    large = RawDetections(
        image_hw=(800, 1280),
        boxes=torch.tensor([[200.0, 200, 600, 600]]),
        scores=torch.ones(1),
        labels=torch.zeros(1, dtype=torch.int64),
        masks=torch.ones(1, 28, 28),
    )
    small = dataclasses.replace(large, image_hw=(400, 640), boxes=large.boxes / 2)
    in_large, in_small = (
        shown(Detections(found, CATEGORIES, np.full((*found.image_hw, 3), 90, np.uint8))._repr_html_())
        for found in (large, small)
    )
    assert np.array_equal(in_large, in_small)
    assert (in_small != 90).any()


def test_in_a_notebook() -> None:
    html = make()._repr_html_()
    assert shown(html).shape == (480, 640, 3)
    assert html.count("<tr>") == 4
    assert "<td>egg_cup</td><td>0.50</td><td>40</td><td>10</td><td>80</td><td>50</td>" in html
    assert "3 objects (2 owl, 1 egg_cup) in a/p.jpg, 60 x 80 pixels" in html
    assert "<script" not in html
    assert 'src="data:image/png;base64,' in html
    without = Detections(raw(), CATEGORIES)._repr_html_()
    assert "<img" not in without
    assert "came without their picture" in without
    assert "<table>" not in make(0)._repr_html_()
    evil = Detections(raw(1), [Category(1, "<script>alert(1)</script>", "f", 1, 1)] * 3, picture(), "<b>")
    assert "<script" not in evil._repr_html_()
    assert "<b>" not in evil._repr_html_()


def test_a_notebook_stays_small() -> None:
    """A picture of noise, the worst for PNG, with 300 objects."""
    hw = (1500, 2000)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=generator) * torch.tensor([1900.0, 1400])
    many = RawDetections(
        image_hw=hw,
        boxes=torch.cat([corners, corners + 60], dim=1),
        scores=torch.linspace(1, 0, 300),
        labels=torch.zeros(300, dtype=torch.int64),
        masks=torch.ones(300, 28, 28),
    )
    noise = np.random.default_rng(0).integers(0, 255, (*hw, 3), dtype=np.uint8)
    html = Detections(many, CATEGORIES, noise)._repr_html_()
    assert len(html) < 1_500_000
    assert shown(html).shape == (480, 640, 3)
    assert "and 290 more" in html
    assert html.count("<tr>") == 11
