import json

import numpy as np
import pytest
import torch
from PIL import Image

from tailseg.data.annotations import load_annotations, open_data
from tailseg.data.dataset import DetectionDataset, read_image
from tailseg.data.transforms import Compose, HorizontalFlip, ResizeShortestEdge
from tailseg.errors import UserError

TRAIN = Compose((ResizeShortestEdge((20, 30), 60), HorizontalFlip(0.5)))
KEEP = Compose(())


def write_set(folder, sizes=((40, 60), (60, 40), (50, 50), (31, 80)), empty=(2,), **changes):
    """A data set of plain pictures, each with one square of label 1 unless it is ``empty``."""
    (folder / "images").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": 10 + i, "height": height, "width": width, "file_name": f"{i}.png"} | changes)
        if i not in empty:
            square = [5, 6, 25, 6, 25, 26, 5, 26]
            annotations.append(
                {
                    "id": i + 1,
                    "image_id": 10 + i,
                    "category_id": 7,
                    "bbox": [5, 6, 20, 20],
                    "area": 400,
                    "iscrowd": 0,
                }
                | {"segmentation": [square]}
            )
    categories = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    return load_annotations(folder / "train.json", folder / "images")


def test_training_leaves_out_empty_and_small_images(tmp_path):
    annotations = write_set(tmp_path)
    dataset = DetectionDataset(annotations, KEEP, drop_empty=True)
    assert dataset.image_indices.tolist() == [0, 1]
    assert dataset.aspect_groups.tolist() == [False, True]
    everything = DetectionDataset(annotations, KEEP, drop_empty=False)
    assert everything.image_indices.tolist() == [0, 1, 2, 3]
    assert everything.aspect_groups.tolist() == [False, True, False, False]  # a square counts as w >= h


def test_sample_is_what_the_file_says(tmp_path):
    dataset = DetectionDataset(write_set(tmp_path), KEEP, drop_empty=False, mask_grid=30)
    sample = dataset[0]
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0), read_image(tmp_path / "images" / "0.png"))
    assert (sample.image_id, sample.original_hw) == (10, (40, 60))
    assert sample.instances.labels.tolist() == [1]
    assert sample.instances.boxes.tolist() == [[5, 6, 25, 26]]
    assert sample.instances.mask_frames.tolist() == [[4, 5, 36, 37]]
    assert int((sample.instances.masks == 255).sum()) == 400
    empty = dataset[2]
    assert len(empty.instances) == 0
    assert empty.instances.masks.shape == (0, 32, 32)


def test_all_chance_comes_from_the_seed(tmp_path):
    dataset = DetectionDataset(write_set(tmp_path), TRAIN, drop_empty=True)
    first = [dataset[0, seed] for seed in range(12)]
    again = [dataset[0, seed] for seed in reversed(range(12))][::-1]
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert {tuple(s.image.shape[1:]) for s in first} == {(20, 30), (30, 45)}
    assert len({round(float(s.instances.boxes[0, 0] / s.image.shape[2]), 2) for s in first}) == 2  # flipped or not


def test_nothing_left_to_train_on_is_an_error(tmp_path):
    annotations = write_set(tmp_path, sizes=((20, 20),), empty=())
    with pytest.raises(UserError, match=r"train\.json: no image has an object to train on"):
        DetectionDataset(annotations, KEEP, drop_empty=True)


def test_another_size_than_stated_is_an_error(tmp_path):
    annotations = write_set(tmp_path, sizes=((40, 60),), empty=(), height=41)
    message = r"0\.png: the image is 60 x 40 pixels but .*train\.json \(image 10\) says 60 x 41; "
    with pytest.raises(UserError, match=message):
        DetectionDataset(annotations, KEEP, drop_empty=True)[0]


@pytest.mark.parametrize("stated", [(40, 60), (60, 40)])
def test_exif_orientation_is_applied_unless_the_file_s_sizes_say_otherwise(tmp_path, stated):
    annotations = write_set(tmp_path, sizes=(stated,), empty=())
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[:10] = 255  # the upper quarter of the stored pixels
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a right angle
    Image.fromarray(stored).save(tmp_path / "images" / "0.png", exif=exif)
    image = DetectionDataset(annotations, KEEP, drop_empty=True)[0].image
    assert tuple(image.shape[1:]) == stated
    bright = image[0, :10] if stated == (40, 60) else image[0, :, 30:]
    assert bright.min() == 255
    assert int((image[0] == 255).sum()) == 600


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    ramp = np.tile(np.arange(0, 250, 10, dtype=np.uint8), (4, 1))
    rgb = np.stack([ramp, 255 - ramp, ramp // 2], axis=2)
    pictures = {
        "rgb.png": Image.fromarray(rgb),
        "grey.png": Image.fromarray(ramp),
        "grey16.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "palette.png": Image.fromarray(rgb).quantize(64),
        "cmyk.tif": Image.fromarray(rgb).convert("CMYK"),
        "bits.png": Image.fromarray(ramp > 100),
        "alpha.png": Image.fromarray(np.dstack([rgb, np.where(ramp > 100, 255, 0).astype(np.uint8)])),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    read = {name: read_image(tmp_path / name).astype(int) for name in pictures}
    assert all(image.shape == (4, 25, 3) and image.max() <= 255 for image in read.values())
    np.testing.assert_array_equal(read["rgb.png"], rgb)
    np.testing.assert_array_equal(read["grey.png"], np.repeat(ramp[:, :, None], 3, 2))
    np.testing.assert_array_equal(read["grey16.png"], read["grey.png"])
    assert np.abs(read["palette.png"] - rgb).max() < 20
    assert np.abs(read["cmyk.tif"] - rgb).max() <= 1
    np.testing.assert_array_equal(read["bits.png"][:, :, 0], np.where(ramp > 100, 255, 0))
    np.testing.assert_array_equal(read["alpha.png"], np.where(ramp[:, :, None] > 100, rgb, 255))


def test_unreadable_images_are_named(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(good)
    cases = {
        "cut.jpg": (good.read_bytes()[:3000], "broken or cut off"),
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"hello", "not an image"),
    }
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "x.png")
    png = (tmp_path / "x.png").read_bytes()
    cases["broken.png"] = (png[:43] + b"\xff\xff\xff\xff" + png[47:], "broken or cut off")
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*{message}.*; ") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such image"):
        read_image(tmp_path / "nowhere.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="floating point"):
        read_image(tmp_path / "float.tif")


def test_photographs(shared):
    train = open_data(shared / "data" / "coco128-lvis").train
    dataset = DetectionDataset(train, TRAIN, drop_empty=True)
    assert len(dataset) == 101  # 103, of which 2 are without annotation
    sample = dataset[5, 1]
    assert len(sample.instances) == len(train.rows(int(dataset.image_indices[5]))) > 0
    height, width = sample.image.shape[1:]
    boxes = sample.instances.boxes
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= width
    assert boxes[:, 3].max() <= height
