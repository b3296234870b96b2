import base64
import json
import re
import shutil
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from typer.testing import CliRunner

from tailseg.cli.main import app
from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.diagnosis.class_names import near_names
from tailseg.data.diagnosis.dataset_report import check_data, expected_memory, suggest
from tailseg.data.diagnosis.mask_checks import check_masks, iou, mask_boxes
from tailseg.data.sources import open_source
from tailseg.recipes.resolve import resolve
from tailseg.visualize.dataset_page import write_page

RECIPE = resolve("table1/seesaw", ())
WIDTH, HEIGHT = 60, 40


def polygon_of(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def row(number, image, box=(10, 10, 20, 15), category=1, **changes):
    base = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3]}
    return base | {"segmentation": [polygon_of(box)], "iscrowd": 0} | changes


def write(folder, train, val=(), names=("cat", "owl"), sizes=None):
    """A data set: rows of both splits; training images 1 to 4, validation images 11 and 12."""
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    for split, rows, ids in (("train", train, range(1, 5)), ("val", val, (11, 12))):
        images = []
        for i in ids:
            width, height = (sizes or {}).get(i, (WIDTH, HEIGHT))
            path = folder / "images" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(path)
            images.append({"id": i, "file_name": path.name, "height": height, "width": width})
        content = {"images": images, "annotations": list(rows), "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def checkup(folder):
    return check_data(str(folder), open_source(str(folder), show=False, look_for_images=False), RECIPE)


def finding(found, text, split=None):
    """The one finding whose text holds ``text``."""
    matching = [f for f in found.findings if text in f.what and split in (None, f.split)]
    assert len(matching) == 1, [f.what for f in found.findings]
    return matching[0]


def texts(found):
    return [f.what for f in found.findings]


SOUND = [row(1, 1), row(2, 2), row(3, 3, category=2), row(4, 4, category=2)]
SOUND_VAL = [row(1, 11), row(2, 12, category=2)]


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


@pytest.mark.parametrize("turn", ["transposed", "clockwise", "counter-clockwise", "stretched"])
def test_masks_turned_by_90_degrees(tmp_path, turn):
    """Boxes are right, masks belong to the image turned; image 2 is upright."""

    def turned(box):
        x, y, w, h = box
        if turn == "stretched":  # clockwise, then width and height fitted to the image again
            return ((HEIGHT - y - h) * WIDTH / HEIGHT, x * HEIGHT / WIDTH, h * WIDTH / HEIGHT, w * HEIGHT / WIDTH)
        if turn == "transposed":
            return (y, x, h, w)
        return (HEIGHT - y - h, x, h, w) if turn == "clockwise" else (y, WIDTH - x - w, h, w)

    boxes = [(4, 6, 25, 8), (35, 20, 20, 11), (10, 25, 6, 14)]
    rows = [row(i, 1, box, segmentation=[polygon_of(turned(box))]) for i, box in enumerate(boxes, start=10)]
    found = checkup(write(tmp_path, [*SOUND[1:], *rows, row(20, 1, (2, 2, 9, 9))], SOUND_VAL))
    assert finding(found, "turned by 90 degrees").examples == ("image 1 (1.png)",)
    assert len(found.findings) == 1 or all("masks" not in f.what or "turned" in f.what for f in found.findings)


def test_the_turned_masks_of_real_lvis_images(shared, tmp_path):
    annotations = load_annotations(shared / "data" / "lvis-val-100" / "lvis_val_100.json", tmp_path)
    facts = check_masks(annotations)
    assert annotations.image_ids[facts.turned].tolist() == [464824, 179898, 443426]
    assert not np.concatenate([facts.empty, facts.duplicate, facts.beyond]).any()


def test_masks_and_boxes_of_an_image_with_swapped_sides(tmp_path):
    """Boxes follow the masks, and both fit only an image of 40 x 60."""
    box = (5, 30, 20, 28)
    found = checkup(write(tmp_path, [*SOUND[1:], row(10, 1, box)], SOUND_VAL))
    assert finding(found, "turned by 90 degrees").examples == ("image 1 (1.png)",)


boxes = st.tuples(*[st.integers(0, 28)] * 2, *[st.integers(1, 12)] * 2)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(boxes, st.booleans(), st.integers(1, 4)), max_size=8))
def test_boxes_of_masks_are_those_of_their_pixels(tmp_path_factory, objects):
    folder = tmp_path_factory.mktemp("masks")
    rows = []
    for number, (box, as_rle, image) in enumerate(objects, start=1):
        x, y, w, h = box
        bitmap = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        bitmap[y : y + h, x : x + w] = 1
        code = coco.encode(bitmap)
        compressed = {"size": code["size"], "counts": code["counts"].decode()}
        rows.append(row(number, image, box, **({"segmentation": compressed} if as_rle else {})))
    write(folder, rows)
    annotations = load_annotations(folder / "train.json", folder / "images")
    assert np.array_equal(mask_boxes(annotations), annotations.boxes)
    facts = check_masks(annotations)
    assert not np.concatenate([facts.empty, facts.disagreeing, facts.turned]).any()
    keys = [(r["image_id"], tuple(r["bbox"])) for r in rows]
    assert facts.duplicate.sum() == len(keys) - len(set(keys))


def test_an_rle_without_pixels(tmp_path):
    empty = coco.encode(np.zeros((HEIGHT, WIDTH), np.uint8, order="F"))
    code = {"size": empty["size"], "counts": empty["counts"].decode()}
    found = checkup(write(tmp_path, [*SOUND, row(5, 1, segmentation=code)], SOUND_VAL))
    assert finding(found, "without a pixel").examples == ("annotation 5",)


def test_overlap_by_hand():
    a = np.array([[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 0, 0], [np.nan] * 4])
    b = np.array([[1, 1, 3, 3], [5, 5, 6, 6], [0, 0, 0, 0], [0, 0, 1, 1]])
    assert iou(a, b).tolist() == [1 / 7, 0, 0, 0]
    assert iou(np.empty((0, 4)), np.empty((0, 4))).shape == (0,)


# ---------------------------------------------------------------------------------------------------------
# Names


def test_near_names():
    names = [
        "hot_dog",
        "Hot Dog",
        "hot-dogs",
        "berry",
        "berries",
        "cat",
        "car",
        "toaster",
        "coaster",
        "recieve",
        "receive",
    ]
    assert near_names(names) == [
        ("hot_dog", "Hot Dog", "spelling"),
        ("hot_dog", "hot-dogs", "plural"),
        ("Hot Dog", "hot-dogs", "plural"),
        ("berry", "berries", "plural"),
        ("toaster", "coaster", "one letter"),
        ("recieve", "receive", "one letter"),
    ]
    assert near_names([]) == []


def test_lvis_has_no_two_spellings_of_one_class(shared):
    lines = (shared / "data" / "lvis_v1_categories.csv").read_text().splitlines()[1:]
    near = near_names([line.split(",")[1] for line in lines])
    assert all(kind != "spelling" for _, _, kind in near)
    assert len(near) < 40


# ---------------------------------------------------------------------------------------------------------
# Numbers


def test_numbers_at_the_recipes_resolution(tmp_path):
    """60 x 40 is enlarged 20 times: to 1200 x 800, so sides of 0.3 and 0.7 pixels are 6 and 14."""
    rows = [row(1, 1, (1, 1, 1, 1)), row(2, 2, (1, 1, 4, 4)), *SOUND[2:]]
    found = checkup(write(tmp_path, rows, SOUND_VAL, sizes={1: (1333, 800), 2: (1333, 800)}))
    assert (found.scale["under_8"], found.scale["under_16"], found.scale["under_32"]) == (0.5, 0.5, 0.5)
    assert found.scale["median_side"] == pytest.approx((4 + 20 * 300**0.5) / 2)
    assert finding(found, "side under 8 pixels").severity == "warning"


def test_repeat_factors_and_epochs(tmp_path):
    folder = write(tmp_path, [row(1, 1), row(2, 2), row(3, 3), row(4, 4, category=2)], SOUND_VAL)
    splits = open_source(str(folder), show=False)
    found = check_data("x", splits, resolve("table1/seesaw", ["data.repeat_threshold=1"]))
    # owl is in a quarter of the images: sqrt(1 / 0.25) = 2; cat in three quarters: sqrt(4 / 3) = 1.155
    assert [c.repeat_factor for c in found.classes] == [1.155, 2.0]
    assert found.sampling["epoch_ceil"] == 3 * 2 + 2
    assert found.sampling["epoch_stochastic"] == pytest.approx(3 * (4 / 3) ** 0.5 + 2)
    assert found.sampling["largest_factor"] == 2


def test_memory_is_that_of_columns_and_of_the_largest_batch(tmp_path):
    splits = open_source(str(write(tmp_path, SOUND, SOUND_VAL)), show=False)
    memory = expected_memory(splits, RECIPE)
    assert memory["batch"] == 2 * (3 * 800 * 1344 * 5 + 1 * 114 * 114)
    assert 500 < memory["annotations"] < 5000


class Counts:
    """As much of `Annotations` as a suggestion needs."""

    def __init__(self, images, short, counts):
        self.image_hws = np.full((images, 2), short)
        self.counts = np.array(counts, np.int64)

    def __len__(self):
        return len(self.image_hws)

    def image_counts(self):
        return self.counts


@pytest.mark.parametrize(
    ("images", "short", "counts", "gpu", "name"),
    [
        (5000, 480, (1000, 3, 0), True, "table1/seesaw"),
        (5000, 480, (1000, 3, 0), False, "small/seesaw"),
        (999, 480, (900, 300), True, "small/cross-entropy"),
        (5000, 160, (29, 3), True, "demo/cross-entropy"),
        (5000, 160, (30, 3), True, "demo/seesaw"),
        (1, 480, (), False, "small/cross-entropy"),
    ],
)
def test_suggestion_by_size_gpu_and_tail(monkeypatch, images, short, counts, gpu, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    suggestion = suggest("my data", Counts(images, short, counts))
    assert suggestion["recipe"] == name
    assert suggestion["command"].startswith(f"tailseg train {name} --data 'my data' --out ")


# ---------------------------------------------------------------------------------------------------------
# The command


def run(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_real_photographs_through_the_command(shared, tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "check.json"
    done = run("check", shared / "data" / "coco128-lvis", "--json", out, "--html", page, "--quiet")
    assert done.exit_code == 0, done.output
    content = json.loads(out.read_text())
    assert content["usable"]
    assert (
        content["splits"]["train"] | {"annotations": 684, "images": 103, "categories_with_objects": 71}
        == (content["splits"]["train"])
    )
    assert [content["groups"][name]["classes"] for name in ("rare", "common", "frequent")] == [39, 32, 9]
    counts = {f["what"].split(":")[0]: f["count"] for f in content["findings"]}
    assert counts["classes without training images"] == 9
    assert counts["images without objects"] == 2
    assert "tailseg train small/seesaw" in done.output
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "http://" not in re.sub(r'xmlns[^=]*="[^"]*"|<!DOCTYPE[^>]*>', "", text).replace("http://www.w3.org", "")
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert 24 <= len(pictures) <= 72
    sides = [max(Image.open(BytesIO(base64.b64decode(picture))).size) for picture in pictures]
    assert set(sides) == {220}


def test_data_that_cannot_be_used(tmp_path):
    folder = write(tmp_path, SOUND, SOUND_VAL)
    (folder / "images" / "1.png").unlink()
    done = run("check", folder, "--quiet")
    assert done.exit_code == 1
    assert str(done.exception).startswith(f"{folder}: cannot be trained on: 1 images that are not there (train);")
    assert "Findings" in done.output  # told in full before


def test_page_without_objects_or_images(tmp_path):
    folder = write(tmp_path, [], [])
    splits = open_source(str(folder), show=False)
    write_page(check_data("<x>", splits, RECIPE), splits.train, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "There are no objects." in text
    assert "<x>" not in text
    shutil.copy(write(tmp_path / "other", SOUND, SOUND_VAL) / "train.json", folder / "train.json")
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    splits = open_source(str(folder), show=False, look_for_images=False)
    write_page(check_data("x", splits, RECIPE), splits.train, tmp_path / "page.html")
    assert "cannot be trained on yet" in (tmp_path / "page.html").read_text()


def test_convert_and_split_commands(tmp_path):
    folder = write(tmp_path / "src", [row(i, i) for i in range(1, 5)], SOUND_VAL)
    (folder / "val.json").unlink()
    done = run("split", folder, tmp_path / "one", "--val", "0.25", "--quiet")
    assert done.exit_code == 0, done.output
    assert "3 training images with 3 objects, 1 validation images with 1" in done.output
    assert run("convert", "coco", folder, tmp_path / "two").exit_code == 0
    assert run("check", tmp_path / "two", "--quiet").exit_code == 0
    assert run("convert", "tfrecord", folder, tmp_path / "three").exit_code == 2
    assert run("split", folder, tmp_path / "three", "--val", "1").exit_code == 2
    assert "not empty" in str(run("split", folder, tmp_path / "one").exception)
