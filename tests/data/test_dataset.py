import json
from dataclasses import fields
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from tailseg.data import dataset as dataset_module
from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.copy_paste import CopyPaste
from tailseg.data.dataset import DetectionDataset, train_dataset, trained_images
from tailseg.data.images import read_image
from tailseg.data.instaboost import InstaBoost
from tailseg.data.loading import train_loader
from tailseg.data.sampling import TrainSampler
from tailseg.data.sources import DataSplits, open_splits
from tailseg.data.transforms import Compose, HorizontalFlip, ResizeShortestEdge, boxes_from_masks
from tailseg.errors import UserError
from tailseg.recipes.data_section import DataRecipe
from tailseg.structures import Instances

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


def test_images_without_annotations_can_be_kept(tmp_path):
    annotations = write_set(tmp_path)
    kept = train_dataset(annotations, DataRecipe(keep_empty=True))
    assert kept.image_indices.tolist() == [0, 1, 2]  # not the last, with a side of 31 pixels
    assert len(kept[2, 0].instances) == 0
    assert trained_images(annotations).tolist() == [0, 1]
    (tmp_path / "crowds").mkdir()
    crowds = write_set(tmp_path / "crowds", empty=(1, 2, 3))
    rows = json.loads((tmp_path / "crowds" / "train.json").read_text())
    rows["annotations"].append(annotated(11, 7, iscrowd=1) | {"id": 50})
    (tmp_path / "crowds" / "train.json").write_text(json.dumps(rows))
    crowds = load_annotations(tmp_path / "crowds" / "train.json", tmp_path / "crowds" / "images")
    assert trained_images(crowds, keep_empty=True).tolist() == [0, 2]  # a crowd alone is not empty
    with pytest.raises(UserError, match="no annotation to train on"):
        train_dataset(write_set(tmp_path, empty=(0, 1, 2, 3)), DataRecipe(keep_empty=True))


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
    with pytest.raises(UserError, match=r"train\.json: no annotation to train on \(images with a side under 32"):
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


REDUCING = Compose((ResizeShortestEdge((25, 30), 60, from_reduced=True), HorizontalFlip(0.5)))
WHOLE = Compose((ResizeShortestEdge((25, 30), 60), HorizontalFlip(0.5)))


def photograph(height, width):
    """A smooth picture without symmetry; its upper left corner is the darkest part of red."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    red, green, blue = 40 + 120 * y + 60 * x, 200 - 150 * x, 120 + 80 * np.sin(6 * x + 3 * y)
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


@pytest.mark.parametrize("turned", [None, 3, 6])
@pytest.mark.parametrize("size", [(160, 240), (240, 160), (200, 360)])
def test_a_reduced_jpeg_gives_the_same_sample(tmp_path, monkeypatch, size, turned):
    """Down to the bit but for the pixels, which are averaged; turned by the camera or not."""
    annotations = write_set(tmp_path, sizes=(size,), empty=(), file_name="0.jpg")
    upright = Image.fromarray(photograph(*size))
    turn = {None: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[turned]
    exif = Image.Exif()
    exif[0x0112] = turned or 1
    stored = upright if turn is None else upright.transpose(turn)
    stored.save(tmp_path / "images" / "0.jpg", quality=95, subsampling=0, exif=exif)
    reductions = []
    decode = dataset_module.decode
    monkeypatch.setattr(dataset_module, "decode", lambda *args: reductions.append(decode(*args)[1]) or decode(*args))
    for seed in range(6):
        reduced = DetectionDataset(annotations, REDUCING, drop_empty=True)[0, seed]
        whole = DetectionDataset(annotations, WHOLE, drop_empty=True)[0, seed]
        for field in fields(Instances):
            assert torch.equal(getattr(reduced.instances, field.name), getattr(whole.instances, field.name)), field
        assert reduced.original_hw == whole.original_hw == size
        assert reduced.image.shape == whole.image.shape
        difference = (reduced.image.int() - whole.image.int()).abs().double()
        assert difference.mean() < 2  # a mirrored or shifted picture would be off by tens
    assert set(reductions[1::2]) == {1}
    assert set(reductions[::2]) == ({4, 8} if size == (200, 360) else {4})


def test_sides_that_do_not_divide_and_other_formats_are_read_whole(tmp_path, monkeypatch):
    annotations = write_set(tmp_path, sizes=((161, 240), (160, 240)), empty=())
    for i, name in enumerate(("0.png", "1.png")):
        format_ = "JPEG" if i == 0 else "PNG"
        Image.fromarray(photograph(161 - i, 240)).save(tmp_path / "images" / name, format_)
    reduced, whole = (DetectionDataset(annotations, t, drop_empty=True) for t in (REDUCING, WHOLE))
    for i in range(2):
        assert torch.equal(reduced[i, 3].image, whole[i, 3].image)


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_an_image_of_just_the_reduced_size_is_still_an_error(tmp_path, format_):
    annotations = write_set(tmp_path, sizes=((160, 240),), empty=())
    for sides in ((80, 120), (40, 60)):
        Image.fromarray(photograph(*sides)).save(tmp_path / "images" / "0.png", format_)
        with pytest.raises(UserError, match=f"the image is {sides[1]} x {sides[0]} pixels but .* says 240 x 160"):
            DetectionDataset(annotations, REDUCING, drop_empty=True)[0]


def test_photographs(shared):
    train = open_splits(shared / "data" / "coco128-lvis").train
    dataset = DetectionDataset(train, TRAIN, drop_empty=True)
    assert len(dataset) == 101  # 103, of which 2 are without annotation
    sample = dataset[5, 1]
    assert len(sample.instances) == len(train.rows(int(dataset.image_indices[5]))) > 0
    height, width = sample.image.shape[1:]
    boxes = sample.instances.boxes
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= width
    assert boxes[:, 3].max() <= height


def annotated(image_id: int, category_id: int, iscrowd: int = 0) -> dict:
    square = [5, 6, 25, 6, 25, 26, 5, 26]
    shape = {"bbox": [5, 6, 20, 20], "area": 400, "segmentation": [square]}
    return {"image_id": image_id, "category_id": category_id, "iscrowd": iscrowd} | shape


def write_searched(folder, negatives: list[list[int] | None], annotations: list[dict]) -> DetectionDataset:
    """A set of pictures of 40 x 60 pixels of categories 40, 7, 3 and 90 in this order, each with its negatives."""
    (folder / "images").mkdir(exist_ok=True)
    images = []
    for i, ids in enumerate(negatives):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        image = {"id": i, "height": 40, "width": 60, "file_name": f"{i}.png"}
        images.append(image if ids is None else image | {"neg_category_ids": ids})
    content = {
        "images": images,
        "annotations": [row | {"id": i} for i, row in enumerate(annotations, start=1)],
        "categories": [{"id": i, "name": f"class{i}"} for i in (40, 7, 3, 90)],
    }
    (folder / "searched.json").write_text(json.dumps(content))
    return DetectionDataset(load_annotations(folder / "searched.json", folder / "images"), KEEP, drop_empty=False)


def absent_ids(dataset: DetectionDataset, index: int) -> set[int]:
    absent = dataset[index].absent
    assert absent.dtype == torch.bool
    ids = dataset.annotations.label_to_category_id.tolist()
    assert len(absent) == len(ids)
    return {ids[label] for label in absent.nonzero().flatten().tolist()}


def test_absent_is_what_an_lvis_file_says_was_looked_for_in_vain(tmp_path):
    """Not what is annotated, nor what nobody looked for; an id that is no category of the file counts for nothing."""
    dataset = write_searched(
        tmp_path,
        [[3, 90], [], [7, 12345], [40]],
        [annotated(0, 7), annotated(1, 40), annotated(2, 3), annotated(2, 40)],
    )
    assert [absent_ids(dataset, i) for i in range(4)] == [{3, 90}, set(), {7}, {40}]
    ids = dataset.annotations.label_to_category_id
    assert [{int(ids[label]) for label in dataset[i].instances.labels} for i in range(4)] == [{7}, {40}, {3, 40}, set()]


@pytest.mark.parametrize("empty", [None, []])
def test_in_a_coco_file_every_class_without_an_object_is_absent(tmp_path, empty):
    """A crowd shows that its class is there, though nobody trains on it."""
    dataset = write_searched(
        tmp_path, [empty] * 3, [annotated(0, 7), annotated(0, 90, iscrowd=1), annotated(2, 3), annotated(2, 3)]
    )
    assert [absent_ids(dataset, i) for i in range(3)] == [{40, 3}, {40, 7, 3, 90}, {40, 7, 90}]
    assert [len(dataset[i].instances) for i in range(3)] == [1, 0, 2]


def test_a_list_in_one_image_speaks_for_the_file(tmp_path):
    """An image of an LVIS file whose list is empty or left out was searched for nothing."""
    dataset = write_searched(tmp_path, [None, [], [3]], [annotated(0, 7), annotated(1, 7)])
    assert [absent_ids(dataset, i) for i in range(3)] == [set(), set(), {3}]


def test_absent_classes_of_photographs(shared):
    """Against the lists of the file itself, by name."""
    path = shared / "data" / "lvis-val-100" / "lvis_val_100.json"
    annotations = load_annotations(path, shared)
    content = json.loads(path.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    seen = 0
    for position, image_id in enumerate(annotations.image_ids.tolist()):
        image = next(image for image in content["images"] if image["id"] == image_id)
        expected = {names[category_id] for category_id in image["neg_category_ids"]}
        ours = {annotations.categories[label].name for label in np.flatnonzero(annotations.absent(position))}
        assert ours == expected
        assert not annotations.absent(position)[annotations.labels[annotations.rows(position)]].any()
        seen += len(ours)
    assert seen > 100


def assert_same_sample(one, other):
    assert torch.equal(one.image, other.image)
    for field in fields(Instances):
        assert torch.equal(getattr(one.instances, field.name), getattr(other.instances, field.name)), field.name


def write_photograph(folder):
    """A smooth picture of 160 x 240 pixels, of which `REDUCING` reads a quarter, with a rectangle amidst of it."""
    annotations = write_set(folder, sizes=((160, 240),), empty=(), file_name="0.jpg")
    Image.fromarray(photograph(160, 240)).save(folder / "images" / "0.jpg", quality=95)
    content = json.loads(annotations.path.read_text())
    shape = {"bbox": [60, 50, 80, 60], "area": 4800, "segmentation": [[60, 50, 140, 50, 140, 110, 60, 110]]}
    content["annotations"][0] |= shape
    annotations.path.write_text(json.dumps(content))
    return load_annotations(annotations.path, annotations.images_dir)


def test_instaboost_that_never_happens_changes_nothing(tmp_path):
    annotations = write_photograph(tmp_path)
    plain = DetectionDataset(annotations, REDUCING, drop_empty=True)
    never = DetectionDataset(annotations, REDUCING, drop_empty=True, instaboost=InstaBoost(0.0))
    for seed in range(5):
        assert_same_sample(plain[0, seed], never[0, seed])


def test_instaboost_comes_before_the_transform_and_takes_no_chance_from_it(tmp_path, monkeypatch):
    """Of the pixels of the whole image, which is else decoded at a quarter of its size."""
    annotations = write_photograph(tmp_path)
    boost = InstaBoost(0.5)
    plain = DetectionDataset(annotations, REDUCING, drop_empty=True)
    both = DetectionDataset(annotations, REDUCING, drop_empty=True, instaboost=boost)
    boosted = DetectionDataset(annotations, KEEP, drop_empty=True, instaboost=boost)
    reductions = []
    decode = dataset_module.decode
    monkeypatch.setattr(dataset_module, "decode", lambda *args: reductions.append(decode(*args)[1]) or decode(*args))
    changed = []
    for seed in range(20):
        sample, untouched = both[0, seed], plain[0, seed]
        assert sample.original_hw == (160, 240)
        if boost.chance(seed) is None:
            assert_same_sample(sample, untouched)
            assert reductions[-2:] == [4, 4]
            continue
        assert reductions[-2:] == [1, 4]
        whole = boosted[0, seed]
        image, instances = REDUCING(whole.image.permute(1, 2, 0).numpy(), whole.instances, np.random.default_rng(seed))
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0), image)
        for field in fields(Instances):
            assert torch.equal(getattr(sample.instances, field.name), getattr(instances, field.name)), field.name
        assert sample.image.shape == untouched.image.shape
        changed.append(not torch.equal(sample.instances.boxes, untouched.instances.boxes))
    assert 2 < len(changed) < 18
    assert all(changed)


@pytest.mark.parametrize("heatmap", [False, True])
def test_jittered_objects_have_the_boxes_of_their_masks(tmp_path, heatmap):
    annotations = write_photograph(tmp_path)
    dataset = DetectionDataset(annotations, KEEP, drop_empty=True, instaboost=InstaBoost(1.0, heatmap))
    places = set()
    for seed in range(10):
        sample = dataset[0, seed]
        instances = sample.instances
        assert sample.image.shape == (3, 160, 240)
        assert instances.labels.tolist() == [1]
        tight = boxes_from_masks(instances.masks, instances.mask_frames, (0, 0, 240, 160))
        torch.testing.assert_close(tight, instances.boxes)
        width, height = (instances.boxes[0, 2:] - instances.boxes[0, :2]).tolist()
        assert 0.8 * 80 - 1 <= width <= 1.2 * 80 + 3  # rotation by a degree makes a box of it that is larger by
        assert 0.8 * 60 - 1 <= height <= 1.2 * 60 + 3  # a pixel or two
        places.add(tuple(instances.boxes[0].tolist()))
    assert len(places) > 8


def test_jitter_does_not_depend_on_workers_or_order(tmp_path):
    annotations = write_set(tmp_path, sizes=((40, 60), (60, 40), (50, 50), (44, 80)), empty=())
    boost = InstaBoost(0.6, heatmap=True)
    dataset = DetectionDataset(annotations, TRAIN, drop_empty=True, mask_grid=16, instaboost=boost)
    sampler = TrainSampler(dataset.aspect_groups, 1, seed=4)
    plain = list(islice(train_loader(dataset, sampler), 8))
    parallel = list(islice(train_loader(dataset, sampler, workers=2), 8))
    for one, other in zip(plain, parallel, strict=True):
        for field in fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name
    backwards = [dataset[1, seed] for seed in reversed(range(6))][::-1]
    for seed, sample in enumerate(backwards):
        assert_same_sample(sample, dataset[1, seed])


def test_images_without_objects_or_with_crowds_only_are_not_jittered(tmp_path):
    (tmp_path / "boosted").mkdir()
    (tmp_path / "plain").mkdir()
    rows = [annotated(1, 7, iscrowd=1), annotated(2, 7), annotated(2, 3, iscrowd=1)]
    plain = write_searched(tmp_path / "plain", [None] * 3, rows)
    boosted = write_searched(tmp_path / "boosted", [None] * 3, rows)
    boosted.instaboost = InstaBoost(1.0)
    for i in (0, 1):
        assert len(boosted[i].instances) == 0
        assert_same_sample(boosted[i], plain[i])
    assert [len(boosted[2, seed].instances) for seed in range(5)] == [1] * 5  # the crowd itself is not moved


def test_the_recipe_says_how_often(tmp_path):
    data = DataSplits("test", write_set(tmp_path), None)
    assert train_dataset(data.train, DataRecipe()).instaboost is None
    assert train_dataset(data.train, DataRecipe(instaboost=0.5)).instaboost == InstaBoost(0.5, heatmap=False)
    guided = train_dataset(data.train, DataRecipe(instaboost=0.25, instaboost_heatmap=True)).instaboost
    assert guided == InstaBoost(0.25, heatmap=True)


def test_jittered_photographs(shared):
    train = open_splits(shared / "data" / "coco128-lvis").train
    plain = DetectionDataset(train, KEEP, drop_empty=True)
    boosted = DetectionDataset(train, KEEP, drop_empty=True, instaboost=InstaBoost(1.0))
    for index in (3, 11, 30, 60):
        before, after = plain[index, 5], boosted[index, 5]
        assert 0 < len(after.instances) <= len(before.instances)
        assert set(after.instances.labels.tolist()) <= set(before.instances.labels.tolist())
        assert not torch.equal(after.image, before.image)
        assert after.image.shape == before.image.shape


@pytest.mark.parametrize("boost", [None, InstaBoost(1.0, heatmap=False)])
def test_no_mask_is_made_before_the_image_has_the_stated_size(tmp_path, monkeypatch, boost):
    write_set(tmp_path, sizes=((40, 60),), height=13_000, width=13_000)
    monkeypatch.setattr(dataset_module, "bitmap_of", lambda *_: pytest.fail("a mask is made"))
    dataset = train_set(tmp_path, boost)
    with pytest.raises(UserError, match=r"0\.png: the image is 60 x 40 pixels but .* says 13000 x 13000"):
        dataset[0]


def train_set(folder, boost):
    annotations = load_annotations(folder / "train.json", folder / "images")
    return DetectionDataset(annotations, KEEP, drop_empty=True, instaboost=boost)


# Copy-Paste


def pasting(annotations, **recipe):
    """Every object of other images equally likely, in every image."""
    settings = DataRecipe(**{"copy_paste": 1.0, "copy_paste_draw": "uniform", "flip": 0} | recipe)
    return CopyPaste.of(annotations, trained_images(annotations), settings)


def test_pasted_pixels_boxes_and_masks_agree(tmp_path):
    """A black image among white ones: what is more than half white is what the masks of pasted objects cover."""
    annotations = write_set(tmp_path, sizes=((60, 60),) * 3, empty=())
    for i, colour in enumerate((0, 255, 255)):
        Image.fromarray(np.full((60, 60, 3), colour, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    copy_paste = pasting(annotations)
    dataset = DetectionDataset(annotations, KEEP, drop_empty=True, mask_grid=60, copy_paste=copy_paste)
    pasted = exact = 0
    for seed in range(20):
        sample = dataset[0, seed]
        instances = sample.instances
        foreign = (sample.image[0] >= 128).numpy()
        covered = np.zeros((60, 60), bool)
        for box, mask, frame in zip(instances.boxes, instances.masks, instances.mask_frames, strict=True):
            own = np.zeros((60, 60), bool)
            x0, y0, x1, y1 = (int(v) for v in box)
            left, top = int(frame[0]), int(frame[1])
            own[y0:y1, x0:x1] = mask[y0 - top : y1 - top, x0 - left : x1 - left].numpy() >= 128
            assert own.any()
            if foreign[own].all():
                covered |= own
                pasted += 1
            else:
                assert not foreign[own].any()  # an occluded object keeps no pixel of what covers it
        assert foreign[covered].all()
        others = [one for one in copy_paste.draw(np.zeros(2, bool), copy_paste.chance(seed)) if one.row != 0]
        if len(others) == 1:  # of several, one may be dropped with a few pixels left, and soft edges add up
            np.testing.assert_array_equal(covered, foreign)
            exact += 1
        assert sample.original_hw == (60, 60)
    assert pasted >= 20
    assert exact >= 4


def test_pasting_takes_no_chance_from_the_transform(tmp_path, monkeypatch):
    annotations = write_set(tmp_path, sizes=((40, 60), (60, 40), (50, 50)), empty=())
    plain = DetectionDataset(annotations, TRAIN, drop_empty=True)
    half = pasting(annotations, copy_paste=0.5)
    both = DetectionDataset(annotations, TRAIN, drop_empty=True, copy_paste=half)
    touched = [half.chance(seed) is not None for seed in range(20)]
    assert 4 < sum(touched) < 16
    for seed in range(20):
        one, other = plain[0, seed], both[0, seed]
        assert one.image.shape == other.image.shape
        if not touched[seed]:
            assert_same_sample(one, other)


def test_pasting_does_not_depend_on_workers_or_order(tmp_path):
    annotations = write_set(tmp_path, sizes=((40, 60), (60, 40), (50, 50), (44, 80)), empty=())
    boost = InstaBoost(0.6)
    dataset = DetectionDataset(
        annotations, TRAIN, drop_empty=True, mask_grid=16, instaboost=boost, copy_paste=pasting(annotations)
    )
    sampler = TrainSampler(dataset.aspect_groups, 1, seed=4)
    plain = list(islice(train_loader(dataset, sampler), 8))
    parallel = list(islice(train_loader(dataset, sampler, workers=2), 8))
    for one, other in zip(plain, parallel, strict=True):
        for field in fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name
    backwards = [dataset[1, seed] for seed in reversed(range(6))][::-1]
    for seed, sample in enumerate(backwards):
        assert_same_sample(sample, dataset[1, seed])


def test_objects_come_from_other_images_only(tmp_path, monkeypatch):
    annotations = write_set(tmp_path, sizes=((40, 60), (60, 40), (50, 50)), empty=())
    dataset = DetectionDataset(annotations, KEEP, drop_empty=True, copy_paste=pasting(annotations))
    read = []
    image = dataset._image
    monkeypatch.setattr(dataset, "_image", lambda position, k: read.append(position) or image(position, k))
    for seed in range(20):
        before = len(read)
        dataset[1, seed]
        assert read[before] == 1
        assert 1 not in read[before + 1 :]
    assert set(read) == {0, 1, 2}


def test_no_class_is_pasted_where_it_was_verified_to_be_absent(tmp_path):
    """Ids 3, 7, 40, 90 are labels 0 to 3. Image 0 was searched for 3 and 40: only 7 and 90 may come."""
    rows = [annotated(0, 7), annotated(1, 3), annotated(1, 40), annotated(2, 7), annotated(2, 90)]
    dataset = write_searched(tmp_path, [[3, 40], [], [3, 7, 40, 90]], rows)
    dataset.copy_paste = pasting(dataset.annotations)
    seen = set()
    for seed in range(40):
        sample = dataset[0, seed]
        seen |= set(sample.instances.labels.tolist())
        assert sample.absent.tolist() == [True, False, True, False]  # as the file says
        assert len(dataset[2, seed].instances) == 2  # of which nothing is pasted
    assert seen == {1, 3}


def test_in_an_exhaustive_file_what_was_pasted_is_no_longer_absent(tmp_path):
    rows = [annotated(0, 7), annotated(1, 3), annotated(1, 40), annotated(2, 7)]
    dataset = write_searched(tmp_path, [None] * 3, rows)
    assert dataset[0].absent.tolist() == [True, False, True, True]
    dataset.copy_paste = pasting(dataset.annotations)
    seen = set()
    for seed in range(40):
        sample = dataset[0, seed]
        labels = set(sample.instances.labels.tolist())
        seen |= labels
        assert sample.absent.tolist() == [label not in labels | {1} for label in range(4)]
    assert seen == {0, 1, 2}
    dataset.copy_paste = None
    assert dataset[0].absent.tolist() == [True, False, True, True]  # nothing was changed for good


def test_an_image_without_objects_can_be_pasted_into(tmp_path):
    annotations = write_set(tmp_path, sizes=((40, 60), (60, 40), (50, 50)), empty=(2,))
    dataset = DetectionDataset(annotations, KEEP, drop_empty=False, copy_paste=pasting(annotations))
    assert all(1 <= len(dataset[2, seed].instances) <= 3 for seed in range(10))
    nothing = DetectionDataset(annotations, KEEP, drop_empty=False, copy_paste=pasting(annotations), with_objects=False)
    assert len(nothing[0].instances) == 0
    np.testing.assert_array_equal(nothing[0].image.permute(1, 2, 0), read_image(tmp_path / "images" / "0.png"))


def test_a_broken_source_is_named(tmp_path):
    annotations = write_set(tmp_path, sizes=((40, 60), (60, 40)), empty=())
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    dataset = DetectionDataset(annotations, KEEP, drop_empty=True, copy_paste=pasting(annotations))
    with pytest.raises(UserError, match=r"1\.png"):
        _ = [dataset[0, seed] for seed in range(10)]


def test_the_recipe_says_what_is_pasted(tmp_path):
    annotations = write_set(tmp_path)
    assert train_dataset(annotations, DataRecipe()).copy_paste is None
    made = train_dataset(annotations, DataRecipe(copy_paste=0.25, flip=0.1)).copy_paste
    assert (made.probability, made.mirrored) == (0.25, 0.1)
    assert made.pool.rows.tolist() == [0, 1]  # of the images that are trained on: not of the one that is too small


def test_pasted_photographs(shared):
    """A reduced JPEG as source, and all augmentation at once."""
    train = open_splits(shared / "data" / "coco128-lvis").train
    settings = {"long_edges": (64, 640), "crop": 320, "colour_jitter": 0.4, "instaboost": 0.5, "copy_paste": 1.0}
    dataset = train_dataset(train, DataRecipe(**settings))
    for index in (3, 11, 30, 60):
        sample = dataset[index, 5]
        height, width = sample.image.shape[1:]
        boxes = sample.instances.boxes
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
