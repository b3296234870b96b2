"""What many tests share: the command line in process, and small recipes, scenes and models."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.masks import Segmentation, bitmap_of, into_grid
from tailseg.evaluation.metrics import Scores, score

Done = subprocess.CompletedProcess[str]

# For commands that need a process of their own: one thread, since processes that share two cores would get in each
# other's way, and a wide terminal.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "COLUMNS": "200",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


def command(*arguments: object) -> list[str]:
    """The real command, for a process of its own."""
    return [sys.executable, "-m", "tailseg.cli.main", *map(str, arguments)]


def options(settings: tuple[str, ...]) -> list[str]:
    """Recipe settings as arguments of a command."""
    return [part for setting in settings for part in ("--set", setting)]


def tailseg(*arguments: object, cwd: Path | None = None) -> Done:
    """Run the command to its end in this process, through the same entry as the installed script.

    A process of its own would import PyTorch again, which takes longer than most commands. An exception that the
    command does not turn into a sentence is raised here.
    """
    from tailseg.cli.main import main

    out, errors = io.StringIO(), io.StringIO()
    argv = ["tailseg", *map(str, arguments)]
    with (
        _logging_restored(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        patch.object(sys, "argv", argv),
        patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        code: object = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
    assert isinstance(code, int), code
    return Done(argv, code, out.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _logging_restored() -> Iterator[None]:
    """The command takes the root logger for itself; afterwards it is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # or they would be closed
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def finished(line: list[str]) -> Done:
    """Run a process to its end; one that waits for another that does not come is ended, with all that it started."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, start_new_session=True)
    try:
        out, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Done(line, process.returncode, out, errors)


def run_together(file: str, *calls: tuple[object, ...]) -> list[int | None]:
    """Run a Python file in one process for each tuple of arguments, at once; exit codes, None for one that hung.

    The processes are forked from one that has imported PyTorch for all, which takes longer than their work.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tailseg.layers.norm"])
    running = [context.Process(target=_as_main, args=(file, list(map(str, arguments)))) for arguments in calls]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=120)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    return codes


def _as_main(file: str, arguments: list[str]) -> None:
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def score_of(annotations: Path | dict[str, Any], detections: Path | list[dict[str, Any]], **options: Any) -> Scores:
    """`tailseg.evaluation.metrics.score` of an annotation file, or of its content."""
    if isinstance(annotations, Path):
        return score(annotations, detections, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.json"
        path.write_text(json.dumps(annotations))
        return score(path, detections, **options)


def rasterise(
    segmentation: Segmentation, image_hw: tuple[int, int], grid: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The grid and the frame of one object."""
    return into_grid(bitmap_of(segmentation, image_hw), image_hw, grid)


def assert_done(done: Done) -> None:
    """Exit code 0 and no traceback."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def assert_refused(done: Done, *named: str) -> None:
    """One sentence on stderr that holds every one of ``named``, and exit code 1."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tailseg: ")
    for name in named:
        assert name in lines[0]
