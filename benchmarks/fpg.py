"""What a feature pyramid grid costs over FPN: time of forward and backward on the same C2..C5, and parameters.

    python benchmarks/fpg.py                       # CPU, two threads, four minutes
    python benchmarks/fpg.py --device cuda

Cases: FPN; FPG of nine pathways; the enhanced FPG of the report, with DCNv2 and CARAFE. C2..C5 are those of a
ResNet-50 or a ResNeSt (256 to 2048 channels) for images of the given size; a step goes back to them and to all weights.
Batch norm uses the statistics of the batch.

Also timed, alone: DCNv2's sums at stride 4, forward and backward, by our way (weighted bags of rows on the CPU, Triton
on CUDA) and by torchvision's operator, which is given float32 where we take bfloat16.

Cases take turns. A ratio is that of the medians, its spread the smallest and largest within a turn: by the clock and by
processor time over all threads, which hardly minds that others use the processor too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

import harness
import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from tailseg.layers.deform_conv import ModulatedDeformConv2d, gathered_deform_conv2d, triton_deform_conv2d
from tailseg.model.fpg import FPG
from tailseg.model.fpn import FPN

STRIDES = (4, 8, 16, 32)
IN_CHANNELS = (256, 512, 1024, 2048)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def necks_of(channels: int, device: torch.device) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    necks: dict[str, nn.Module] = {
        "FPN": FPN(IN_CHANNELS, channels, norm=False),
        "FPG": FPG(IN_CHANNELS, channels, pathways=9, deformable=False, carafe=False),
        "enhanced FPG": FPG(IN_CHANNELS, channels, pathways=9, deformable=True, carafe=True),
    }
    for layer in necks["enhanced FPG"].modules():
        if isinstance(layer, ModulatedDeformConv2d):
            assert layer.conv_offset.bias is not None
            nn.init.normal_(layer.conv_offset.bias)  # taps that lie between cells, as learnt ones do
    return {name: neck.to(device).to(memory_format=torch.channels_last) for name, neck in necks.items()}


def features_of(options: argparse.Namespace) -> list[Tensor]:
    """C2..C5, channels_last as the backbone gives them."""
    generator = torch.Generator().manual_seed(0)
    sizes = [[-(-side // stride) for side in options.size] for stride in STRIDES]
    maps = [torch.randn(options.batch, c, *s, generator=generator) for c, s in zip(IN_CHANNELS, sizes, strict=True)]
    dtype = PRECISIONS[options.precision]
    return [m.relu().to(options.device, dtype, memory_format=torch.channels_last).requires_grad_() for m in maps]


def step_of(neck: nn.Module, features: list[Tensor], options: argparse.Namespace) -> Callable[[], object]:
    leaves = [*features, *neck.parameters()]

    def step() -> object:
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
            pyramid = neck(features)
        return torch.autograd.grad(pyramid, leaves, [torch.ones_like(level) for level in pyramid])

    return step


def sums_of(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """DCNv2's sums of 3x3 taps both ways, gradients to features, shifts, weights and modulation included."""
    generator = torch.Generator().manual_seed(0)
    height, width = (-(-side // STRIDES[0]) for side in options.size)
    shapes = ((options.batch, c, height, width) for c in (options.channels, 18, 9))
    maps = [torch.randn(shape, generator=generator) for shape in shapes]
    features, shifts, modulation = (m.to(options.device, memory_format=torch.channels_last) for m in maps)
    weight = torch.randn(options.channels, options.channels, 3, 3, generator=generator).to(options.device) / 48
    dtype = PRECISIONS[options.precision]
    leaves = [part.requires_grad_() for part in (features.to(dtype), shifts, modulation, weight)]

    def case(way: Callable[..., Tensor], own: torch.dtype) -> Callable[[], object]:
        def call() -> object:
            x, shifts, modulation, weight = leaves
            out = way(x.to(own), shifts, weight.to(own), None, (1, 1), (1, 1), (1, 1), modulation)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        return call

    ours = triton_deform_conv2d if options.device == "cuda" else gathered_deform_conv2d
    return {"ours": case(ours, dtype), "torchvision's": case(deform_conv2d, torch.float32)}


def show(start: str, row: dict[str, Any], ratio: str) -> None:
    clock, processor = row[ratio]["clock"], row[ratio]["processor"]
    print(
        f"{start}{1e3 * row['seconds']['median']:10.1f}"
        f"{clock['of_medians']:10.2f} ({clock['smallest']:.2f}-{clock['largest']:.2f})"
        f"{processor['of_medians']:10.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=tuple(PRECISIONS))
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), help="of the images: height, width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, default=256, help="of the pyramids")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/fpg-DEVICE.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    torch.set_num_threads(options.threads)
    necks = necks_of(options.channels, device)
    features = features_of(options)
    steps = {name: step_of(neck, features, options) for name, neck in necks.items()}
    sums = sums_of(options)
    for step in (*steps.values(), *sums.values()):
        step()  # the first call loads kernels and finds memory
    times = harness.in_turn(steps, options.repeats, device)
    sum_times = harness.in_turn(sums, options.repeats, device)
    names = ("precision", "batch", "channels", "repeats")
    result: dict[str, Any] = {
        "machine": harness.machine(device) | {"omp_wait_policy": os.environ["OMP_WAIT_POLICY"]},
        "settings": {name: getattr(options, name) for name in names} | {"size": list(options.size)},
        "necks": {
            name: {
                **harness.summary(times[name], options.batch),
                "parameters": sum(p.numel() for p in neck.parameters()),
                "time_over_fpn": harness.speedup(times["FPN"], times[name]),
            }
            for name, neck in necks.items()
        },
        "sums": {
            name: {
                **harness.summary(sum_times[name], options.batch),
                "time_over_ours": harness.speedup(sum_times["ours"], sum_times[name]),
            }
            for name in sums
        },
    }
    print(f"{'':14}{'parameters':>12}{'ms':>10}   over FPN: by the clock (range over turns), by processor time")
    for name, row in result["necks"].items():
        show(f"{name:14}{row['parameters']:12,}", row, "time_over_fpn")
    print(f"\n{'DCNv2':26}{'ms':>10}   over ours: likewise")
    for name, row in result["sums"].items():
        show(f"{name:26}", row, "time_over_ours")
    harness.write_json(options.out or harness.RESULTS / f"fpg-{options.device}.json", result)


if __name__ == "__main__":
    main()
