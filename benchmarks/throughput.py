"""Images a second and peak memory of Mask R-CNN R50-FPN on LVIS's 1203 classes, ours beside torchvision's.

    python benchmarks/throughput.py                       # CPU, about ten minutes on two cores
    python benchmarks/throughput.py --device cuda --precision bf16
    python benchmarks/throughput.py --profile             # where our own time goes

Equal work: see `torchvision_twin`. The weights are random and the same in both. Untrained, all 1.2 million (box,
class) pairs of an image score above the threshold; after training a few thousand do. Both are timed; for the second
the classifier is shifted until ``--pairs`` an image do. Inference ends with masks in the image: ours as run-length
codes, torchvision's as the float bitmaps that it returns. A training step ends with the optimiser.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from profiling import profile
from torch import Tensor
from torchvision_twin import build_stock, build_twin, stages_of, twin_inputs

from tailseg.layers.paste import encode_masks
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed, override
from tailseg.structures import Batch
from tailseg.training.optimizer import build_optimizer

OURS = ("table1/seesaw", "table1/cross-entropy")
TWIN = "torchvision"
STOCK = "torchvision-as-it-comes"  # maskrcnn_resnet50_fpn with nothing but sizes, classes and detections set
TASKS = ["train", "infer", "infer-untrained"]
MASK_GRID = 112
LOGIT_DEVIATION = 2.0  # of a class's logits over the RoIs, once the classifier is shifted
RATE = 1e-7  # too small to change what is measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One comparison."""

    device: str
    batch: int  # images
    size: tuple[int, int]  # (height, width) in pixels
    classes: int
    precision: str  # fp32 or bf16
    pairs: int  # (box, class) pairs an image above the score threshold
    objects: int  # annotated, an image
    overrides: tuple[str, ...]  # of the recipe
    threads: int

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model ready to be timed; every function does one call."""

    train: Callable[[], int]  # returns the RoIs that the mask head has seen
    infer: Callable[[], list[int]]  # returns the number of detections of each image


def scene(settings: Settings) -> tuple[Batch, list[Tensor]]:
    """Noise with ellipses as objects: a batch, and the same masks as bitmaps (G, H, W) an image."""
    generator = torch.Generator().manual_seed(0)
    height, width = settings.size
    count, objects = settings.batch, settings.objects
    sides = 16 * (min(settings.size) / 32) ** torch.rand(count, objects, 2, generator=generator)
    corner = torch.rand(count, objects, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    boxes = torch.cat([corner, corner + sides], dim=2)
    margin = (sides / (MASK_GRID - 2)).repeat(1, 1, 2) * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    axis = (torch.arange(MASK_GRID) + 0.5 - MASK_GRID / 2) / (MASK_GRID / 2 - 1)
    ellipse = (axis.square() + axis.square().unsqueeze(1) <= 1).to(torch.uint8) * 255
    sizes = torch.tensor([settings.size]).expand(count, 2)
    batch = Batch(
        images=torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator),
        image_sizes=sizes,
        original_sizes=sizes,
        image_ids=torch.arange(count),
        boxes=boxes,
        labels=torch.randint(0, settings.classes, (count, objects), generator=generator),
        valid=torch.ones(count, objects, dtype=torch.bool),
        masks=ellipse.expand(count, objects, -1, -1).contiguous(),
        mask_frames=boxes + margin,
        absent=torch.zeros(count, settings.classes, dtype=torch.bool),
        ignored=torch.zeros(count, 0, 0, dtype=torch.uint8),
    )
    return batch, [bitmaps(own, settings.size) for own in boxes]


def bitmaps(boxes: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """Ellipses (G, H, W) uint8 inscribed in boxes (G, 4)."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    x = (torch.arange(image_hw[1]) + 0.5 - centre[:, :1]) / half[:, :1]
    y = (torch.arange(image_hw[0]) + 0.5 - centre[:, 1:]) / half[:, 1:]
    return (x.square().unsqueeze(1) + y.square().unsqueeze(2) <= 1).to(torch.uint8)


def our_detector(name: str, settings: Settings, pairs: int) -> tuple[Detector, Recipe]:
    """A recipe's detector with random weights; ``pairs`` 0 leaves the classifier as it was made."""
    recipe = override(resolve(name), settings.overrides)
    torch.manual_seed(0)
    detector = build_detector(recipe, settings.classes)
    torch.manual_seed(0)
    same = build_detector(override(resolve("table1/cross-entropy"), settings.overrides), settings.classes)
    # Other proposals would be other work: all but the classifier is the same in every model.
    own = {k: v.shape for k, v in detector.state_dict().items() if not k.startswith("stages.0.box_head.class")}
    shared = {k: v for k, v in same.state_dict().items() if own.get(k) == v.shape}
    detector.load_state_dict(shared, strict=False)
    detector = detector.to(settings.device).to(memory_format=torch.channels_last)
    if pairs:
        shift_classifier(detector, scene(settings)[0].to(settings.device), pairs)
    return detector, recipe


@torch.no_grad()
def shift_classifier(detector: Detector, batch: Batch, pairs: int) -> None:
    """Give every class logits of mean 0 over the RoIs, and background so much that ``pairs`` an image stay above
    the score threshold, as in a trained model, in which most of 1.2 million do not."""
    stage = stages_of(detector)[0]
    head, classes = stage.box_head, stage.sampler.num_classes
    layer: Any = head.classifier
    detector.eval()
    deviation = _logits(detector, batch)[:, :classes].std(0).mean()
    if hasattr(layer, "temperature"):  # a normalised layer has no say over the size of its weights
        layer.temperature *= float(LOGIT_DEVIATION / deviation)
    else:
        layer.weight[:classes] *= LOGIT_DEVIATION / deviation
    logits = _logits(detector, batch)
    means = logits.mean(0)
    layer.bias -= means
    logits -= means
    low, high = -50.0, 50.0
    for _ in range(40):
        shift = (low + high) / 2
        shifted = logits.clone()
        shifted[:, -1] += shift
        above = int((head.classification.scores(shifted)[:, :-1] > detector.score_threshold).sum())
        low, high = (shift, high) if above > pairs * len(batch) else (low, shift)
    layer.bias[-1] += low


def _logits(detector: Detector, batch: Batch) -> Tensor:
    """Class logits (R, num_logits) of the proposals of a batch."""
    seen: list[Tensor] = []
    classifier = stages_of(detector)[0].box_head.classifier
    hook = classifier.register_forward_hook(lambda _m, _i, output: seen.append(output))
    detector.detect(batch)
    hook.remove()
    return seen[0].clone()


def our_case(name: str, settings: Settings, pairs: int) -> Case:
    detector, recipe = our_detector(name, settings, pairs)
    optimizer = build_optimizer(detector, changed(recipe, {"optimizer.lr": RATE}).optimizer)
    batch = scene(settings)[0].to(settings.device)
    mask_head = stages_of(detector)[-1].mask_head
    assert mask_head is not None
    rows = count_rows(mask_head)

    def train() -> int:
        detector.train()
        with settings.autocast():
            losses = detector(batch)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return rows.pop()

    def infer() -> list[int]:
        detector.eval()
        with settings.autocast():
            found = detector.detect(batch)
        rows.clear()
        return [len(encode_masks(f.masks, f.boxes, f.image_hw)) for f in found]

    return Case(train=train, infer=infer)


def torchvision_case(name: str, settings: Settings, pairs: int) -> Case:
    detector, recipe = our_detector("table1/cross-entropy", settings, pairs)
    twin = build_twin(detector.cpu(), settings.size) if name == TWIN else build_stock(detector, settings.size)
    twin = twin.to(settings.device)
    del detector
    trainable = [p for p in twin.parameters() if p.requires_grad]
    momentum, decay = recipe.optimizer.momentum, recipe.optimizer.weight_decay
    optimizer = torch.optim.SGD(trainable, lr=RATE, momentum=momentum, weight_decay=decay, fused=True)
    batch, masks = scene(settings)
    masks = [mask.to(settings.device) for mask in masks]
    images, targets = twin_inputs(batch.to(settings.device), masks)
    rows = count_rows(twin.roi_heads.mask_head)

    def train() -> int:
        twin.train()
        with settings.autocast():
            losses = twin(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return rows.pop()

    @torch.no_grad()
    def infer() -> list[int]:
        twin.eval()
        with settings.autocast():
            found = twin(images)
        rows.clear()
        return [len(f["masks"]) for f in found]

    return Case(train=train, infer=infer)


def count_rows(module: torch.nn.Module) -> list[int]:
    """A list to which every call of a module adds its number of rows."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0].shape[0]))
    return rows


def make_case(name: str, settings: Settings, pairs: int) -> Case:
    return (torchvision_case if name in (TWIN, STOCK) else our_case)(name, settings, pairs)


def memory_of(names: tuple[str, ...], settings: Settings, pairs: int, task: str) -> list[int]:
    """Peak bytes of one call of each model, for a process of its own."""
    torch.set_num_threads(settings.threads)
    peaks = []
    for name in names:
        case = make_case(name, settings, pairs)
        peaks.append(harness.peak_memory(getattr(case, task), torch.device(settings.device)))
        del case
        gc.collect()  # modules and their hooks refer to each other
    return peaks


def compare(settings: Settings, names: tuple[str, ...], pairs: int, task: str, repeats: int) -> dict[str, Any]:
    """One table: every model at one task, timed in turn, and its memory."""
    device = torch.device(settings.device)
    cases = {name: make_case(name, settings, pairs) for name in names}
    checks = {name: getattr(case, task)() for name, case in cases.items()}
    times = harness.in_turn({name: getattr(case, task) for name, case in cases.items()}, repeats, device)
    del cases
    # The resident set keeps what was freed, so on CPU no model comes after another.
    groups = [names] if device.type == "cuda" else [(name,) for name in names]
    peaks = [p for group in groups for p in harness.in_own_process(memory_of, group, settings, pairs, task)]
    rows: dict[str, Any] = {}
    for name, peak in zip(names, peaks, strict=True):
        rows[name] = harness.summary(times[name], settings.batch)
        rows[name]["mask_rois" if task == "train" else "detections"] = checks[name]
        rows[name]["peak_bytes"] = peak
        for other in {TWIN, STOCK}.intersection(names) if name not in (TWIN, STOCK) else ():
            rows[name][f"times_as_fast_as_{other}"] = harness.speedup(times[name], times[other])
    return rows


def show(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}")
    heads = ("s/call", "(min-max)", "images/s", "CPU s/call", "GiB", "faster: clock", "CPU s", "than with defaults")
    widths = (9, 16, 10, 12, 7, 21, 21, 21)
    print(f"  {'model':26}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for name, row in rows.items():
        low, median, high = row["seconds"].values()
        stock = row.get(f"times_as_fast_as_{STOCK}", {})
        ratios = {**row.get(f"times_as_fast_as_{TWIN}", {}), "stock": stock.get("clock")}
        notes = ["{:.2f} ({:.2f}-{:.2f})".format(*ratio.values()) for ratio in ratios.values() if ratio]
        cells = (
            f"{median:.3f}",
            f"({low:.3f}-{high:.3f})",
            f"{row['images_per_second']:.3f}",
            f"{row['processor_seconds']['median']:.3f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            *notes,
        )
        print(f"  {name:26}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each model, after one that is not")
    parser.add_argument("--batch", type=int, default=2, help="images of a call")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="pixels")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs an image above the score threshold")
    parser.add_argument("--objects", type=int, default=12, help="annotated objects an image")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides the recipes")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument(
        "--models", nargs="+", default=[*OURS, TWIN, STOCK], help=f"recipes with a ResNet-50, {TWIN}, {STOCK}"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="time our parts instead of comparing")
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/throughput-DEVICE.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    torch.set_num_threads(options.threads)
    settings = Settings(
        device=options.device,
        batch=options.batch,
        size=(options.size[0], options.size[1]),
        classes=options.classes,
        precision=options.precision,
        pairs=options.pairs,
        objects=options.objects,
        overrides=tuple(options.set),
        threads=options.threads,
    )
    kind = "profile" if options.profile else "throughput"
    suffix = options.device if settings.precision == "fp32" else f"{options.device}-{settings.precision}"
    out = options.out or harness.RESULTS / f"{kind}-{suffix}.json"
    result: dict[str, Any] = {"machine": harness.machine(device), "settings": asdict(settings)}
    if options.profile:
        result["profile"] = {
            task: profile(
                our_detector(options.models[0], settings, settings.pairs)[0],
                scene(settings)[0].to(settings.device),
                task,
                options.repeats,
                autocast=settings.autocast,
                title=options.models[0],
            )
            for task in ("train", "infer")
        }
        harness.write_json(out, result)
    else:
        for task in options.tasks:
            pairs = 0 if task == "infer-untrained" else settings.pairs
            # The model with default settings has its own weights, which nothing shifts.
            names = tuple(name for name in options.models if name != STOCK or task != "infer")
            result[task] = compare(settings, names, pairs, task.split("-")[0], options.repeats)
            harness.write_json(out, result)
            show(f"{task}, batch {settings.batch}, {settings.precision} on {settings.device}", result[task])


if __name__ == "__main__":
    main()
