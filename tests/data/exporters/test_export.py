import json
from collections.abc import Iterator

import pytest
from annotation_files import annotation, content
from export_sets import plans, written
from foreign_files import picture
from hypothesis import given, settings

from tailseg.data.exporters.export import WRITERS, annotated_set, export
from tailseg.data.exporters.records import ExportImage, ExportSet
from tailseg.data.importers.convert import convert
from tailseg.data.sources import open_data, splits_there
from tailseg.errors import UserError


def data_folder(root, frequency=None):
    """A data folder in which both splits have images of the same names."""
    for split, numbers in (("train", (1, 2, 3)), ("val", (4, 5))):
        rows = [annotation(number, image) for number, image in zip(numbers, (5, 1, 1), strict=False)]
        data = content(rows)
        for image in data["images"]:
            image["file_name"] = f"{split}/{image['id']}.png"
            picture(root / "images" / image["file_name"], (50, 40))
        if frequency:
            data["categories"] = [row | {"frequency": frequency} for row in data["categories"]]
        (root / f"{split}.json").write_text(json.dumps(data))
    return root


def opened(root):
    splits = open_data(str(root), show=False)
    return {"train": splits.train, "val": splits.val}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_data_folder_survives_export_and_convert(kind, tmp_path):
    before = opened(data_folder(tmp_path / "in"))
    done = []
    exported = export(kind, annotated_set(before), tmp_path / "out", done.append)
    assert done == [1, 2, 3, 4]
    assert exported.images == {"train": 2, "val": 2}
    assert exported.objects == {"train": 3, "val": 2}
    convert(kind, tmp_path / "out", tmp_path / "again")
    after = opened(tmp_path / "again")
    for split, annotations in after.items():
        assert sorted(annotations.areas) == sorted(before[split].areas)
        assert sorted(map(tuple, annotations.boxes_xywh)) == sorted(map(tuple, before[split].boxes_xywh))
        names = {annotations.categories[label].name for label in annotations.labels}
        assert names == {"cat"}
        if kind == "coco":
            assert annotations.annotation_ids.tolist() == before[split].annotation_ids.tolist()
            assert annotations.image_ids.tolist() == before[split].image_ids.tolist()


@pytest.mark.parametrize("kind", WRITERS)
def test_an_exported_set_opens_directly_and_goes_out_again(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    export(kind, annotated_set(opened(data_folder(tmp_path / "in"))), tmp_path / "out")
    assert splits_there(str(tmp_path / "out")) == ("train", "val")
    again = export("coco", annotated_set(opened(tmp_path / "out")), tmp_path / "again")
    assert (again.images, again.objects) == ({"train": 2, "val": 2}, {"train": 3, "val": 2})


@pytest.mark.parametrize(("frequency", "written_as"), [("r", "r"), (None, None)])
def test_only_stated_frequencies_are_exported(frequency, written_as, tmp_path):
    export("coco", annotated_set(opened(data_folder(tmp_path / "in", frequency))), tmp_path / "out")
    data = json.loads((tmp_path / "out/annotations/instances_val.json").read_text())
    assert {row.get("frequency") for row in data["categories"]} == {written_as}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_only_coco_can_say_of_lvis_is_said(kind, tmp_path):
    folder = data_folder(tmp_path / "in")
    data = json.loads((folder / "val.json").read_text())
    data["images"][1]["neg_category_ids"] = [9]
    (folder / "val.json").write_text(json.dumps(data))
    notes = export(kind, annotated_set(opened(folder)), tmp_path / "out").notes
    assert any(note.startswith("LVIS's lists of verified absent classes are not in it") for note in notes) == (
        kind != "coco"
    )


@given(plan=plans())
@settings(max_examples=5)
def test_all_files_lie_in_the_new_folder(plan, tmp_path_factory):
    for kind in WRITERS:
        folder = tmp_path_factory.mktemp(kind)
        trip = written(plan, folder / "in")
        before = sorted(path for path in folder.rglob("*"))
        export(kind, trip.data, folder / "out")
        assert sorted(path for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts[:1]) == before


@pytest.mark.parametrize("kind", WRITERS)
def test_a_fault_leaves_nothing_behind(kind, tmp_path):
    path = picture(tmp_path / "in/a.png")

    def images() -> Iterator[ExportImage]:
        yield ExportImage("a.png", path, (40, 80), [])
        raise UserError("the second image is broken")

    data = annotated_set(opened(data_folder(tmp_path / "data")))
    with pytest.raises(UserError, match="the second image is broken"):
        export(kind, ExportSet(data.where, data.categories, {"": images()}), tmp_path / "out")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["data", "in"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(UserError, match="full is there already and is not empty"):
        export(kind, data, tmp_path / "full")
