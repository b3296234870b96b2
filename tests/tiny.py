"""What many tests share: the command line in process, and small recipes, scenes and models."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from tailseg.data.annotations.masks import Segmentation, bitmap_of, into_grid
from tailseg.evaluation.metrics import Scores, score
from tailseg.recipes.classifiers import CrossEntropyRecipe
from tailseg.recipes.model_section import (
    BackboneRecipe,
    BoxHeadRecipe,
    ContextRecipe,
    MaskHeadRecipe,
    MaskIouRecipe,
    ModelRecipe,
    NeckRecipe,
    RoiPoolingRecipe,
    RpnRecipe,
    StageRecipe,
    TsdRecipe,
)
from tailseg.recipes.schema import TestRecipe
from tailseg.recipes.section import Section
from tailseg.structures import Batch

Done = subprocess.CompletedProcess[str]
T = TypeVar("T")

# Settings of a recipe that trains in seconds on images of 64 pixels; what a test puts behind them counts.
SMALL_RECIPE = (
    "model.backbone.name=test_efficientnet",
    "model.backbone.pretrained=false",
    "model.backbone.frozen_stages=-1",
    "model.neck.channels=16",
    "model.rpn={pre_nms_train: 50, pre_nms_test: 50, post_nms_train: 40, post_nms_test: 20}",
    "model.box_head={width: 32, rois: 32, max_positive: 8}",
    "model.mask_head={channels: 8, convs: 1}",
    "model.tsd.shift_width=16",
    "model.mask_iou={channels: 8, width: 32}",
    "data={batch_per_device: 2, workers: 0, short_edges: [64], test_short_edge: 64, long_edge: 64, mask_grid: 28}",
    "test.max_detections=20",
)

# For commands that need a process of their own: one thread, since processes that share two cores would get in each
# other's way, and a wide terminal.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "COLUMNS": "200",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


COMMAND = str(files("tailseg") / "__main__.py")  # the same, as a file


def command(*arguments: object) -> list[str]:
    """The real command, for a process of its own."""
    return [sys.executable, "-m", "tailseg", *map(str, arguments)]


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


# Where the defaults of a part's arguments stand: sections of the recipe, and what has no key of that name there.
_DEFAULTS: dict[str, tuple[tuple[type[Section], ...], dict[str, Any]]] = {
    "Backbone": ((BackboneRecipe,), {}),
    "FPN": ((NeckRecipe,), {}),
    "FPG": ((NeckRecipe,), {}),
    "RPN": ((RpnRecipe,), {"channels": 256, "size_divisor": 32}),
    "RoIPooler": ((RoiPoolingRecipe,), {}),
    "RoISampler": ((BoxHeadRecipe,), {"num_samples": 512}),
    "BoxHead": ((BoxHeadRecipe, StageRecipe, CrossEntropyRecipe, TestRecipe), {}),
    "ClassBranch": ((BoxHeadRecipe, CrossEntropyRecipe, TestRecipe), {"hidden_layers": 2}),
    "TsdBoxHead": ((TsdRecipe, BoxHeadRecipe, StageRecipe, CrossEntropyRecipe, TestRecipe), {}),
    "MaskHead": ((MaskHeadRecipe,), {}),
    "MaskIouHead": ((MaskIouRecipe, MaskHeadRecipe), {}),
    "ContextEncoder": ((ContextRecipe,), {}),
    "Stage": ((StageRecipe,), {}),
    "Detector": ((ModelRecipe, RoiPoolingRecipe, TestRecipe), {"context_weight": 3.0, "mask_iou_weight": 0.5}),
}


def made(kind: Callable[..., T], *args: Any, **options: Any) -> T:
    """A part of the model, with the recipe's default for every argument that is not given."""
    sections, others = _DEFAULTS[kind.__name__]
    for name, parameter in list(inspect.signature(kind).parameters.items())[len(args) :]:
        if name in options or parameter.default is not parameter.empty:
            continue
        home = next((section for section in sections if name in section.model_fields), None)
        if name in others:
            options[name] = others[name]
        elif home is not None:
            options[name] = home.model_fields[name].get_default(call_default_factory=True)
    return kind(*args, **options)


@contextlib.contextmanager
def meta_without_values() -> Iterator[None]:
    """Tensors on the meta device, which have no values, are not initialised; going through it takes most of the time
    of making a model there."""
    with contextlib.ExitStack() as patches:
        for name in ("normal_", "uniform_"):
            plain = getattr(torch.Tensor, name)

            def skipped(tensor: torch.Tensor, *args: Any, _plain: Any = plain, **options: Any) -> torch.Tensor:
                return tensor if tensor.is_meta else _plain(tensor, *args, **options)

            patches.enter_context(patch.object(torch.Tensor, name, skipped))
        yield


# Imported before the forkserver forks: it is started once in each of pytest's processes.
PRELOADED = ["tailseg.layers.norm", "tailseg.training.loop", "tailseg.cli.main", "rich.console"]


def run_together(
    file: str, *calls: tuple[object, ...], linked: bool = False, stderr: Path | None = None
) -> list[int | None]:
    """Run a Python file in one process for each tuple of arguments, at once; exit codes, None for one that hung.

    The processes are forked from one that has imported PyTorch for all, which takes longer than their work. With
    ``linked`` they are the ranks of a run, as torchrun starts them. What they say goes to the file ``stderr``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for rank, arguments in enumerate(calls):
        surroundings = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": len(calls), "LOCAL_WORLD_SIZE": len(calls)}
        surroundings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
        args = (file, list(map(str, arguments)), surroundings if linked else {}, stderr)
        running.append(context.Process(target=_as_main, args=args))
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=240)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    return codes


def _as_main(file: str, arguments: list[str], surroundings: dict[str, object], stderr: Path | None) -> None:
    if stderr is not None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = [file, *arguments]
    os.environ |= {name: str(value) for name, value in surroundings.items()}
    runpy.run_path(file, run_name="__main__")


def noise_batch(
    image_hw: tuple[int, int],
    smaller_hw: tuple[int, int],
    *,
    objects: int,
    num_classes: int,
    seed: int,
    corner: float = 60,
    sides: tuple[float, float] = (12, 62),
) -> Batch:
    """Two images of noise, the second smaller and with one object less; files are twice as large.

    Boxes begin within ``corner`` pixels of the image's, with sides drawn from ``sides``.
    """
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, objects, 2, generator=generator) * corner
    extents = sides[0] + (sides[1] - sides[0]) * torch.rand(2, objects, 2, generator=generator)
    boxes = torch.cat([corners, corners + extents], dim=2)
    masks = torch.zeros(2, objects, 28, 28, dtype=torch.uint8)
    masks[..., 4:20, 6:24] = 255
    valid = torch.ones(2, objects, dtype=torch.bool)
    valid[1, -1] = False
    sizes = torch.tensor([image_hw, smaller_hw])
    return Batch(
        images=torch.randint(0, 256, (2, 3, *image_hw), dtype=torch.uint8, generator=generator),
        image_sizes=sizes,
        original_sizes=2 * sizes,
        image_ids=torch.arange(2),
        boxes=boxes,
        labels=torch.randint(0, num_classes, (2, objects), generator=generator),
        valid=valid,
        masks=masks,
        mask_frames=boxes,
        absent=torch.zeros(2, num_classes, dtype=torch.bool),
        ignored=torch.zeros(2, 0, 0, dtype=torch.uint8),
    )


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
    """One sentence on stderr that holds every one of ``named``, and exit code 1.

    Before it may stand the warnings about a data file of which objects are left out.
    """
    lines = [line for line in done.stderr.strip().splitlines() if ": left out (annotation" not in line]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tailseg: ")
    for name in named:
        assert name in lines[0]
