"""Checkpoints of mmdetection for tests: the names and shapes of its detectors' tensors, filled at random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailseg.checkpoint import load_model
from tailseg.recipes.schema import Recipe
from tailseg.zoo.conversion import convert
from tailseg.zoo.mmdet import read_mmdet

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a detector of mmdetection; the defaults are its published Mask R-CNN R50-FPN for LVIS with Seesaw."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    base: int = 64  # base_channels
    stem: int = 64
    groups: int = 1
    base_width: int = 64  # of a group of ResNeXt
    neck: int = 256
    hidden: int = 1024  # of the box head
    mask: int = 256
    classes: int = 1203
    logits: int = 2  # beyond the classes
    counts: bool = True
    cascade: bool = False
    agnostic_boxes: bool = False
    specific_boxes: bool = False  # of a cascade: one a class
    agnostic_masks: bool = False
    neck_norm: bool = False
    rpn_convs: int = 1
    rpn: int = 0  # channels of its convolutions, if other than the neck's
    deformable: int = 0  # rows that steer a deformable convolution: 18 of DCNv1, 27 of DCNv2; in the last three stages
    box_convs: int = 0  # with batch norm, before a single layer
    mask_norm: bool = False
    carafe: bool = False
    mask_iou: bool = False
    one_mask_head: bool = False  # of a cascade
    flow: bool = False  # of masks through a cascade
    semantic: bool = False  # branch
    scnet: bool = False  # pairs of convolutions in mask head and semantic branch, and a feature relay
    neck_kind: str = "FPN"  # or "PAFPN", "FPN_CARAFE", or "FPG" of three pathways
    group_norm: bool = False  # instead of batch norm
    context: str = ""  # "plain", "norm", "residual" or "residual norm"

    def rows(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(their name, our name, shape) of every tensor."""
        rows = [*self._backbone(), *self._neck(), *self._rpn(), *self._heads(), *self._mask_iou(), *self._context()]
        rows += self._semantic()
        if self.scnet:
            rows += pair("roi_head.feat_relay_head.fc", "relay.fc", (self.neck * 49, self.hidden))
        if not self.group_norm:
            return rows
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        return [(theirs.replace("bn", "gn"), *rest) for theirs, *rest in rows if not theirs.endswith(statistics)]

    def _backbone(self) -> list[tuple[str, str, tuple[int, ...]]]:
        rows: list[tuple[str, str, tuple[int, ...]]] = []

        def norm(name: str, width: int) -> None:
            rows.extend(norm_rows(f"backbone.{name}", f"backbone.net.{name}", width))

        def conv(name: str, *shape: int) -> None:
            rows.append((f"backbone.{name}.weight", f"backbone.net.{name}.weight", shape))

        conv("conv1", self.stem, 3, 7, 7)
        norm("bn1", self.stem)
        inward = self.stem
        for stage, count in enumerate(self.blocks):
            planes = self.base * 2**stage
            width = planes if self.groups == 1 else planes * self.base_width // 64 * self.groups
            for block in range(count):
                name = f"layer{stage + 1}.{block}"
                conv(f"{name}.conv1", width, inward, 1, 1)
                norm(f"{name}.bn1", width)
                conv(f"{name}.conv2", width, width // self.groups, 3, 3)
                norm(f"{name}.bn2", width)
                if self.deformable and stage > 0:
                    offset = f"{name}.conv2.conv_offset"
                    rows += pair(f"backbone.{offset}", f"backbone.net.{offset}", (self.deformable, width, 3, 3))
                conv(f"{name}.conv3", 4 * planes, width, 1, 1)
                norm(f"{name}.bn3", 4 * planes)
                if block == 0:
                    conv(f"{name}.downsample.0", 4 * planes, inward, 1, 1)
                    norm(f"{name}.downsample.1", 4 * planes)
                inward = 4 * planes
        return rows

    def _neck(self) -> list[tuple[str, str, tuple[int, ...]]]:
        n = self.neck
        rows: list[tuple[str, str, tuple[int, ...]]] = []
        if self.neck_kind == "FPG":
            return self._grid()
        path = [("downsample_convs", "down"), ("pafpn_convs", "path")]
        for i, (part, ours) in ((i, names) for i in range(3 if self.neck_kind == "PAFPN" else 0) for names in path):
            own = pair(f"neck.{part}.{i}.conv", f"neck.{ours}_convs.{i}", (n, n, 3, 3))
            norm = norm_rows(f"neck.{part}.{i}.bn", f"neck.{ours}_norms.{i}", n)
            rows += own[:1] + norm if self.neck_norm else own
        for i in range(5 if self.neck_kind == "FPN_CARAFE" else 4):
            shape = (n, self.base * 4 * 2**i, 1, 1) if i < 4 else (n, self.base * 32, 3, 3)
            for part, ours, size in (("lateral_convs", "lateral", shape), ("fpn_convs", "output", (n, n, 3, 3))):
                own = pair(f"neck.{part}.{i}.conv", f"neck.{ours}_convs.{i}", size)
                norm = norm_rows(f"neck.{part}.{i}.bn", f"neck.{ours}_norms.{i}", n)
                rows += own[:1] + norm if self.neck_norm else own
            if self.neck_kind == "FPN_CARAFE" and i < 4:
                module, ours = f"neck.upsample_modules.{i}", f"neck.upsamplers.{i}"
                rows += pair(f"{module}.channel_compressor", f"{ours}.compressor", (64, n, 1, 1))
                rows += pair(f"{module}.content_encoder", f"{ours}.encoder", (100, 64, 3, 3))
        return rows

    def _grid(self) -> list[tuple[str, str, tuple[int, ...]]]:
        n = self.neck
        rows: list[tuple[str, str, tuple[int, ...]]] = []
        for i in range(4):
            rows += pair(f"neck.lateral_convs.{i}", f"neck.lateral_convs.{i}", (n, self.base * 4 * 2**i, 1, 1))
        for s, i in ((s, i) for s in range(3) for i in range(5) if s + i >= 4):
            terms = [("same_up", 3), ("across_lateral", 1), ("across_skip", 1), ("across_down", 3)][: 4 if i < 4 else 3]
            for term, side in terms:
                theirs, ours = f"neck.fpn_transitions.{s}.{i}.{term}", f"neck.pathways.{s}.{i}.{term}"
                theirs += ".conv" if term == "across_down" else ""
                rows.append((f"{theirs}.conv.weight", f"{ours}.conv.weight", (n, n, side, side)))
                rows += norm_rows(f"{theirs}.bn", f"{ours}.norm", n)
        for i in range(5):
            rows += pair(f"neck.output_transition.{i}.conv_out.conv", f"neck.output_convs.{i}", (n, n, 3, 3))
        return rows

    def _rpn(self) -> list[tuple[str, str, tuple[int, ...]]]:
        width = self.rpn or self.neck
        rows: list[tuple[str, str, tuple[int, ...]]] = []
        for i in range(self.rpn_convs):
            theirs = f"rpn_head.rpn_conv.{i}.conv" if self.rpn_convs > 1 else "rpn_head.rpn_conv"
            ours = f"rpn.first_convs.{i}" if i < self.rpn_convs - 1 else "rpn.conv"
            rows += pair(theirs, ours, (width, width if i else self.neck, 3, 3))
        rows += pair("rpn_head.rpn_cls", "rpn.objectness", (3, width, 1, 1))
        rows += pair("rpn_head.rpn_reg", "rpn.deltas", (12, width, 1, 1))
        return rows

    def _heads(self) -> list[tuple[str, str, tuple[int, ...]]]:
        rows: list[tuple[str, str, tuple[int, ...]]] = []
        agnostic = self.agnostic_boxes or (self.cascade and not self.specific_boxes)
        boxes = 4 if agnostic else 4 * self.classes
        for t in range(3 if self.cascade else 1):
            number = f".{t}" if self.cascade else ""
            box, mask = f"roi_head.bbox_head{number}", f"roi_head.mask_head{number}"
            ours, width = f"stages.{t}.box_head", (self.hidden, self.hidden)
            if self.counts:
                counter = f"{ours}.classification.seesaw.counts"
                rows.append((f"{box}.loss_cls.cum_samples", counter, (self.classes + 1,)))
            for i in range(self.box_convs):
                shape = (self.neck, self.neck, 3, 3)
                rows += convolution(f"{box}.shared_convs.{i}", ours, i, shape, norm=True)
            rows += pair(f"{box}.shared_fcs.0", f"{ours}.fc1", (self.hidden, self.neck * 49))
            if not self.box_convs:
                rows += pair(f"{box}.shared_fcs.1", f"{ours}.fc2", width)
            rows += pair(f"{box}.fc_cls", f"{ours}.classifier", (self.classes + self.logits, self.hidden))
            rows += pair(f"{box}.fc_reg", f"{ours}.regressor", (boxes, self.hidden))
            ours = f"stages.{t}.mask_head"
            if self.one_mask_head:
                mask = "roi_head.mask_head"
                if t < 2:
                    continue
            for i in range(6 if self.scnet else 4):
                shape = (self.mask, self.mask if i else self.neck, 3, 3)
                rows += self._convolution(f"{mask}.convs", ours, i, shape, norm=self.mask_norm, pairs=self.scnet)
            if self.flow and t > 0:
                rows += pair(f"{mask}.conv_res.conv", f"{ours}.flow", (self.mask, self.mask, 1, 1))
            if self.carafe:
                compressor, encoder = f"{mask}.upsample.channel_compressor", f"{mask}.upsample.content_encoder"
                rows += pair(compressor, f"{ours}.upsample.compressor", (64, self.mask, 1, 1))
                rows += pair(encoder, f"{ours}.upsample.encoder", (100, 64, 3, 3))
            else:
                rows += pair(f"{mask}.upsample", f"{ours}.upsample", (self.mask, self.mask, 2, 2), self.mask)
            last = 1 if self.agnostic_masks else self.classes
            rows += pair(f"{mask}.conv_logits", f"{ours}.predictor", (last, self.mask, 1, 1))
        return rows

    def _mask_iou(self) -> list[tuple[str, str, tuple[int, ...]]]:
        if not self.mask_iou:
            return []
        theirs, width = "roi_head.mask_iou_head", 2 * self.hidden
        rows: list[tuple[str, str, tuple[int, ...]]] = []
        for i in range(4):
            rows += pair(
                f"{theirs}.convs.{i}", f"mask_iou.convs.{i}", (self.mask, self.mask if i else self.neck + 1, 3, 3)
            )
        rows += pair(f"{theirs}.fcs.0", "mask_iou.fc1", (width, self.mask * 49))
        rows += pair(f"{theirs}.fcs.1", "mask_iou.fc2", (width, width))
        return rows + pair(f"{theirs}.fc_mask_iou", "mask_iou.predictor", (self.classes, width))

    def _semantic(self) -> list[tuple[str, str, tuple[int, ...]]]:
        if not self.semantic:
            return []
        theirs, n = "roi_head.semantic_head", self.neck
        rows = pair(f"{theirs}.conv_embedding.conv", "semantic.embedding", (n, n, 1, 1))
        for i in range(5):
            rows += pair(f"{theirs}.lateral_convs.{i}.conv", f"semantic.lateral_convs.{i}", (n, n, 1, 1))
        for i in range(4):
            rows += self._convolution(f"{theirs}.convs", "semantic", i, (n, n, 3, 3), norm=False, pairs=self.scnet)
        return rows

    def _context(self) -> list[tuple[str, str, tuple[int, ...]]]:
        if not self.context:
            return []
        theirs, shape, norm = "roi_head.glbctx_head", (self.neck, self.neck, 3, 3), "norm" in self.context
        rows = pair(f"{theirs}.fc", "context.classifier", (self.classes, self.neck))
        for i in range(4):
            rows += self._convolution(
                f"{theirs}.convs", "context", i, shape, norm=norm, pairs="residual" in self.context
            )
        return rows

    def _convolution(
        self, theirs: str, ours: str, i: int, shape: tuple[int, ...], *, norm: bool, pairs: bool
    ) -> list[Any]:
        block, number = (f"{theirs}.{i // 2}", str(i % 2 + 1)) if pairs else (f"{theirs}.{i}", "")
        return convolution(block, ours, i, shape, norm=norm, number=number)


def pair(theirs: str, ours: str, shape: tuple[int, ...], out: int | None = None) -> list[Any]:
    bias = (out or shape[0],)
    return [(f"{theirs}.weight", f"{ours}.weight", shape), (f"{theirs}.bias", f"{ours}.bias", bias)]


def norm_rows(theirs: str, ours: str, width: int) -> list[Any]:
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    shapes = [(width,)] * 4 + [()]
    return [(f"{theirs}.{part}", f"{ours}.{part}", shape) for part, shape in zip(parts, shapes, strict=True)]


def convolution(theirs: str, ours: str, i: int, shape: tuple[int, ...], *, norm: bool, number: str = "") -> list[Any]:
    """A 3x3 convolution with a bias, or with batch norm."""
    rows = pair(f"{theirs}.conv{number}", f"{ours}.convs.{i}", shape)
    return rows[:1] + norm_rows(f"{theirs}.bn{number}", f"{ours}.norms.{i}", shape[0]) if norm else rows


MASK_RCNN = Layout()
CASCADE = Layout(cascade=True)
NARROW: dict[str, Any] = {"base": 4, "stem": 8, "neck": 8, "hidden": 16, "mask": 8, "classes": 5}
SMALL = Layout(**NARROW)
SMALL_CASCADE = Layout(**NARROW, cascade=True)
NAMES = ("cat", "dog", "stop_sign", "wine_glass", "cup")


def small(**changes: Any) -> Layout:
    return replace(SMALL, **changes)


def state_of(layout: Layout) -> State:
    """Random values, so that no two tensors are alike."""
    torch.manual_seed(0)
    state = {}
    for theirs, _, shape in layout.rows():
        if theirs.endswith("num_batches_tracked"):
            state[theirs] = torch.randint(1000, shape)
        elif theirs.endswith("cum_samples"):
            state[theirs] = torch.randint(10**6, shape).float()
        else:
            state[theirs] = torch.randn(shape)
    return state


def lively(layout: Layout, slower: dict[str, float] | None = None) -> State:
    """Weights whose responses keep their size from layer to layer, but for those whose keys end as in ``slower``."""
    state = state_of(layout)
    for key, tensor in state.items():
        if key.endswith("weight") and tensor.dim() > 1:
            tensor *= (2 / tensor[0].numel()) ** 0.5
        if "running_var" in key:
            tensor.abs_().add_(0.5)
        for end, factor in (slower or {}).items():
            if key.endswith(end):
                tensor *= factor
    return state


def constants_of(layout: Layout) -> State:
    """A constant for each tensor, which takes no room whatever its shape."""
    rows = enumerate(layout.rows(), start=1)
    return {theirs: torch.tensor(float(i)).expand(shape) for i, (theirs, _, shape) in rows}


def save(content: Any, path: Path, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def converted(
    content: Any, folder: Path, *settings: str, name: str = "model.pth", categories: Path | None = None
) -> tuple[Recipe, State]:
    """Recipe and tensors of the model file that a checkpoint becomes."""
    out = folder / "converted.safetensors"
    convert(read_mmdet(save(content, folder / name)), out, categories=categories, settings=settings)
    model = load_model(out)
    return model.recipe, model.state


def assert_same(layout: Layout, theirs: State, ours: State) -> None:
    """Every tensor stands under its name in our file, and no other does."""
    named = {own: key for key, own, _ in layout.rows()}
    assert set(ours) - set(named) == set()
    assert set(named) - set(ours) == set()
    for own, key in named.items():
        expected = theirs[key]
        if key.endswith("cum_samples"):
            expected = expected[:-1].round().long()
        assert ours[own].shape == expected.shape, own
        assert torch.equal(ours[own], expected.to(ours[own].dtype)), own


def meta(**more: Any) -> dict[str, Any]:
    return {"meta": {"CLASSES": NAMES, **more}}
