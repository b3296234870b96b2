import json
import shutil

import numpy as np
import pytest
from checked_data import HEIGHT, RECIPE, SOUND, SOUND_VAL, WIDTH, finding, polygon_of, report, row, texts, write
from PIL import Image

from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.dataset import train_dataset
from tailseg.data.diagnosis import findings
from tailseg.data.diagnosis.findings import Split, all_findings
from tailseg.data.diagnosis.image_checks import FileFacts, PixelFacts
from tailseg.data.diagnosis.mask_checks import check_masks
from tailseg.data.diagnosis.near_duplicates import thumbnail_of
from tailseg.data.images import ImageHeader
from tailseg.data.importers.coco import read_coco
from tailseg.errors import UserError


def test_a_sound_set_has_nothing_to_remark(tmp_path):
    found = report(write(tmp_path, SOUND, SOUND_VAL))
    assert found.findings == ()
    assert found.usable()
    assert found.splits["train"]["images"] == 4
    assert [(c.name, c.train_images, c.val_images) for c in found.classes] == [("cat", 2, 1), ("owl", 2, 1)]


def test_classes_without_images(tmp_path):
    rows = [*SOUND, row(5, 1, (30, 1, 9, 9), 3)]
    found = report(write(tmp_path, rows, SOUND_VAL, ("cat", "owl", "seal", "hen")))
    assert finding(found, "without training images").examples == ("hen",)
    assert finding(found, "no validation images").examples == ("seal",)
    assert found.usable()


@pytest.mark.parametrize(
    ("changes", "reason", "fix"),
    [
        ({"iscrowd": 1}, "4 crowds", "--crowds-are-objects"),
        ({"ignore": 1}, '4 objects with "ignore"', "take that off"),
        ({"segmentation": []}, "4 annotations without a mask", "`tailseg data convert coco` makes rectangles"),
        ({"segmentation": [[1, 2, 3, 4]]}, "4 annotations with a broken mask", "draw it again"),
        ({"bbox": [0.1, 0.1, 0.5, 0.4]}, "4 objects under a pixel", "in pixels, not as shares"),
        ({"area": 0}, "4 annotations without area", "without the entry 'area'"),
        ({"image_id": 77}, "4 annotations of an image that the file does not list", "add it"),
    ],
)
def test_nothing_to_train_on(tmp_path, changes, reason, fix):
    """Training refuses with the same reason."""
    folder = write(tmp_path, [{**row, **changes} for row in SOUND], SOUND_VAL)
    found = report(folder)
    assert not found.usable()
    assert (found.findings[0].severity, found.findings[0].split, found.findings[0].count) == ("error", "train", 1)
    assert found.findings[0].what.startswith(f"file without an annotation to train on ({reason}")
    assert fix in found.findings[0].fix
    with pytest.raises(UserError) as caught:
        train_dataset(load_annotations(folder / "train.json", folder / "images"), RECIPE.data)
    assert f"train.json: no annotation to train on ({reason}" in str(caught.value)
    assert fix in str(caught.value)


def test_neither_annotations_nor_images_that_are_large_enough(tmp_path):
    assert "(it has no annotations)" in report(write(tmp_path, [], SOUND_VAL)).findings[0].what
    small = report(write(tmp_path, [row(1, 1, (2, 2, 9, 9))], SOUND_VAL, sizes={1: (60, 31)}))
    assert "(images with a side under 32 pixels are left out)" in small.findings[0].what


def test_nothing_to_score_on(tmp_path):
    found = report(write(tmp_path, SOUND, []))
    assert finding(found, "no annotation to score on").examples == (str(tmp_path / "val.json"),)
    assert found.usable()


def test_files_that_are_missing_broken_cut_or_of_another_size(tmp_path):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    images = folder / "images"
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"")
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:-300])
    Image.linear_gradient("L").resize((WIDTH, HEIGHT + 1)).save(images / "4.png")
    found = report(folder)
    assert not found.usable()
    assert "'1.png' is not in" in finding(found, "not there").examples[0]
    broken = finding(found, "cannot be read")
    assert broken.count == 2
    assert "2.png: the file is empty" in broken.examples[0]
    assert "3.png: the image is broken" in broken.examples[1]
    assert finding(found, "another size").examples == ("image 4 (4.png): 60 x 41, stated 60 x 40",)
    assert [f.severity for f in found.findings] == ["error"] * 3


@pytest.mark.parametrize("stated", ["as shown", "as stored"])
def test_camera_orientation(tmp_path, stated):
    size = (HEIGHT, WIDTH) if stated == "as shown" else (WIDTH, HEIGHT)
    folder = write(tmp_path, SOUND, SOUND_VAL, sizes={1: size})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "1.png", exif=exif)
    found = report(folder)
    assert finding(found, "camera orientation").count == 1
    assert ("annotated as stored" in " ".join(texts(found))) == (stated == "as stored")
    assert found.usable()


def test_equal_images_within_and_across_splits(tmp_path):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    shutil.copy(folder / "images/1.png", folder / "images/2.png")
    shutil.copy(folder / "images/3.png", folder / "images/11.png")
    found = report(folder)
    assert finding(found, "in both splits").examples == ("train image 3 (3.png) = val image 11 (11.png)",)
    assert finding(found, "equal content").examples == ("train image 1 (1.png) = train image 2 (2.png)",)


def test_a_file_that_is_listed_twice(tmp_path):
    """Each entry has objects that the other lacks; to keep one of them would lose some."""
    folder = write(tmp_path, [*SOUND, row(5, 9, (30, 20, 10, 10))], SOUND_VAL)
    content = json.loads((folder / "train.json").read_text())
    content["images"].append(content["images"][1] | {"id": 9})
    (folder / "train.json").write_text(json.dumps(content))
    found = report(folder)
    twice = finding(found, "files listed as several images")
    assert (twice.severity, twice.split) == ("warning", "train")
    assert twice.examples == ("train image 2 (2.png) = train image 9 (2.png)",)
    assert "images with equal content" not in texts(found)
    joined = read_coco(folder).parts["train"]
    assert len(joined.images) == 4
    assert sorted(r["bbox"][0] for r in joined.annotations if r["image_id"] == 2) == [10, 30]  # as the fix promises


def test_odd_annotations(tmp_path):
    rows = [
        *SOUND,
        row(5, 1, (30, 20, 10, 10), segmentation=[polygon_of((1, 1, 8, 8))]),  # the mask is elsewhere
        row(6, 2, (40, 20, 10, 10), segmentation=[polygon_of((70, 20, 10, 10))]),  # the mask is outside the image
        row(7, 2, (10.2, 10, 20, 15)),  # repeats annotation 2
        row(8, 2, (10, 10, 20, 15), category=2),  # another class: no repetition
        row(9, 3, (50, 30, 20, 20)),  # reaches beyond
        row(10, 3, (100, 30, 20, 20)),  # outside
        row(11, 3, (1, 1, 5, 5), area=0),
        row(12, 3, (1, 1, 0.5, 5)),
        row(13, 4, (20, 5, 9, 9), iscrowd=1),
    ]
    found = report(write(tmp_path, rows, SOUND_VAL))
    assert finding(found, "do not fit their masks").examples == ("annotation 5",)
    assert finding(found, "without a pixel").examples == ("annotation 6",)
    assert finding(found, "repeat another").examples == ("annotation 7",)
    assert finding(found, "reach beyond").examples == ("annotation 9",)
    for text in ("does not meet", "without area", "under a pixel", "crowds"):
        assert finding(found, text).count == 1
    assert found.usable()


def split_of(folder, name, rows, files=None, names=("cat", "owl")):
    """What was looked at in a split, with sound files unless others are given."""
    write(folder, rows, names=names)
    annotations = load_annotations(folder / "train.json", folder / "images")
    sound = FileFacts(folder / "images" / "1.png", header=HEADER)
    return Split(name, annotations, files or [sound] * len(annotations), check_masks(annotations))


HEADER = ImageHeader("PNG", (HEIGHT, WIDTH), 1)
NO_TINY = {"under_8": 0.0}


def named(found):
    return {(f.severity, f.split, f.what.split(":")[0]): (f.count, f.examples) for f in found}


def test_images_and_annotations_are_named(tmp_path):
    files = [FileFacts(tmp_path / "deep" / "a.jpg"), FileFacts(None, "gone"), *[FileFacts(tmp_path / "b.jpg")] * 2]
    split = split_of(tmp_path, "train", [row(7, 4), row(9, 1)], files)
    assert [split.image(i) for i in range(2)] == ["image 1 (a.jpg)", "image 2"]
    assert split.images(np.array([True, False, False, True])) == ["image 1 (a.jpg)", "image 4 (b.jpg)"]
    assert split.rows(np.array([True, True])) == ["annotation 9", "annotation 7"]  # in the order of their images
    assert split.images(np.zeros(4, np.bool_)) == []


def test_errors_come_first_and_the_most_frequent_of_each(tmp_path):
    files = [FileFacts(None, "gone"), FileFacts(tmp_path / "a", "broken"), FileFacts(tmp_path / "b", "broken")]
    files.append(FileFacts(tmp_path / "c", header=ImageHeader("PNG", (HEIGHT, WIDTH), 3)))
    rows = [row(1, 1), row(2, 1), row(3, 2, iscrowd=1)]  # a third of the objects
    looked = [split_of(tmp_path / "t", "train", rows, files), split_of(tmp_path / "v", "val", SOUND)]
    found = all_findings(looked, NO_TINY, ())
    assert [(f.severity, f.count) for f in found] == [
        ("error", 2),
        ("error", 1),
        *[("warning", 1)] * 3,
        ("note", 3),
        ("note", 1),
    ]
    assert all(f.fix and f.what for f in found)
    assert named(found)["note", "train", "images with a camera orientation (EXIF)"] == (1, ("image 4 (c)",))


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [("stop sign", "Stop_Sign", "stop sign / Stop_Sign"), ("dog", "dog ", "dog / 'dog '")],
)
def test_names_that_are_alike(tmp_path, one, other, shown):
    names = (one, other, "cup", "cups")
    rows = [row(i, i, category=i) for i in range(1, 5)]
    looked = [split_of(tmp_path / name, name, rows, names=names) for name in ("train", "val")]
    found = named(all_findings(looked, NO_TINY, ()))
    assert found == {
        ("warning", "", "categories that differ in spelling only"): (1, (shown,)),
        ("note", "", "category names one letter or a plural apart"): (1, ("cup / cups",)),
    }


@pytest.mark.parametrize(("share", "told"), [(0.0, False), (0.199, False), (0.2, True), (1.0, True)])
def test_tiny_objects_are_told_from_a_fifth_on(tmp_path, share, told):
    looked = [split_of(tmp_path / name, name, SOUND) for name in ("train", "val")]
    found = all_findings(looked, {"under_8": share}, ())
    assert [f.what for f in found] == [
        f"{share:.0%} of the objects have a side under 8 pixels at the recipe's resolution"
    ] * told


def test_classes_of_tiny_objects_are_named(tmp_path):
    looked = [split_of(tmp_path / name, name, SOUND) for name in ("train", "val")]
    found = named(all_findings(looked, NO_TINY, ["nut (median 5.0)"]))
    text = "classes of which most objects have a side under 8 pixels at the recipe's resolution"
    assert found == {("warning", "train", text): (1, ("nut (median 5.0)",))}


def with_pixels(levels, deep=False):
    seen = PixelFacts(levels, deep, np.zeros((16, 18), np.float32))
    return FileFacts(None, header=HEADER, pixels=seen)


def test_images_that_use_little_of_their_range(tmp_path):
    """12 bits in 16 are told from images of nearly one colour; those that were not decoded are told nothing about."""
    files = [with_pixels(31, deep=True), with_pixels(31), with_pixels(0, deep=True), with_pixels(32, deep=True)]
    looked = [split_of(tmp_path / name, name, SOUND, files) for name in ("train", "val")]
    found = named(all_findings([looked[0], split_of(tmp_path / "v", "val", SOUND)], NO_TINY, ()))
    deep = "images of more than 8 bits whose values use less than 1/8 of the range, as 12 bits stored in 16 do"
    assert found == {
        ("warning", "train", deep): (1, ("image 1",)),
        ("note", "train", "images that are nearly of one colour"): (2, ("image 2", "image 3")),
    }


def test_12_bits_in_16_and_uniform_images_of_a_set(tmp_path):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    ramp = np.tile(np.linspace(0, 3800, WIDTH), (HEIGHT, 1))
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "images" / "1.png")
    Image.new("RGB", (WIDTH, HEIGHT), (20, 20, 20)).save(folder / "images" / "2.png")
    found = report(folder)
    assert finding(found, "12 bits stored in 16").examples == ("image 1 (1.png)",)
    assert finding(found, "nearly of one colour").examples == ("image 2 (2.png)",)
    assert len(found.findings) == 2


def test_images_that_are_nearly_the_same_in_both_splits(tmp_path):
    """Scaled and brightened they are named with what they look like, equal ones elsewhere; within a split none is."""
    folder = write(tmp_path, SOUND, SOUND_VAL, sizes={11: (90, 60), 12: (WIDTH, HEIGHT)})
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = (100 + 50 * np.sin(x / 5) + 40 * np.cos(y / 4 + x / 9)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(folder / "images" / "2.png")
    picture.save(folder / "images" / "3.png", compress_level=1)
    picture.resize((90, 60)).point(lambda value: value * 1.2).save(folder / "images" / "11.png")
    shutil.copy(folder / "images" / "3.png", folder / "images" / "12.png")
    found = report(folder)
    near = finding(found, "look nearly like")
    assert near.severity == "warning"
    assert near.what == "validation images that look nearly like a training image"
    assert near.examples in [(f"val image 11 (11.png) ~ train image {i} ({i}.png)",) for i in (2, 3)]
    assert finding(found, "in both splits").examples == ("train image 3 (3.png) = val image 12 (12.png)",)
    assert len(found.findings) == 2


def test_where_not_all_images_are_compared_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "DECODED", 3)
    thumbnail = thumbnail_of(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    seen = FileFacts(tmp_path / "b.png", header=HEADER, pixels=PixelFacts(255, False, thumbnail))
    files = [FileFacts(tmp_path / "a.png", header=HEADER), seen, seen, seen]
    looked = [split_of(tmp_path / name, name, SOUND, files) for name in ("train", "val")]
    (found,) = all_findings(looked, NO_TINY, ())
    assert found.what.endswith("like a training image (only 3 images of each split, chosen at random, were compared)")
    assert found.examples == tuple(f"val image {i} (b.png) ~ train image 2 (b.png)" for i in (2, 3, 4))


def test_images_that_are_too_large(tmp_path):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    path = folder / "images" / "1.png"
    Image.new("L", (8, 8)).save(path, "BMP")
    content = bytearray(path.read_bytes())
    content[18:26] = (20_000).to_bytes(4, "little") * 2  # width and height
    path.write_bytes(content)
    found = report(folder)
    (only,) = found.findings
    assert (only.severity, only.what) == ("error", "images that are too large")
    assert only.fix == "shrink them, or cut them into pieces"
    assert "the limit is 178,956,970" in only.examples[0]


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_tiff_that_pillow_turns_is_sound(tmp_path, orientation):
    """Its stated size is the one as shown: no warning that it is annotated as stored."""
    shown = (HEIGHT, WIDTH) if orientation == 6 else (WIDTH, HEIGHT)
    folder = write(tmp_path, SOUND, SOUND_VAL, sizes={1: shown})
    noise = np.random.default_rng(9).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / "1.png", "TIFF", tiffinfo={0x0112: orientation})
    assert report(folder).findings == ()


def test_a_file_three_times_is_one_finding(tmp_path):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    for name in ("2", "3", "12"):
        shutil.copy(folder / "images/1.png", folder / f"images/{name}.png")
    found = report(folder)
    across = finding(found, "in both splits")
    assert across.examples == ("train image 1 (1.png) = val image 12 (12.png) and 2 more",)
    assert "images with equal content" not in texts(found)


def test_small_images_are_left_out_of_training_only(tmp_path):
    sizes = {1: (60, 31), 2: (60, 32), 11: (20, 20)}
    rows, val = (
        [row(i, i, (1, 1, 9, 9), i % 2 + 1) for i in range(1, 5)],
        [row(i, i + 10, (1, 1, 9, 9), i) for i in (1, 2)],
    )
    found = report(write(tmp_path, rows, val, sizes=sizes))
    small = finding(found, "images with a side under 32 pixels: left out of training")
    assert (small.severity, small.split, small.examples) == ("note", "train", ("image 1 (1.png)",))


def test_images_without_objects_in_each_split(tmp_path):
    found = report(write(tmp_path, SOUND[1:], SOUND_VAL[1:]))
    assert finding(found, "images without objects: left out of training", "train").count == 1
    assert finding(found, "images without objects: used as negatives", "val").count == 1


def crowds(*numbers):
    return [row(i, i % 4 + 1, category=1 + (i > 20), iscrowd=int(i in numbers)) for i in range(1, 31)]


@pytest.mark.parametrize(
    ("rows", "severity", "examples"),
    [
        (crowds(), None, ()),
        (crowds(1, 22), "note", ()),  # under a tenth
        (crowds(1, 2, 22), "warning", ()),
        (crowds(*range(21, 31)), "warning", ("all of class owl",)),
        ([*crowds(), row(31, 1, category=3, iscrowd=1)], "warning", ("all of class hen",)),
    ],
)
def test_many_crowds_are_single_objects_that_a_tool_wrote_so(tmp_path, rows, severity, examples):
    """CVAT writes every mask drawn with the brush with iscrowd 1."""
    found = report(write(tmp_path, rows, SOUND_VAL, ("cat", "owl", "hen")))
    about = [f for f in found.findings if f.what.startswith("crowds: ")]
    assert [f.severity for f in about] == ([severity] if severity else [])
    for finding_ in about:
        assert finding_.examples == examples
        assert ("--crowds-are-objects" in finding_.fix) == (severity == "warning")


def test_all_faults_of_a_file_are_listed_at_once(tmp_path):
    """Training stops at the first; here they are counted, with the first places."""
    rows = [*SOUND, row(5, 1, category=9), row(6, 2, category=9), row(7, 77), row(8, 1, segmentation=[])]
    rows += [row(9, 1, (30, 1, 9, 9), segmentation=[[1, 2, 3]]), row(10, 2, (30, 1, 9, 9), area=0)]
    found = report(write(tmp_path, rows, SOUND_VAL))
    assert not found.usable()
    listed = {f.what.split(":")[0]: (f.severity, f.count, f.examples[0]) for f in found.findings}
    assert listed == {
        "annotations of a category that the file does not list": (
            "error",
            2,
            "annotation 5: there is no category with the category_id 9",
        ),
        "annotations of an image that the file does not list": (
            "warning",
            1,
            "annotation 7: there is no image with the image_id 77",
        ),
        "annotations without a mask": ("warning", 1, "annotation 8: segmentation is []"),
        "annotations with a broken mask or of another size than the image": (
            "warning",
            1,
            "annotation 9: a polygon has 3 coordinates, not three points or more of an x and a y each",
        ),
        "annotations without area": ("warning", 1, "annotation 10"),
    }
