"""The folder of a run whose user named none."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

from tailseg.errors import UserError


def run_folder(recipe: str, out: Path | None, *, resume: bool) -> Path:
    """The folder named by ``--out``; else runs/RECIPE, numbered if taken, or with ``--resume`` the last of these.

    Processes that this one starts get the same folder: they run its command line, which is given the option.

    Args:
        recipe: its name; what a file name may not hold becomes a dash.
        out: of the command line.
        resume: the run is there already.

    Raises:
        UserError: there is nothing to resume, or processes that somebody else started would each choose a folder.
    """
    if out is not None:
        return out
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1:
        raise UserError("--out: the processes of torchrun or SLURM need one folder for all; name it with --out")
    first = Path("runs") / (re.sub(r"[^\w.-]+", "-", recipe).strip("-.") or "run")
    taken = list(takewhile(Path.exists, _numbered(first)))
    if resume and not taken:
        raise UserError(f"{first}: there is no such run to resume; name its folder with --out")
    folder = taken[-1] if resume else next(path for path in _numbered(first) if path not in taken)
    sys.argv += ["--out", str(folder)]
    return folder


def _numbered(first: Path) -> Iterator[Path]:
    yield first
    for number in count(2):
        yield first.with_name(f"{first.name}-{number}")
