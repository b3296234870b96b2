"""Images a second of the training loader, beside torchvision's reference pipeline on the same images and sizes.

    python benchmarks/loading.py --data ../shared/data/coco128-lvis      # CPU, four minutes

The other pipeline is that of torchvision's detection reference: Pillow decodes, pycocotools paints every instance as
a bitmap of the whole image, torchvision.transforms.v2 resizes and mirrors image, boxes and bitmaps together. It runs in
a `DataLoader` with as many forked workers, in batches of one orientation like ours. What ours does besides (padding
a batch) and theirs does besides (the conversion to float, which we leave to the device) is left out of theirs. Its
image is resized as a Pillow image or as a tensor; both are timed. All take turns; the first batch, which waits for the
workers to start, is timed apart. "Decoding whole images" is ours without decoding JPEGs at a part of their size, which
shows on images of four times the sides, as cameras take them; on the others it is the same twice, a measure of noise.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import Times
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.dataset import DetectionDataset, train_dataset
from tailseg.data.loading import train_loader
from tailseg.data.sampling import TrainSampler
from tailseg.data.sources import open_splits
from tailseg.data.transforms import Compose
from tailseg.recipes.data_section import DataRecipe

TARGET = 1.5  # at the 1x setting
OURS, WHOLE = "tailseg", "tailseg, decoding whole images"
PILLOW, TENSOR = "torchvision, resizing Pillow images", "torchvision, resizing tensors"


class Reference(Dataset[Any]):
    """The samples of a data set as torchvision's detection reference makes them."""

    def __init__(self, ours: DetectionDataset, recipe: DataRecipe, *, pillow: bool) -> None:
        annotations = ours.annotations
        self.paths = [annotations.image_path(int(i)) for i in ours.image_indices]
        self.targets = [coco_target(annotations, int(i)) for i in ours.image_indices]
        # Pillow resizes with antialiasing; so do tensors by default, in the reference too.
        resize: Any = v2.RandomShortestSize(list(recipe.short_edges), recipe.long_edge)
        if recipe.long_edges is not None and recipe.crop is not None:
            resize = partial(longest_and_crop, recipe.long_edges, recipe.crop)
        steps = [resize, v2.RandomHorizontalFlip(recipe.flip)]
        self.transform = v2.Compose([*steps, v2.ToImage()] if pillow else [v2.ToImage(), *steps])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
        index, _seed = item
        image = Image.open(self.paths[index]).convert("RGB")
        width, height = image.size
        polygons, boxes, labels = self.targets[index]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "masks": tv_tensors.Mask(coco_bitmaps(polygons, height, width)),
            "labels": labels,
        }
        image, target = self.transform(image, target)
        pure = {key: value.as_subclass(torch.Tensor) for key, value in target.items()}
        return image.as_subclass(torch.Tensor), pure


def longest_and_crop(edges: tuple[int, int], crop: int, image: Any, target: Any) -> Any:
    """The longer edge drawn from a range, then a random square where there is as much: of torchvision's transforms."""
    edge = int(torch.randint(edges[0], edges[1] + 1, ()))
    image, target = v2.Resize(None, max_size=edge)(image, target)
    height, width = target["boxes"].canvas_size
    return v2.RandomCrop((min(crop, height), min(crop, width)))(image, target)


def coco_target(annotations: Annotations, image: int) -> tuple[list[list[list[float]]], torch.Tensor, torch.Tensor]:
    """Polygons (lists of coordinates, as in the JSON), boxes and labels of an image."""
    rows = annotations.rows(image)
    polygons = [[np.asarray(p, np.float64).tolist() for p in annotations.segmentation(int(row))] for row in rows]
    return polygons, torch.tensor(annotations.boxes[rows]), torch.tensor(annotations.labels[rows])


def coco_bitmaps(segmentations: list[list[list[float]]], height: int, width: int) -> torch.Tensor:
    """(N, height, width) uint8: torchvision's reference ``convert_coco_poly_to_mask``, stated again."""
    bitmaps = []
    for polygons in segmentations:
        parts = torch.as_tensor(coco_mask.decode(coco_mask.frPyObjects(polygons, height, width)), dtype=torch.uint8)
        bitmaps.append(parts.any(dim=2))
    return torch.stack(bitmaps) if bitmaps else torch.zeros((0, height, width), dtype=torch.uint8)


class Plan:
    """The sampler's batches, without end."""

    def __init__(self, sampler: TrainSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.sampler.iterate()


def pairs(samples: list[Any]) -> tuple[Any, ...]:
    """The reference's collation: images stay apart until they are on the device."""
    return tuple(zip(*samples, strict=True))


def reference_loader(dataset: Reference, sampler: TrainSampler, workers: int) -> Any:
    context = "fork" if workers else None
    return DataLoader(
        dataset, batch_sampler=Plan(sampler), num_workers=workers, collate_fn=pairs, multiprocessing_context=context
    )


def turn(loader: Callable[[], Any], batches: int) -> tuple[Times, float]:
    """Clock of ``batches`` after the first; processor time of all of them, workers too; seconds to the first batch."""
    before = processor_seconds()
    begin = time.perf_counter()
    iterator = iter(loader())
    next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    end = time.perf_counter()
    if isinstance(iterator, Generator):
        with closing(iterator):
            pass
    del iterator  # sends the workers home and waits for them, so that their time counts
    return Times(end - start, processor_seconds() - before), start - begin


def processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def enlarged(data: Path, factor: int, folder: Path) -> Path:
    """The training split with images of ``factor`` times the sides, as a camera takes them, in ``folder``."""
    train = open_splits(data, need=("train",)).train
    assert train is not None
    content = json.loads(train.path.read_text())
    (folder / "images").mkdir()
    for position, image in enumerate(content["images"]):
        name = f"{image['id']}.jpg"
        picture = Image.open(train.image_path(position)).convert("RGB")
        picture.resize((picture.width * factor, picture.height * factor)).save(folder / "images" / name, quality=90)
        image |= {"file_name": name, "height": image["height"] * factor, "width": image["width"] * factor}
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[factor * x for x in part] for part in annotation["segmentation"]]
        annotation["bbox"] = [factor * x for x in annotation["bbox"]]
        annotation["area"] *= factor**2
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def measure(data: Path, recipe: DataRecipe, options: argparse.Namespace, batches: int, repeats: int) -> dict[str, Any]:
    """All loaders in turn on one data set."""
    train = open_splits(data, need=("train",)).train
    assert train is not None
    ours = train_dataset(train, recipe)
    sampler = TrainSampler(ours.aspect_groups, recipe.batch)
    cases: dict[str, Callable[[], Any]] = {OURS: partial(train_loader, ours, sampler, workers=options.workers)}
    resize: Any = ours.transform.transforms[0]
    steps = (replace(resize, from_reduced=False), *ours.transform.transforms[1:])
    whole = DetectionDataset(ours.annotations, Compose(steps), drop_empty=True, mask_grid=recipe.mask_grid)
    cases[WHOLE] = partial(train_loader, whole, sampler, workers=options.workers)
    for name, pillow in ((PILLOW, True), (TENSOR, False)):
        theirs = Reference(ours, recipe, pillow=pillow)
        cases[name] = partial(reference_loader, theirs, sampler, options.workers)
    times: dict[str, list[Times]] = {name: [] for name in cases}
    starts: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, loader in cases.items():
            taken, start = turn(loader, batches)
            times[name].append(taken)
            starts[name].append(start)
    rows: dict[str, Any] = {}
    for name, turns in times.items():
        rows[name] = row = harness.summary(turns, batches * recipe.batch)
        row["first_batch_seconds"] = statistics.median(starts[name])
        print(
            f"  {row['images_per_second']:.0f} images/s, first batch after {row['first_batch_seconds']:.2f} s: {name}"
        )
        if name != OURS:
            row["ours_is_faster_by"] = ratio = harness.speedup(times[OURS], turns)
            clock, processor = ratio["clock"], ratio["processor"]["of_medians"]
            spread = f"{clock['smallest']:.2f} to {clock['largest']:.2f}"
            print(f"    tailseg: {clock['of_medians']:.2f} x as many ({spread}); by processor time {processor:.2f} x")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder or YAML file of a data set with polygons")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=100, help="of two images, a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--enlarge", type=int, default=4, help="sides of the large images, in those of the data")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "loading-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"data": options.data.resolve().name, "workers": options.workers, "batches": options.batches}
    result: dict[str, Any] = {"machine": harness.machine(torch.device("cpu")), "settings": settings, "target": TARGET}
    print("1x setting, the images as they are")
    result["1x"] = measure(options.data, DataRecipe(), options, options.batches, options.repeats)
    fewer, turns = max(1, options.batches // 5), min(3, options.repeats)
    print("45e setting (longer edge 768 to 1792, crop 1280)")
    long = DataRecipe(long_edges=(768, 1792), crop=1280)
    result["45e"] = measure(options.data, long, options, fewer, turns)
    print(f"1x setting, images of {options.enlarge} times the sides")
    with tempfile.TemporaryDirectory() as folder:
        large = enlarged(options.data, options.enlarge, Path(folder))
        result["1x, enlarged"] = measure(large, DataRecipe(), options, fewer, turns)
    harness.write_json(options.out, result)


if __name__ == "__main__":
    main()
