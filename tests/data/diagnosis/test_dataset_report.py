import numpy as np
import pytest
from checked_data import RECIPE, SOUND, SOUND_VAL, finding, report, row, write

from tailseg.data.diagnosis.dataset_report import check_data, expected_memory, suggest, tiny_classes
from tailseg.data.sources import open_data
from tailseg.recipes.resolve import resolve


def test_numbers_at_the_recipes_resolution(tmp_path):
    """60 x 40 is enlarged 20 times: to 1200 x 800, so sides of 0.3 and 0.7 pixels are 6 and 14."""
    rows = [row(1, 1, (1, 1, 1, 1)), row(2, 2, (1, 1, 4, 4)), *SOUND[2:]]
    found = report(write(tmp_path, rows, SOUND_VAL, sizes={1: (1333, 800), 2: (1333, 800)}))
    assert (found.scale["under_8"], found.scale["under_16"], found.scale["under_32"]) == (0.5, 0.5, 0.5)
    assert found.scale["median_side"] == pytest.approx((4 + 20 * 300**0.5) / 2)
    assert finding(found, "of the objects have a side under 8 pixels").severity == "warning"


def test_classes_whose_objects_are_tiny(tmp_path):
    """By the median of their sides, as large as the recipe shows them; the smallest first."""
    sizes = dict.fromkeys(range(1, 5), (1333, 800))
    boxes = {1: (9, 9), 2: (7, 7), 3: (5, 5), 4: (4, 9), 5: (3, 3), 6: (90, 90)}  # sides 9, 7, 5; 6, 3, 90
    rows = [row(i, i % 4 + 1, (1, 1, *box), 1 if i < 4 else 2) for i, box in boxes.items()]
    rows += [row(7, 1, (1, 1, 50, 50), 3), row(8, 2, (1, 1, 2, 2), 3, iscrowd=1)]
    folder = write(tmp_path, rows, SOUND_VAL, ("nut", "pin", "cat"), sizes=sizes)
    train = open_data(str(folder), show=False).train
    assert tiny_classes(train, RECIPE) == ["pin (median 6.0)", "nut (median 7.0)"]
    none = open_data(str(write(tmp_path / "none", [], SOUND_VAL)), show=False).train
    assert tiny_classes(none, RECIPE) == []


def test_repeat_factors_and_epochs(tmp_path):
    folder = write(tmp_path, [row(1, 1), row(2, 2), row(3, 3), row(4, 4, category=2)], SOUND_VAL)
    splits = open_data(str(folder), show=False)
    found = check_data("x", splits, resolve("table1/seesaw", ["data.repeat_threshold=1"]))
    # owl is in a quarter of the images: sqrt(1 / 0.25) = 2; cat in three quarters: sqrt(4 / 3) = 1.155
    assert [c.repeat_factor for c in found.classes] == [1.155, 2.0]
    assert found.sampling["epoch_ceil"] == 3 * 2 + 2
    assert found.sampling["epoch_stochastic"] == pytest.approx(3 * (4 / 3) ** 0.5 + 2)
    assert found.sampling["largest_factor"] == 2


def test_memory_is_that_of_columns_and_of_the_largest_batch(tmp_path):
    splits = open_data(str(write(tmp_path, SOUND, SOUND_VAL)), show=False)
    memory = expected_memory(splits, RECIPE)
    assert memory["batch"] == 2 * (3 * 800 * 1344 * 5 + 1 * 114 * 114)
    assert 500 < memory["annotations"] < 5000


class Counts:
    """As much of `Annotations` as a suggestion needs."""

    def __init__(self, images, short, counts):
        self.image_sizes = np.full((images, 2), short)
        self.counts = np.array(counts, np.int64)

    def __len__(self):
        return len(self.image_sizes)

    def image_counts(self):
        return self.counts


@pytest.mark.parametrize(
    ("images", "short", "counts", "gpu", "name"),
    [
        (5000, 480, (1000, 3, 0), True, "own/fast"),
        (5000, 480, (1000, 3, 0), False, "small/seesaw"),
        (999, 480, (900, 300), True, "own/fast"),
        (999, 480, (900, 300), False, "small/cross-entropy"),
        (5000, 160, (29, 3), True, "demo/cross-entropy"),
        (5000, 160, (30, 3), True, "demo/seesaw"),
        (1, 480, (), False, "small/cross-entropy"),
    ],
)
def test_suggestion_by_size_gpu_and_tail(monkeypatch, images, short, counts, gpu, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    suggestion = suggest("my data", Counts(images, short, counts))
    assert suggestion["recipe"] == name
    start = " --init coco" if name == "own/fast" else ""
    assert suggestion["command"].startswith(f"tailseg train {name}{start} --data 'my data' --out ")
