"""What HTC-Lite saves against HTC: parameters, time and memory of training and inference, LVIS's 1203 classes.

    python benchmarks/htc_lite.py                         # CPU, four minutes of processor time
    python benchmarks/htc_lite.py --device cuda --batch 2 --size 800 1216 --precision bf16

The report (section 1.2) gives HTC one mask head instead of three, without interleaved information passing. Compared:

- one mask head: `table2/04-htc-lite`, without batch norm in it, as in HTC;
- three mask heads: the same with a mask head in every stage;
- HTC: three mask heads in a chain, each adding a 1x1 convolution of the one before it to its RoI features, trained on
  RoIs drawn again from its stage's refined boxes. HTC's semantic branch is left out, the context encoder left in.

All but the mask heads has the same random weights, so boxes are the same. Two things are as in a trained model: some
proposals lie on the objects, so that there are RoIs to learn masks from (``--positives`` an image and stage, 128 at
most), and the classifiers are shifted until ``--pairs`` (box, class) pairs an image score above the threshold.
Inference ends with 300 run-length codes, a training step with the optimiser.

Cases take turns. A ratio is that of the medians, its spread the smallest and largest within a turn: by the clock and by
processor time over all threads, which hardly minds that others use the processor too. Memory is the most that a call
holds at once beyond what was there before it (weights and optimiser), gradients included.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

import harness
import torch
from losses import held_memory
from throughput import LOGIT_DEVIATION, RATE, Settings, count_rows, scene
from torch import Tensor, nn
from torchvision_twin import stages_of

from tailseg.layers.paste import encode_masks
from tailseg.model.boxes import clip
from tailseg.model.build import build_detector
from tailseg.model.context import ContextEncoder
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed, override
from tailseg.structures import Batch, Proposals, RawDetections
from tailseg.training.optimizer import build_optimizer

ONE, THREE, HTC = "one mask head (HTC-Lite)", "three mask heads", "HTC"
CHAINED = {"model.mask_head.flow": True, "model.mask_head.interleaved": True}
TASKS = ("train", "infer")
JITTER = 0.04  # of a side: the boxes on objects overlap them by 0.7 at least, as stage 3 asks for


def detectors_of(settings: Settings, batch: Batch, positives: int) -> tuple[dict[str, Detector], Recipe]:
    """The three, equal but for their mask heads, with what makes their work that of trained ones."""
    recipe = override(resolve("table2/04-htc-lite", ["model.mask_head.norm=false"]), settings.overrides)
    weights = [stage.weight for stage in recipe.model.stages]
    every_stage = override(recipe, [f"model.stages.{i}.mask_weight={weight}" for i, weight in enumerate(weights)])
    torch.manual_seed(0)
    detectors: dict[str, Detector] = {
        ONE: build_detector(recipe, settings.classes),
        THREE: build_detector(every_stage, settings.classes),
        HTC: build_detector(changed(every_stage, CHAINED), settings.classes),
    }
    on_objects = jittered(batch.boxes, positives, batch.image_sizes)
    for detector in detectors.values():
        detector.to(settings.device).to(memory_format=torch.channels_last)
        mock.patch.object(detector.rpn, "propose", with_boxes(detector.rpn.propose, on_objects)).start()
    shift_classifiers(detectors[ONE], batch, settings.pairs)
    shared = {name: value for name, value in detectors[ONE].state_dict().items() if "mask_head" not in name}
    for detector in detectors.values():
        missing, unknown = detector.load_state_dict(shared, strict=False)
        assert not unknown
        assert all("mask_head" in name for name in missing)
    return detectors, recipe


def jittered(boxes: Tensor, number: int, image_sizes: Tensor) -> Tensor:
    """Boxes (B, P, 4) beside the objects' (B, G, 4), which count as P + G = ``number`` positives together."""
    count = max(number - boxes.shape[1], 0)
    near = boxes[:, torch.arange(count) % boxes.shape[1]]
    generator = torch.Generator().manual_seed(2)
    moves = (2 * torch.rand(near.shape, generator=generator) - 1).to(near) * JITTER
    return clip(near + moves * (near[..., 2:] - near[..., :2]).repeat(1, 1, 2), image_sizes)


def with_boxes(propose: Callable[..., Proposals], boxes: Tensor) -> Callable[..., Proposals]:
    """An RPN's `propose` whose first proposals are ``boxes`` (B, P, 4)."""

    def proposals(*arguments: Any, **options: Any) -> Proposals:
        own = propose(*arguments, **options)
        rest = own.boxes.shape[1] - boxes.shape[1]
        valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
        return Proposals(
            boxes=torch.cat([boxes, own.boxes[:, :rest]], dim=1),
            scores=own.scores,
            valid=torch.cat([valid, own.valid[:, :rest]], dim=1),
        )

    return proposals


@torch.no_grad()
def shift_classifiers(detector: Detector, batch: Batch, pairs: int) -> None:
    """Give every stage's classes logits of mean 0 over the RoIs, and background so much that ``pairs`` an image stay
    above the score threshold, as in a trained model, in which most of 1.2 million do not."""
    layers = [stage.box_head.classifier for stage in stages_of(detector)]
    classification = stages_of(detector)[-1].box_head.classification
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for layer in layers]
    detector.eval()
    detector.detect(batch)
    for hook in hooks:
        hook.remove()
    scaled = []
    for layer, logits in zip(layers, seen, strict=True):
        factor = LOGIT_DEVIATION / logits.std(0).mean()
        layer.weight *= factor
        layer.bias.copy_((layer.bias - logits.mean(0)) * factor)
        scaled.append((logits - logits.mean(0)) * factor)
    mean = torch.stack(scaled).mean(0)
    low, high = -50.0, 50.0
    for _ in range(40):
        shift = (low + high) / 2
        shifted = mean.clone()
        shifted[:, -1] += shift
        above = int((classification.scores(shifted)[:, :-1] > detector.score_threshold).sum())
        low, high = (shift, high) if above > pairs * len(batch) else (low, shift)
    for layer in layers:
        layer.bias[-1] += low


def train_call(detector: Detector, recipe: Recipe, batch: Batch, settings: Settings) -> Callable[[], list[int]]:
    """A training step; returns the RoIs that each mask head has learnt from."""
    optimizer = build_optimizer(detector, changed(recipe, {"optimizer.lr": RATE}).optimizer)
    rows = [count_rows(stage.mask_head.upsample) for stage in stages_of(detector) if stage.mask_head is not None]
    for parameter in (p for p in detector.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the momentum, which belongs to no step
    optimizer.zero_grad()

    def step() -> list[int]:
        detector.train()
        with settings.autocast():
            losses = detector(batch)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return [own.pop() for own in rows]

    return step


def infer_call(detector: Detector, batch: Batch, settings: Settings) -> Callable[[], list[RawDetections]]:
    def run() -> list[RawDetections]:
        detector.eval()
        with settings.autocast():
            found = detector.detect(batch)
        for own in found:
            encode_masks(own.masks, own.boxes, own.image_hw)
        return found

    return run


def compare(cases: dict[str, Callable[[], Any]], settings: Settings, repeats: int) -> tuple[dict[str, Any], list[Any]]:
    """Times and memory of every case, and how many times as much it takes as the first; what each returned."""
    device = torch.device(settings.device)
    warmed = {name: warmed_up(call, device) for name, call in cases.items()}
    times = harness.in_turn(cases, repeats, device)
    first = next(iter(cases))
    rows = {
        name: harness.summary(times[name], settings.batch)
        | {
            "bytes": warmed[name][1],
            "time_ratio": harness.speedup(times[first], times[name]),
            "memory_ratio": warmed[name][1] / warmed[first][1],
        }
        for name in cases
    }
    return rows, [value for value, _ in warmed.values()]


def warmed_up(call: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What a first call returns, and the most bytes that it holds at once (on CUDA a second one, kernels loaded)."""
    returned: list[Any] = []
    warm_up = call if device.type == "cuda" else lambda: None
    calls = iter((warm_up, lambda: returned.append(call())))
    held = held_memory(lambda: next(calls)(), device)
    return returned[0], held


def context_calls(detector: Detector, batch: Batch, rois: list[tuple[int, int]], *, train: bool) -> Callable[[], None]:
    """What a call does for the context: the encoder, its loss, the sum with RoI features; the backward pass of each.

    ``rois`` are the RoIs and the side of every pooling.
    """
    assert detector.context is not None
    encoder: ContextEncoder = detector.context
    with torch.no_grad():
        coarsest = detector.pyramid(batch.images, batch.image_sizes)[-1]
    channels = coarsest.shape[1]
    pooled = [torch.randn(count, channels, side, side, device=coarsest.device) for count, side in rois]
    images = [torch.arange(count, device=coarsest.device) % len(batch) for count, _ in rois]
    leaves = [coarsest.requires_grad_(), *encoder.parameters()]

    def call() -> None:
        encoder.train(train)
        with torch.set_grad_enabled(train):
            logits, context = encoder(coarsest, batch.image_sizes)
            sums = [maps + context[own][:, :, None, None] for maps, own in zip(pooled, images, strict=True)]
            if train:
                loss = encoder.loss(logits, batch.labels, batch.valid, batch.absent)
                torch.autograd.grad([loss, *sums], leaves, [torch.ones_like(loss), *pooled])

    return call


def parameters(detector: Detector) -> dict[str, int]:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert detector.context is not None
    heads = [stage.mask_head for stage in stages_of(detector) if stage.mask_head is not None]
    return {
        "all": count(detector),
        "mask_heads": count(nn.ModuleList(heads)),
        "context_encoder": count(detector.context),
    }


def require_same_boxes(found: list[list[RawDetections]]) -> list[int]:
    """Detections of each image.

    Raises:
        AssertionError: the detectors do not find the same boxes, so what follows would not be equal work.
    """
    first, *others = found
    for own in others:
        for a, b in zip(first, own, strict=True):
            torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=1e-2)
            assert torch.equal(a.labels, b.labels)
    return [len(own) for own in first]


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}\n  {'':26}{'s/call':>8}{'CPU s':>8}{'MiB':>8}   times as much: clock, CPU s, memory")
    for name, row in rows.items():
        ratios = ["{:.2f} ({:.2f}-{:.2f})".format(*ratio.values()) for ratio in row["time_ratio"].values()]
        print(
            f"  {name:26}{row['seconds']['median']:8.2f}{row['processor_seconds']['median']:8.2f}"
            f"{row['bytes'] / 2**20:8.0f}   " + "".join(f"{r:20}" for r in ratios) + f"{row['memory_ratio']:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--repeats", type=int, default=3, help="turns of each case")
    parser.add_argument("--batch", type=int, default=1, help="images of a call")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="pixels")
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs an image above the score threshold")
    parser.add_argument("--objects", type=int, default=12, help="annotated objects an image")
    parser.add_argument("--positives", type=int, default=64, help="positive RoIs an image and stage, about")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides the recipe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/htc_lite-DEVICE.json")
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
    batch = scene(settings)[0].to(device)
    detectors, recipe = detectors_of(settings, batch, options.positives)
    counts = {name: parameters(detector) for name, detector in detectors.items()}
    result: dict[str, Any] = {
        "machine": harness.machine(device) | {"omp_wait_policy": os.environ["OMP_WAIT_POLICY"]},
        "settings": asdict(settings) | {"positives": options.positives, "repeats": options.repeats},
        "parameters": counts,
        "parameters_ratio": {name: own["all"] / counts[ONE]["all"] for name, own in counts.items()},
    }
    print(f"  {'':26}{'parameters':>12}{'mask heads':>12}   times as many")
    for name, own in counts.items():
        print(f"  {name:26}{own['all']:12,}{own['mask_heads']:12,}   {result['parameters_ratio'][name]:.3f}")

    infer = {name: infer_call(detector, batch, settings) for name, detector in detectors.items()}
    result["infer"], outputs = compare(infer, settings, options.repeats)
    found = result["infer"][ONE]["detections"] = require_same_boxes(outputs)
    show(f"infer, {found} detections", result["infer"])
    train = {name: train_call(detector, recipe, batch, settings) for name, detector in detectors.items()}
    result["train"], rows = compare(train, settings, options.repeats)
    for own, counted in zip(result["train"].values(), rows, strict=True):
        own["mask_rois"] = counted
    show(f"train, mask RoIs of each stage: {', '.join(map(str, rows))}", result["train"])

    model = recipe.model
    proposals, sampled = options.batch * model.rpn.post_nms_test, options.batch * model.box_head.rois
    pooled = {
        "infer": [(proposals, 7)] * 3 + [(sum(found), 14)],
        "train": [(sampled, 7)] * 3 + [(sum(rows[0]), 14)],
    }
    result["context"] = {}
    for task in TASKS:
        call = context_calls(detectors[ONE], batch, pooled[task], train=task == "train")
        call()
        times = harness.in_turn({task: call}, 3 * options.repeats, device)[task]
        row = result["context"][task] = harness.summary(times, options.batch)
        for kind in ("seconds", "processor_seconds"):
            row[f"share_of_{kind}"] = row[kind]["median"] / result[task][ONE][kind]["median"]
    share = counts[ONE]["context_encoder"] / counts[ONE]["all"]
    shares = " and ".join(f"{result['context'][t]['share_of_processor_seconds']:.1%} of CPU s to {t}" for t in TASKS)
    print(f"\ncontext encoder: {counts[ONE]['context_encoder']:,} parameters ({share:.1%} of HTC-Lite's), {shares}")
    harness.write_json(options.out or harness.RESULTS / f"htc_lite-{options.device}.json", result)


if __name__ == "__main__":
    main()
