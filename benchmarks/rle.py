"""Masks of one image's detections to run-length codes: ours, inside each box, beside painting every full mask.

    python benchmarks/rle.py                      # CPU, half a minute
    python benchmarks/rle.py --device cuda --detections 600 --size 960 1280

The named alternative samples each 28 x 28 grid at every pixel centre of the image (`grid_sample`, zeros outside),
thresholds at 0.5 and encodes with pycocotools; ours must equal its masks. Beside it runs torchvision's
`paste_masks_in_image`, which rounds the boxes and resizes inside them before it copies into the image, and so is
cheaper and not exact. On CUDA ours also runs as it does on a CPU, the grids copied first. Boxes are as large as
detections are: half of them up to 33 pixels, some as large as the image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from tailseg.layers.paste import Rle, encode_masks

TARGETS = {"speedup": 5.0, "pixels_that_differ": 1e-4}


def detections(count: int, image_hw: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Grids (N, 28, 28) of blobs with frayed edges, and boxes (N, 4), xyxy inside the image."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image_hw
    coarse = torch.randn(count, 1, 5, 5, generator=generator)
    axis = torch.linspace(-1, 1, 28)
    dome = 4 - 5 * (axis[:, None] ** 2 + axis**2)
    noise = F.interpolate(coarse, size=28, mode="bilinear", align_corners=True)[:, 0]
    probs = (dome + 2 * noise + 0.3 * torch.randn(count, 28, 28, generator=generator)).sigmoid()
    # Sides of LVIS objects: log-normal, median 32 pixels.
    sides = torch.exp(3.5 + torch.randn(count, 2, generator=generator)).clamp(4)
    sides = torch.minimum(sides, torch.tensor([width, height]))
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return probs, torch.cat([corner, corner + sides], dim=1)


def paint(probs: Tensor, boxes: Tensor, image_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """One full mask (H, W), Fortran order."""
    height, width = image_hw
    x1, y1, x2, y2 = boxes.tolist()
    x = (torch.arange(width) + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(height) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=2)
    painted = F.grid_sample(probs[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
    return np.asfortranarray(painted.numpy().astype(np.uint8))


def painted_codes(probs: Tensor, boxes: Tensor, image_hw: tuple[int, int]) -> list[Rle]:
    return [coco_mask.encode(paint(grid, box, image_hw)) for grid, box in zip(probs, boxes, strict=True)]


def torchvision_codes(probs: Tensor, boxes: Tensor, image_hw: tuple[int, int]) -> list[Rle]:
    masks = paste_masks_in_image(probs[:, None], boxes, image_hw)[:, 0] >= 0.5
    return [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]


def differing(ours: list[Rle], theirs: list[Rle]) -> dict[str, float]:
    """Pixels that differ, as a share of the image's and of the masks' own, over all masks and in the worst."""
    a, b = coco_mask.decode(ours), coco_mask.decode(theirs)
    wrong = (a != b).sum((0, 1))
    inside = b.sum((0, 1))
    return {
        "of_all": float(wrong.sum() / a.size),
        "of_mask_pixels": float(wrong.sum() / inside.sum()),
        "worst_mask": float(wrong.max() / a[..., 0].size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detections", type=int, default=300)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; ours has none")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/rle-DEVICE.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = harness.require_device(options.device)
    image_hw = (options.size[0], options.size[1])
    probs, boxes = detections(options.detections, image_hw)
    held = probs.to(device), boxes.to(device)
    cases = {
        "inside the box": lambda: encode_masks(*held, image_hw),
        "painted and encoded": lambda: painted_codes(probs, boxes, image_hw),
        "pasted by torchvision": lambda: torchvision_codes(probs, boxes, image_hw),
    }
    if options.device == "cuda":
        cases["copied, on the CPU"] = lambda: encode_masks(held[0].cpu(), held[1].cpu(), image_hw)
    codes = {name: call() for name, call in cases.items()}  # also warms up
    difference = differing(codes["inside the box"], codes["painted and encoded"])
    times = harness.in_turn(cases, options.repeats, device)
    ours = times.pop("inside the box")
    speedups = {name: harness.speedup(ours, theirs) for name, theirs in times.items()}
    times = {"inside the box": ours, **times}
    result = {
        "machine": harness.machine(device),
        "targets": TARGETS,
        "settings": {"detections": options.detections, "size": list(image_hw), "repeats": options.repeats},
        "times": {name: harness.summary(values, 1) for name, values in times.items()},
        "speedup": speedups,
        "pixels_that_differ": difference,
    }
    for name, values in result["times"].items():
        seconds = values["seconds"]
        print(f"{name:22}{1e3 * seconds['median']:8.1f} ms ({1e3 * seconds['min']:.1f} to {1e3 * seconds['max']:.1f})")
    for name, speedup in speedups.items():
        ratio = speedup["clock"]
        print(f"{ratio['of_medians']:.0f} x faster than {name} ({ratio['smallest']:.0f} to {ratio['largest']:.0f})")
    print(f"{difference['of_all']:.1e} of all pixels differ from painted, at worst {difference['worst_mask']:.1e}")
    harness.write_json(options.out or harness.RESULTS / f"rle-{options.device}.json", result)


if __name__ == "__main__":
    main()
