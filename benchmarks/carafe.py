"""What CARAFE costs in a mask head: time and memory of forward and backward, 14 x 14 RoI features to 28 x 28.

    python benchmarks/carafe.py                       # CPU, two threads, four minutes, 10 GB at the peak
    python benchmarks/carafe.py --device cuda

Ours is `tailseg.layers.carafe.CarafeUpsample`, the network that predicts its kernels included. Named alternatives:

- nearest: nearest-neighbour upsampling and a 3x3 convolution, as feature pyramids upsample;
- textbook: CARAFE, of the same weights, in three operations: unfold the input, enlarge that to the output's size,
  multiply by the kernels and sum. Its output must equal ours.

Cases take turns. Memory is the peak beyond what was there before the call (weights and features), gradients included.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as our command line sets it

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers.carafe import CarafeUpsample, normalized_kernels

SIDE = 14
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Nearest(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return y


class Textbook(CarafeUpsample):
    def forward(self, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        kernels = normalized_kernels(self.encode(x), self.groups, self.scale)
        patches = F.unfold(x, self.kernel_size, padding=self.kernel_size // 2).view(count, -1, height, width)
        patches = F.interpolate(patches, scale_factor=self.scale, mode="nearest")
        patches = patches.view(count, channels, -1, *kernels.shape[2:])
        return (patches * kernels.unsqueeze(1)).sum(2)


CASES = {"ours": CarafeUpsample, "nearest": Nearest, "textbook": Textbook}


def step_of(name: str, options: argparse.Namespace) -> Callable[[], Tensor]:
    """Forward and backward of a case, from a seed; returns the output."""
    torch.manual_seed(0)
    layer = CASES[name](options.channels)
    if isinstance(layer, CarafeUpsample):
        nn.init.normal_(layer.encoder.weight, std=0.1)  # so that kernels are no plain averages
    layer = layer.to(options.device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    shapes = [(options.rois, options.channels, side, side) for side in (SIDE, 2 * SIDE)]
    dtype = PRECISIONS[options.precision]
    x, upstream = (
        torch.randn(shape, generator=generator).to(options.device, dtype, memory_format=torch.channels_last)
        for shape in shapes
    )
    x.requires_grad_()

    def step() -> Tensor:
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
            out: Tensor = layer(x)
        torch.autograd.grad(out, (x, *layer.parameters()), upstream.to(out.dtype))
        return out.detach()

    return step


def memory_of(name: str, options: argparse.Namespace) -> int:
    """Bytes that a step takes at its peak, in a process of its own."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    # On CUDA compile and load first. On CPU do not: what the first call frees would count as there before the second.
    if device.type == "cpu":
        return harness.peak_memory(step_of(name, options), device)
    step = step_of(name, options)
    step()
    before = torch.cuda.memory_allocated(device)
    return harness.peak_memory(step, device) - before


def largest_difference(options: argparse.Namespace) -> float:
    """Between ours and the textbook's output, as a share of the largest value.

    Raises:
        AssertionError: it is more than rounding explains.
    """
    ours, textbook = (step_of(name, options)().float() for name in ("ours", "textbook"))
    difference = float((ours - textbook).abs().max() / textbook.abs().max())
    assert difference < {"fp32": 1e-5, "bf16": 2e-2}[options.precision], f"ours and the textbook differ by {difference}"
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=tuple(PRECISIONS))
    parser.add_argument("--rois", type=int, default=128)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/carafe-DEVICE.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "machine": harness.machine(device),
        "settings": {"side": SIDE, **{key: getattr(options, key) for key in ("precision", "rois", "channels")}},
        "largest_difference": largest_difference(options),
    }
    steps = {name: step_of(name, options) for name in CASES}
    for step in steps.values():
        step()
    times = harness.in_turn(steps, options.repeats, device)
    peaks = {name: harness.in_own_process(memory_of, name, options) for name in CASES}
    result["cases"] = {
        name: {
            **harness.summary(times[name], options.rois),
            "peak_bytes": peaks[name],
            "ours_is_faster_by": harness.speedup(times["ours"], times[name]),
            "memory_over_ours": peaks[name] / peaks["ours"],
        }
        for name in CASES
    }
    print(f"{'':10}{'ms':>9}{'MiB':>9}   over ours: time (range over turns), memory")
    for name, row in result["cases"].items():
        ratio = row["ours_is_faster_by"]["clock"]
        print(
            f"{name:10}{1e3 * row['seconds']['median']:9.1f}{row['peak_bytes'] / 2**20:9.0f}"
            f"{ratio['of_medians']:15.2f} ({ratio['smallest']:.2f}-{ratio['largest']:.2f})"
            f"{row['memory_over_ours']:10.2f}"
        )
    harness.write_json(options.out or harness.RESULTS / f"carafe-{options.device}.json", result)


if __name__ == "__main__":
    main()
