"""InstaBoost: does it survive, what does it cost, what does it look like?

    python benchmarks/instaboost.py                                              # the built-in set, two minutes
    python benchmarks/instaboost.py --data ../shared/data/coco128-lvis --sheet s.png   # two more

Samples of the built-in set are drawn at random and jittered with probability 1, with and without the heat map in turn,
once by InstaBoost alone and once before resizing, cropping and mirroring. A sample fails if it raises or breaks what
must hold: its image keeps its size, some objects are left, in their order, inside the image, with the boxes of their
masks. With --data, the time of making a sample is measured on one core, image by image, without InstaBoost, with it,
with its heat map, and with Copy-Paste instead, which reads one to three other images; resizing, which is the same for
all, is left out. Of InstaBoost's, in-painting takes most. It is timed beside OpenCV's own in-painting of the whole
hole, which it must equal in every pixel that is seen.
"""

from __future__ import annotations

import argparse
import statistics
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import harness
import numpy as np
import torch
from harness import Times
from numpy.typing import NDArray
from PIL import Image

from tailseg.data import instaboost
from tailseg.data.copy_paste import CopyPaste
from tailseg.data.dataset import DetectionDataset, train_dataset, trained_images
from tailseg.data.instaboost import InstaBoost
from tailseg.data.sources import DataSplits, open_data, open_splits
from tailseg.data.transforms import Compose, boxes_from_masks
from tailseg.recipes.data_section import DataRecipe
from tailseg.structures import Sample
from tailseg.visualize.draw import contact_sheet, draw_instances

INPAINTING, OPENCV = "in-painting what is seen", "in-painting all by OpenCV"
PLAIN, BOOSTED, GUIDED = "without InstaBoost", "InstaBoost", "InstaBoost with heat map"
PASTED = "Copy-Paste"
BOOSTS = {PLAIN: None, BOOSTED: InstaBoost(1.0), GUIDED: InstaBoost(1.0, heatmap=True)}
CPU = torch.device("cpu")


def datasets(splits: DataSplits, mask_grid: int) -> dict[str, DetectionDataset]:
    """The training split as it is in the files, and jittered."""
    assert splits.train is not None
    keep = Compose(())
    return {
        name: DetectionDataset(splits.train, keep, drop_empty=True, mask_grid=mask_grid, instaboost=boost)
        for name, boost in BOOSTS.items()
    }


def survive(images: int) -> dict[str, Any]:
    """Jitter random samples of the built-in set."""
    splits = open_data("synthetic", need=("train",))
    assert splits.train is not None
    plain = datasets(splits, mask_grid=512)  # a cell a pixel, so that masks are known exactly
    augmented = {"long_edges": (96, 180), "crop": 112, "instaboost": 1.0}
    trained = {
        name: train_dataset(splits.train, DataRecipe(**augmented, instaboost_heatmap=guided))
        for name, guided in ((BOOSTED, False), (GUIDED, True))
    }
    rng = np.random.default_rng(0)
    failures: dict[str, int] = {}
    objects = dropped = unchanged = 0
    for i in range(images):
        index, seed = int(rng.integers(len(plain[PLAIN]))), int(rng.integers(2**62))
        name = (BOOSTED, GUIDED)[i % 2]
        before = plain[PLAIN][index, seed]
        try:
            after = plain[name][index, seed]
            wrong = broken_rules(before, after) + broken_in_training(trained[name][index, seed])
        except Exception as error:  # whatever it is, it is counted
            traceback.print_exc()
            wrong = [type(error).__name__]
        else:
            objects += len(before.instances)
            dropped += len(before.instances) - len(after.instances)
            unchanged += torch.equal(before.image, after.image)
        for rule in wrong:
            failures[rule] = failures.get(rule, 0) + 1
            print(f"image {before.image_id}, seed {seed}, {name}: {rule}")
    print(
        f"{images} samples, {sum(failures.values())} failures; {dropped} of {objects} objects dropped, "
        f"{unchanged} images left as they were"
    )
    return {"samples": images, "failures": failures, "objects": objects, "dropped": dropped, "unchanged": unchanged}


def broken_rules(before: Sample, after: Sample) -> list[str]:
    """What must hold of a jittered sample and does not."""
    height, width = before.original_hw
    instances = after.instances
    rest = iter(before.instances.labels.tolist())
    tight = boxes_from_masks(instances.masks, instances.mask_frames, (0, 0, width, height))
    rules = {
        "the image has another size": after.image.shape == before.image.shape,
        "the image is of another type": after.image.dtype == torch.uint8,
        "no object is left": len(instances) > 0 or len(before.instances) == 0,
        "labels are not in order": all(label in rest for label in instances.labels.tolist()),
        "a box is outside": inside(instances.boxes, height, width),
        "a box is not that of its mask": torch.equal(before.instances.boxes, instances.boxes)
        or torch.allclose(tight, instances.boxes, atol=1e-3),
        "the image changed size on the way": after.original_hw == before.original_hw,
    }
    return [rule for rule, holds in rules.items() if not holds]


def broken_in_training(sample: Sample) -> list[str]:
    """What must hold of a jittered sample after resizing, cropping and mirroring, and does not."""
    height, width = sample.image.shape[1:]
    return [] if inside(sample.instances.boxes, height, width) else ["a box is outside in training"]


def inside(boxes: torch.Tensor, height: int, width: int) -> bool:
    corners = torch.tensor([width, height, width, height])
    return bool((boxes >= 0).all() and (boxes <= corners).all() and (boxes[:, 2:] > boxes[:, :2]).all())


def cost(data: Path) -> dict[str, Any]:
    """Time each photograph of the training split."""
    splits = open_splits(data, need=("train",))
    assert splits.train is not None
    cases = datasets(splits, mask_grid=112)
    pasting = CopyPaste.of(splits.train, trained_images(splits.train), DataRecipe(copy_paste=1.0))
    cases[PASTED] = DetectionDataset(splits.train, Compose(()), drop_empty=True, copy_paste=pasting)
    holes: list[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]] = []
    ours = instaboost.inpaint

    def recorded(image: NDArray[np.uint8], hole: NDArray[np.uint8], seen: NDArray[np.bool_]) -> NDArray[np.uint8]:
        holes.append((image, hole, seen))
        return ours(image, hole, seen)

    times: dict[str, list[Times]] = {name: [] for name in (*cases, INPAINTING, OPENCV)}
    differing = seen_pixels = hole_pixels = 0
    for index in range(len(cases[PLAIN])):
        for name, dataset in cases.items():
            times[name].append(harness.timed(partial(dataset.__getitem__, (index, index)), CPU))
        instaboost.inpaint = recorded
        cases[BOOSTED][index, index]
        instaboost.inpaint = ours
        image, hole, seen = holes.pop()
        times[INPAINTING].append(harness.timed(partial(ours, image, hole, seen), CPU))
        theirs = partial(cv2.inpaint, image, hole, instaboost.INPAINT_RADIUS, cv2.INPAINT_NS)
        times[OPENCV].append(harness.timed(theirs, CPU))
        differing += int((ours(image, hole, seen) != theirs())[seen].any(axis=1).sum())
        seen_pixels += int(seen.sum())
        hole_pixels += int(hole.sum())
    rows: dict[str, Any] = {name: milliseconds(taken) for name, taken in times.items()}
    for name, row in rows.items():
        print(f"{name}: {row['mean']:.0f} ms of processor time, median {row['median']:.0f}, most {row['max']:.0f}")
    ratio = rows[OPENCV]["mean"] / rows[INPAINTING]["mean"]
    costs = {name: rows[name]["mean"] / rows[PLAIN]["mean"] for name in (BOOSTED, GUIDED, PASTED)}
    print("times as long as without: " + ", ".join(f"{name} {cost:.1f}" for name, cost in costs.items()))
    print(f"in-painting is {ratio:.2f} times as fast as OpenCV's of the whole hole; {differing} pixels seen differ")
    return {
        "images": len(cases[PLAIN]),
        "milliseconds": rows,
        "times_as_long_as_without": costs,
        "inpainting_speedup": {"of_means": ratio, **harness.speedup(times[INPAINTING], times[OPENCV])},
        "pixels": {"hole": hole_pixels, "seen": seen_pixels, "seen_and_different": differing},
    }


def milliseconds(times: list[Times]) -> dict[str, float]:
    """Processor time of each call, and the mean by the clock."""
    taken = [1e3 * t.processor for t in times]
    clock = 1e3 * statistics.mean(t.clock for t in times)
    return {"mean": statistics.mean(taken), "median": statistics.median(taken), "max": max(taken), "mean_clock": clock}


def draw_sheet(data: Path, path: Path, heatmap: bool) -> None:
    """Sixteen photographs before and after, with their masks."""
    splits = open_splits(data, need=("train",))
    assert splits.train is not None
    names = [category.name for category in splits.train.categories]
    cases = datasets(splits, mask_grid=512)
    pictures, captions = [], []
    for index in np.linspace(0, len(cases[PLAIN]) - 1, 16).astype(int).tolist():
        for name in (PLAIN, GUIDED if heatmap else BOOSTED):
            sample = cases[name][index, 1]
            pictures.append(draw_instances(sample.image.permute(1, 2, 0).numpy(), sample.instances, names))
            captions.append(f"{sample.image_id}, {name}: {len(sample.instances)} objects")
    Image.fromarray(contact_sheet(pictures, captions, columns=4)).save(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="samples of the built-in set; 0: none")
    parser.add_argument("--data", type=Path, help="a data set of photographs")
    parser.add_argument("--sheet", type=Path, help="a picture to draw of photographs before and after (PNG)")
    parser.add_argument("--heatmap", action="store_true", help="draw what the heat map does")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "instaboost-cpu.json")
    options = parser.parse_args()
    if options.sheet and not options.data:
        parser.error("--sheet needs the photographs of --data")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    result: dict[str, Any] = {"machine": harness.machine(CPU)}
    if options.images:
        result["survival"] = survive(options.images)
    if options.data:
        result["cost"] = cost(options.data)
    if options.sheet:
        draw_sheet(options.data, options.sheet, options.heatmap)
    harness.write_json(options.out, result)


if __name__ == "__main__":
    main()
