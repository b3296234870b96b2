"""Launches the Seesaw kernels on a driver that only writes down what it gets; needs Triton's interpreter off, no GPU.

Prints a line a launch, the kernel, its grid and its arguments; and after each step, how many forms of each kernel the
launcher keeps, and how many Triton does, which the launcher leaves to look at every argument each other time.
"""

from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tailseg.losses import seesaw_kernels, seesaw_triton

LAUNCHERS = (seesaw_triton._count, seesaw_triton._loss, seesaw_triton._gradient)
launched: list[tuple] = []


class Driver:
    """Stands for CUDA's: compiles for an H100, loads nothing, and keeps the arguments of every launch."""

    utils = SimpleNamespace(
        load_binary=lambda name, *_: (name, name, 32, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": 232448},
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, _source, metadata):
        def launch(x, y, z, _stream, function, _packed, _about, _enter, _leave, *values):
            shown = [type(value).__name__ if isinstance(value, torch.Tensor) else value for value in values]
            launched.append((metadata.name, (x, y, z), shown))

        return launch


def step(rows: int, classes: int, offset: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Count, lose and learn; ``offset`` numbers before the logits spoil their alignment."""
    flat = torch.zeros(rows * (classes + 2) + offset, dtype=dtype)
    logits = flat[offset:].view(rows, classes + 2).requires_grad_()
    labels, valid = torch.zeros(rows, dtype=torch.int64), torch.ones(rows + offset, dtype=torch.bool)[offset:]
    counts = torch.zeros(classes, dtype=torch.int64)
    seesaw_triton.count(labels, valid, counts, classes)
    means = seesaw_kernels.triton_means(logits, labels, valid, counts, 0.8, 0.0, 1e-2)
    torch.autograd.grad(means[0] + means[1], logits)


driver.set_active(Driver())
for case in ((4, 40), (1, 40, 1), (16, 37, 3), (16, 40, 0, torch.bfloat16)):
    for _ in range(2):
        step(*case)
        for name, grid, shown in launched:
            print(name, *grid, *shown)
        ours = [len(each.compiled) for each in LAUNCHERS]
        print("kept", *ours, "by Triton", *(len(each.kernel.device_caches[0][0]) for each in LAUNCHERS))
        launched.clear()
    for each in LAUNCHERS:
        each.compiled.clear()
