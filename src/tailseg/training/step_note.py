"""How a training run stands, in one short line: for the progress bar and, without a terminal, for the log."""

from __future__ import annotations

import torch


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
        texts.append(f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB GPU memory")
    return ", ".join(texts)
