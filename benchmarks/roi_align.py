"""What the RoI poolings of a training step cost: forward and backward, time, memory and launches.

    python benchmarks/roi_align.py                  # CPU, two threads
    python benchmarks/roi_align.py --device cuda --precision bf16

A step pools RoIs to 7 x 7 once for each stage and a quarter of them to 14 x 14, from the pyramid of a batch. Ours is
`ImageFeatures` as it is on the device: on CUDA one launch for each pooling and one gradient buffer for all, on a CPU a
table of all levels. Named alternatives, on the same RoIs:

- level by level: torchvision's operator on every level for all RoIs, those of other levels without extent, and the sum,
  as we did it on CUDA;
- torchvision: the RoIs of every level picked and pooled by themselves, as its detectors do it; on CUDA that waits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as our command line sets it

import harness
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torchvision.ops import roi_align

from tailseg.model.roi_features import ImageFeatures, RoIPooler, planar, roi_levels

STRIDES = (4, 8, 16, 32)
SIZES = (7, 14)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pyramid_of(options: argparse.Namespace) -> list[Tensor]:
    """P2..P6 of a batch, channels_last."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for stride in (*STRIDES, 64):
        shape = (options.batch, options.channels, *(-(-side // stride) for side in options.size))
        own = torch.randn(shape, generator=generator).to(options.device, PRECISIONS[options.precision])
        maps.append(own.contiguous(memory_format=torch.channels_last).requires_grad_())
    return maps


def rois_of(options: argparse.Namespace) -> Tensor:
    """RoIs (R, 5) as large as LVIS objects and proposals are: a median of 64 pixels, some as large as the image."""
    generator = torch.Generator().manual_seed(1)
    height, width = options.size
    image_wh = torch.tensor([width, height])
    count = options.batch * options.rois
    sides = torch.minimum(torch.exp(4.2 + torch.randn(count, 2, generator=generator)).clamp(8), image_wh)
    corners = torch.rand(count, 2, generator=generator) * (image_wh - sides)
    images = torch.arange(options.batch).repeat_interleave(options.rois).unsqueeze(1)
    return torch.cat([images, corners, corners + sides], dim=1).to(options.device)


def level_by_level(maps: Sequence[Tensor], rois: Tensor, side: int) -> Tensor:
    levels, parts = roi_levels(rois[:, 1:], len(STRIDES)), []
    for level, stride in enumerate(STRIDES):
        here = (levels == level).unsqueeze(1)
        own = torch.cat([rois[:, :1], torch.where(here, rois[:, 1:], rois[:, 1:3].repeat(1, 2))], dim=1)
        parts.append(roi_align(maps[level], own, side, 1 / stride, 0, aligned=True))
    return torch.stack(parts).sum(dim=0)


def picked(maps: Sequence[Tensor], rois: Tensor, side: int, sampling: int = 0) -> Tensor:
    """As torchvision's detectors pool: the RoIs of every level by themselves."""
    levels = roi_levels(rois[:, 1:], len(STRIDES))
    pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side)
    for level, stride in enumerate(STRIDES):
        rows = (levels == level).nonzero().squeeze(1)
        pooled[rows] = roi_align(maps[level], rois[rows], side, 1 / stride, sampling, aligned=True)
    return pooled


def step_of(name: str, options: argparse.Namespace) -> Callable[[], list[Tensor]]:
    """A step's poolings and their gradients; returns those of P2..P5 and of every pooling the mean feature."""
    pyramid, rois = pyramid_of(options), rois_of(options)
    wanted = [(SIZES[0], rois)] * options.stages + [(SIZES[1], rois[::4])]

    def pooled() -> list[Tensor]:
        if name == "ours":
            features = ImageFeatures(pyramid)
            return [
                features.pool(RoIPooler(side, STRIDES, sampling_ratio=0, aligned=True))(own) for side, own in wanted
            ]
        way, maps = {"level by level": level_by_level, "torchvision": picked}[name], planar(pyramid)
        return [way(maps, own, side) for side, own in wanted]

    def step() -> list[Tensor]:
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
            found = pooled()
        grads = torch.autograd.grad(found, pyramid[:4], [torch.ones_like(each) for each in found])
        return [*grads, *(each.detach().float().mean() for each in found)]

    return step


NAMES = ("ours", "level by level", "torchvision")


def largest_difference(options: argparse.Namespace) -> float:
    """Between ours and the others, as a share of the largest value.

    Raises:
        AssertionError: it is more than rounding explains.
    """
    ours, *others = (step_of(name, options)() for name in NAMES)
    difference = max(
        float((one.float() - other.float()).abs().max() / other.float().abs().max())
        for theirs in others
        for one, other in zip(ours, theirs, strict=True)
    )
    assert difference < {"fp32": 1e-3, "bf16": 2e-2}[options.precision], f"ours and the others differ by {difference}"
    return difference


def launches(step: Callable[[], object]) -> int:
    """Kernels, copies and fills that a step starts on the device."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum(str(event.device_type).endswith("CUDA") for event in found.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=tuple(PRECISIONS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1344], metavar=("H", "W"), help="pixels")
    parser.add_argument("--rois", type=int, default=512, help="of an image")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--stages", type=int, default=1, help="poolings to 7 x 7")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/roi_align-DEVICE.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    torch.set_num_threads(options.threads)
    settings = ("precision", "batch", "size", "rois", "channels", "stages", "repeats")
    result: dict[str, Any] = {
        "machine": harness.machine(device),
        "settings": {name: getattr(options, name) for name in settings},
        "largest_difference": largest_difference(options),
    }
    steps = {name: step_of(name, options) for name in NAMES}
    for step in steps.values():
        step()
    times = harness.in_turn(steps, options.repeats, device)
    result["cases"] = {
        name: {
            **harness.summary(times[name], options.batch),
            "ours_is_faster_by": harness.speedup(times["ours"], times[name]),
            **({"launches": launches(step), "peak_bytes": _peak(step, device)} if device.type == "cuda" else {}),
        }
        for name, step in steps.items()
    }
    print(f"{'':16}{'ms':>9}   over ours (range over turns)   launches, MiB on CUDA")
    for name, row in result["cases"].items():
        ratio = row["ours_is_faster_by"]["clock"]
        more = f"{row['launches']:8} {row['peak_bytes'] / 2**20:.0f}" if "launches" in row else ""
        print(
            f"{name:16}{1e3 * row['seconds']['median']:9.2f}"
            f"{ratio['of_medians']:9.2f} ({ratio['smallest']:.2f}-{ratio['largest']:.2f}){more}"
        )
    harness.write_json(options.out or harness.RESULTS / f"roi_align-{options.device}.json", result)


def _peak(step: Callable[[], object], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    return harness.peak_memory(step, device) - before


if __name__ == "__main__":
    main()
