from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
from export_sets import CATEGORIES, an_object, exported, plans, read_again, written
from hypothesis import given

from tailseg.data.exporters.records import ExportObject
from tailseg.data.importers.voc import read_voc

HW = (10, 20)


@given(plan=plans())
def test_boxes_out_and_in_again(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    trip = written(plan, folder / "in")
    exported("voc", trip, folder / "out")
    again = read_again(read_voc(folder / "out"))
    assert list(again) == ["train", "val"]
    for split, images in trip.data.splits.items():
        assert len(again[split]) == len(images)
        for key, objects in again[split].items():
            image = trip.content[key]
            kept = [item for item in image.objects if not item.crowd]
            assert Counter(row["name"] for row in objects) == Counter(CATEGORIES[item.label].name for item in kept)
            for row, item in zip(objects, kept, strict=True):
                thin = min(item.box[2:]) < 1
                assert np.allclose(row["bbox"], item.box, rtol=0, atol=1 if thin else 0.0011)


def test_the_files(tmp_path):
    square = [np.array([2.0, 1, 12, 1, 12, 6.25, 2, 6.25])]
    objects = [an_object(1, square, HW), an_object(0, square, HW, crowd=True)]
    images = [
        {"name": "sub dir/a b.png", "image_hw": HW, "objects": objects},
        {"name": "c.png", "image_hw": HW, "objects": []},
    ]
    done = exported("voc", written({"train": images, "val": [images[1]]}, tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out/ImageSets/Main/train.txt").read_text() == "sub_dir/a_b\nc\n"
    assert (tmp_path / "out/ImageSets/Main/val.txt").read_text() == "c-2\n"
    assert (tmp_path / "out/JPEGImages/sub_dir/a_b.png").is_file()
    names = [line.removesuffix(":::") for line in (tmp_path / "out/labelmap.txt").read_text().splitlines()]
    assert names == ["# label:color_rgb:parts:actions", "background", *(category.name for category in CATEGORIES)]
    root = ElementTree.parse(tmp_path / "out/Annotations/sub_dir/a_b.xml").getroot()
    assert root.findtext("filename") == "sub_dir/a_b.png"
    assert [root.findtext(f"size/{side}") for side in ("width", "height", "depth")] == ["20", "10", "3"]
    (item,) = root.findall("object")
    assert item.findtext("name") == "a & <b> 'c': #1"
    assert {side.tag: side.text for side in item.find("bndbox")} == {
        "xmin": "3", "ymin": "2", "xmax": "12", "ymax": "6.25",
    }  # fmt: skip
    assert done.objects == {"train": 1, "val": 0}
    assert done.notes == [
        "Pascal VOC has boxes only: the masks are not in it",
        "2 images renamed, since their name was taken or cannot be read everywhere (sub_dir/a_b.png, c-2.png)",
        "1 crowds left out: the format has no mark for them (sub_dir/a_b.png)",
        "images are hard links to the source's files",
    ]


@pytest.mark.parametrize(
    ("box", "sides"),
    [
        ((3.25, 2.0, 0.5, 4.0), {"xmin": "4.25", "xmax": "4.25", "ymin": "3", "ymax": "6"}),
        ((19.75, 9.5, 0.25, 0.5), {"xmin": "20", "xmax": "20", "ymin": "10", "ymax": "10"}),
        ((-4.0, -1.0, 30.0, 3.0), {"xmin": "1", "xmax": "20", "ymin": "1", "ymax": "2"}),
        ((0.0, 0.0, 1.0, 1.0), {"xmin": "1", "xmax": "1", "ymin": "1", "ymax": "1"}),
    ],
)
def test_boxes_lie_in_the_image_and_have_a_pixel(box, sides, tmp_path):
    plan = {"train": [{"name": "a.png", "image_hw": HW, "objects": [ExportObject(0, box, [], 1.0)]}]}
    done = exported("voc", written(plan, tmp_path / "in"), tmp_path / "out")
    root = ElementTree.parse(tmp_path / "out/Annotations/a.xml").getroot()
    assert {side.tag: side.text for side in root.find("object/bndbox")} == sides
    widened = "1 boxes narrower or lower than a pixel widened to one (a.png)"
    assert (widened in done.notes) == (min(box[2:]) < 1)
