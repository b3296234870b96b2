"""The device that a text names: of ``--device``, `tailseg.load` and `tailseg.train`."""

from __future__ import annotations

import difflib

import torch

from tailseg.errors import UserError

KINDS = ("auto", "cpu", "cuda", "mps")


def find_device(device: str | int | torch.device | None = None) -> torch.device:
    """The device of that name on this machine.

    Args:
        device: ``auto`` (or None): the first CUDA GPU, or the CPU where there is none; ``cpu``; ``cuda`` or
            ``cuda:1``; ``mps`` (Apple's GPU); a number: the CUDA GPU of that index; or a device of PyTorch.

    Raises:
        UserError: there is no such device here, or the text names none.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, torch.device) and device.type not in KINDS:
        return device
    text = f"cuda:{device}" if isinstance(device, int) else str(device)
    kind, separator, index = text.partition(":")
    if kind not in KINDS[1:] or (separator and not index.isdecimal()):
        raise UserError(
            f"device '{text[:40]}': there is no such device; did you mean '{_nearest(kind, index)}'? Choose from auto, "
            "cpu, cuda, cuda:1 and so on, mps"
        )
    if kind == "cuda":
        _require_gpu(text, int(index or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device '{text}': PyTorch finds no Apple GPU on this machine; choose cpu, or leave it at auto")
    if kind != "cuda" and int(index or 0) > 0:
        raise UserError(f"device '{text}': this machine has one '{kind}' device only; choose {kind}")
    return torch.device(text if kind == "cuda" else kind)


def _nearest(kind: str, index: str) -> str:
    if kind.isdecimal():
        return f"cuda:{int(kind)}"
    near = "cuda" if kind.lower() == "gpu" else difflib.get_close_matches(kind.lower(), KINDS, 1, 0.0)[0]
    return f"cuda:{index}" if near == "cuda" and index.isdecimal() else near


def _require_gpu(text: str, index: int) -> None:
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number == 0:
        raise UserError(f"device '{text}': PyTorch finds no CUDA GPU on this machine; choose cpu, or leave it at auto")
    if index >= number:
        have = "one GPU, cuda:0" if number == 1 else f"{number} GPUs, cuda:0 to cuda:{number - 1}"
        raise UserError(f"device '{text}': this machine has {have}; choose one of these, or leave it at auto")
