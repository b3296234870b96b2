"""Training convolutions on a CPU: with gradients of our own (`tailseg.layers.conv`) and as PyTorch has them.

    python benchmarks/convolutions.py [--threads 2] [--repeats 7]

Forward and backward pass of single layers, in turn, at the sizes that they have in a step of `table1/seesaw` (two
images of 480 x 640) and of the demo (eight of 96 x 96). Processor time is what counts: it hardly minds who else is
there. Writes benchmarks/results/convolutions-cpu.json.
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

from tailseg.layers.conv import train_fast

CPU = torch.device("cpu")
WORK, MOST_STEPS = 3e9, 200  # multiplications that are timed at a time: as many steps of a layer, within reason
Made = tuple[Callable[[], nn.Module], tuple[int, ...]]  # a layer, and the maps that it is given
LARGE: dict[str, Made] = {
    "3x3, FPN": (lambda: nn.Conv2d(256, 256, 3, padding=1), (2, 256, 120, 160)),
    "3x3, ResNet's fourth stage": (lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False), (2, 512, 15, 20)),
    "3x3, stride 2": (lambda: nn.Conv2d(256, 256, 3, 2, padding=1, bias=False), (2, 256, 60, 80)),
    "3x3, mask head": (lambda: nn.Conv2d(256, 256, 3, padding=1), (64, 256, 14, 14)),
    "2x2 transposed, mask head": (lambda: nn.ConvTranspose2d(256, 256, 2, 2), (64, 256, 14, 14)),
    "1x1, narrower": (lambda: nn.Conv2d(1024, 256, 1, bias=False), (2, 1024, 30, 40)),
    "1x1, wider": (lambda: nn.Conv2d(256, 1024, 1, bias=False), (2, 256, 30, 40)),
}
SMALL: dict[str, Made] = {
    "1x1, 96 to 24 on 24 x 24": (lambda: nn.Conv2d(96, 24, 1, bias=False), (8, 96, 24, 24)),
    "1x1, 40 to 240 on 12 x 12": (lambda: nn.Conv2d(40, 240, 1, bias=False), (8, 40, 12, 12)),
    "1x1, 112 to 672 on 6 x 6": (lambda: nn.Conv2d(112, 672, 1, bias=False), (8, 112, 6, 6)),
    "1x1, 1152 to 192 on 3 x 3": (lambda: nn.Conv2d(1152, 192, 1, bias=False), (8, 1152, 3, 3)),
    "5x5 depthwise on 3 x 3": (lambda: nn.Conv2d(1152, 1152, 5, padding=2, groups=1152, bias=False), (8, 1152, 3, 3)),
}


def call_of(layer: nn.Module, maps: Tensor, times: int) -> Callable[[], None]:
    """A function: so many training steps of a layer."""
    layer = layer.to(memory_format=torch.channels_last)
    maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(layer(maps))

    def call() -> None:
        for _ in range(times):
            maps.grad = None
            layer.zero_grad()
            layer(maps).backward(grad)

    return call


def ours(make: Callable[[], nn.Module]) -> nn.Module:
    layer = nn.Sequential(make())
    train_fast(layer)
    return layer


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(shape, generator=generator)
    work = sum(p.numel() for p in make().parameters()) * shape[0] * shape[2] * shape[3]
    steps = min(MOST_STEPS, max(1, round(WORK / work)))
    cases = {name: call_of(layer, maps.clone(), steps) for name, layer in (("ours", ours(make)), ("PyTorch's", make()))}
    harness.in_turn(cases, 1, CPU)
    times = harness.in_turn(cases, repeats, CPU)
    return {
        **{name: harness.summary(each, shape[0] * steps) for name, each in times.items()},
        "speedup": harness.speedup(times["ours"], times["PyTorch's"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="only the demo's layers")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if min(options.threads, options.repeats) < 1:
        parser.error("--threads and --repeats: at least 1")
    torch.set_num_threads(options.threads)
    rows = {}
    for name, made in (SMALL if options.small else LARGE | SMALL).items():
        rows[name] = row = measure(*made, options.repeats)
        ratio = row["speedup"]["processor"]
        print(f"{name}: x {ratio['of_medians']:.2f} ({ratio['smallest']:.2f}-{ratio['largest']:.2f})", flush=True)
    settings = {"threads": options.threads, "repeats": options.repeats}
    content = {"machine": harness.machine(CPU), "settings": settings, "layers": rows}
    harness.write_json(options.out or harness.RESULTS / "convolutions-cpu.json", content)


if __name__ == "__main__":
    main()
