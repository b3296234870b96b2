"""How a training run stands, in one short line: for the progress bar and, without a terminal, for the log."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def memory_in_use(device: torch.device) -> int:
    """Bytes: on a CUDA GPU the most that tensors have taken so far, else what this process has in main memory.

    0 where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)  # the allocator's own count: the GPU is not asked
    if (statm := Path("/proc/self/statm")).is_file():  # on Linux
        return int(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most so far


def step_note(epoch: int, epochs: int, loss: float, rate: float, images_per_second: float, device: torch.device) -> str:
    """Epoch, mean loss since the last note, learning rate, images a second and, on a GPU, the most memory in use.

    It has at most 79 characters for numbers of usual size, so that a terminal of 80 columns shows it whole.
    """
    texts = [
        f"epoch {epoch}/{epochs}",
        f"loss {loss:.4g}",
        f"rate {rate:.3g}",
        f"{images_per_second:.3g} images/s",
    ]
    if device.type == "cuda":
        texts.append(f"{memory_in_use(device) / 2**30:.1f} GiB GPU memory")
    return ", ".join(texts)
