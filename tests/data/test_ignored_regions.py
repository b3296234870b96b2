"""Maps of regions to be ignored, against the pixels of the masks themselves."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tailseg.data.annotations.masks import Bitmap, into_grid
from tailseg.data.batches import collate
from tailseg.data.dataset import train_dataset
from tailseg.data.ignored_regions import painted
from tailseg.data.sources import open_splits
from tailseg.recipes.data_section import DataRecipe
from tailseg.structures import Instances

SIDES = (64, 96)  # height and width


def regions_of(*bitmaps: Bitmap) -> Instances:
    laid = [into_grid(bitmap, SIDES, 30) for bitmap in bitmaps]
    return Instances(
        boxes=torch.zeros(len(laid), 4),
        labels=torch.full((len(laid),), -1),
        masks=torch.from_numpy(np.stack([mask for mask, _ in laid])),
        mask_frames=torch.from_numpy(np.stack([frame for _, frame in laid])),
    )


def test_cells_are_those_of_the_pixels():
    """An ellipse and a rectangle that reaches two edges: the cells' shares of covered pixels, rounded."""
    y, x = np.mgrid[0:40, 0:56] + 0.5
    ellipse = Bitmap(x=9, y=6, pixels=(((x - 28) / 28) ** 2 + ((y - 20) / 20) ** 2 <= 1).astype(np.uint8))
    corner = Bitmap(x=76, y=50, pixels=np.ones((14, 20), np.uint8))
    full = np.zeros(SIDES)
    for bitmap in (ellipse, corner):
        h, w = bitmap.pixels.shape
        full[bitmap.y : bitmap.y + h, bitmap.x : bitmap.x + w] += bitmap.pixels
    shares = full.reshape(16, 4, 24, 4).mean((1, 3))
    found = painted(regions_of(ellipse, corner), SIDES).numpy()
    assert found.shape == (16, 24)
    sure = (shares < 0.3) | (shares > 0.7)  # what is cut in half may fall to either side
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(found[sure], shares[sure] > 0.5)


def test_sides_are_rounded_up_and_nothing_is_nothing():
    nothing = regions_of(Bitmap(x=0, y=0, pixels=np.ones((4, 4), np.uint8)))[torch.zeros(1, dtype=torch.bool)]
    found = painted(nothing, (33, 34))
    assert found.shape == (9, 9)
    assert not found.any()


def write_set(folder, **flags: int):
    """Two pictures of 64 x 96: an object in each, and in the first also a region of the right half, with ``flags``."""
    (folder / "images").mkdir()
    for name in ("0.png", "1.png"):
        Image.new("RGB", SIDES[::-1]).save(folder / "images" / name)
    right = [48, 0, 96, 0, 96, 64, 48, 64]
    square = [4, 4, 24, 4, 24, 24, 4, 24]
    objects = [(1, square, {}), (1, right, flags), (2, square, {})]
    content = {
        "images": [{"id": i + 1, "file_name": f"{i}.png", "height": 64, "width": 96} for i in range(2)],
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 1, "segmentation": [points], **more}
            for i, (image, points, more) in enumerate(objects, start=1)
        ],
    }
    for split in ("train", "val"):
        (folder / f"{split}.json").write_text(json.dumps(content))
    annotations = open_splits(folder).train
    assert annotations is not None
    return annotations


@pytest.mark.parametrize("flag", ["iscrowd", "ignore"])
def test_a_sample_has_the_map_and_one_object(tmp_path, flag):
    recipe = DataRecipe(short_edges=(64,), long_edge=96, flip=0.0)
    dataset = train_dataset(write_set(tmp_path, **{flag: 1}), recipe)
    sample = dataset[0]
    assert len(sample.instances) == 1
    assert sample.ignored[:, :12].sum() == 0
    assert sample.ignored[:, 12:].all()
    assert dataset[1].ignored.numel() == 0
    batch = collate([dataset[1], sample], divisor=64)
    assert batch.ignored.shape == (2, 16, 32)
    assert batch.ignored.sum((1, 2)).tolist() == [0, 16 * 12]
    assert collate([dataset[1]]).ignored.shape == (1, 0, 0)


def test_the_map_follows_resizing_cropping_and_mirroring(tmp_path):
    """Twice the size, mirrored, cut to 64: what is ignored is where the picture's right half went."""
    annotations = write_set(tmp_path, iscrowd=1)
    pixels = np.zeros((*SIDES, 3), np.uint8)
    pixels[:, 48:] = 255
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    recipe = DataRecipe(long_edges=(150, 190), crop=64, flip=0.5)
    dataset = train_dataset(annotations, recipe)
    seen = set()
    for seed in range(12):
        sample = dataset[0, seed]
        bright = (sample.image[0] > 127).float().reshape(16, 4, 16, 4).mean((1, 3))
        sure = (bright < 0.3) | (bright > 0.7)
        assert torch.equal(sample.ignored[sure] > 0, bright[sure] > 0.5)
        seen.add(bool(sample.ignored.any()))
    assert seen == {True, False}


def test_objects_alone_have_no_map(tmp_path):
    dataset = train_dataset(write_set(tmp_path), DataRecipe(short_edges=(64,), long_edge=96))
    assert dataset[0].ignored.numel() == 0
    assert len(dataset[0].instances) == 2
