import shutil

import pytest
from checked_data import HEIGHT, SOUND, SOUND_VAL, WIDTH, checkup, finding, polygon_of, row, texts, write
from PIL import Image


def test_a_sound_set_has_nothing_to_remark(tmp_path):
    found = checkup(write(tmp_path, SOUND, SOUND_VAL))
    assert found.findings == ()
    assert found.usable()
    assert found.splits["train"]["images"] == 4
    assert [(c.name, c.train_images, c.val_images) for c in found.classes] == [("cat", 2, 1), ("owl", 2, 1)]


def test_classes_without_images(tmp_path):
    rows = [*SOUND, row(5, 1, (30, 1, 9, 9), 3)]
    found = checkup(write(tmp_path, rows, SOUND_VAL, ("cat", "owl", "seal", "hen")))
    assert finding(found, "without training images").examples == ("hen",)
    assert finding(found, "no validation images").examples == ("seal",)
    assert found.usable()


def test_nothing_to_train_on(tmp_path):
    found = checkup(write(tmp_path, [], SOUND_VAL))
    assert not found.usable()
    assert found.findings[0].what == "no annotation to train on"


def test_files_that_are_missing_broken_cut_or_of_another_size(tmp_path):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    images = folder / "images"
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"")
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:-300])
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(images / "4.png")
    found = checkup(folder)
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
    found = checkup(folder)
    assert finding(found, "camera orientation").count == 1
    assert ("annotated as stored" in " ".join(texts(found))) == (stated == "as stored")
    assert found.usable()


def test_equal_images_within_and_across_splits(tmp_path):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    shutil.copy(folder / "images/1.png", folder / "images/2.png")
    shutil.copy(folder / "images/3.png", folder / "images/11.png")
    found = checkup(folder)
    assert finding(found, "in both splits").examples == ("train image 3 (3.png) = val image 11 (11.png)",)
    assert finding(found, "equal content").examples == ("train image 1 (1.png) = train image 2 (2.png)",)


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
    found = checkup(write(tmp_path, rows, SOUND_VAL))
    assert finding(found, "do not fit their masks").examples == ("annotation 5",)
    assert finding(found, "without a pixel").examples == ("annotation 6",)
    assert finding(found, "repeat another").examples == ("annotation 7",)
    assert finding(found, "reach beyond").examples == ("annotation 9",)
    for text in ("does not meet", "without area", "under a pixel", "crowds"):
        assert finding(found, text).count == 1
    assert found.usable()
