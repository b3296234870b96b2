"""Backbones that are no ResNets, told by tensors under timm's names: RegNet, HRNet, Swin Transformer, ConvNeXt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tailseg.errors import UserError

State = Mapping[str, Tensor]
Values = dict[str, Any]

PREFIX = "backbone.net."
MOST_BLOCKS = 40
REGNETS: dict[tuple[int, ...], str] = {  # by the blocks of each stage
    (1, 2, 7, 12): "regnetx_004",
    (1, 3, 7, 5): "regnetx_008",
    (2, 4, 10, 2): "regnetx_016",
    (2, 6, 15, 2): "regnetx_032",
    (2, 5, 14, 2): "regnetx_040",
    (2, 4, 10, 1): "regnetx_064",
    (2, 5, 15, 1): "regnetx_080",
    (2, 5, 11, 1): "regnetx_120",
}
HRNETS = (18, 30, 32, 40, 44, 48, 64)  # channels of the finest branch
# By blocks of the third stage and width of the first: the network's name, its heads and window.
SWINS: dict[tuple[int, int], tuple[str, tuple[int, ...], int]] = {
    (6, 96): ("swin_tiny_patch4_window7_224", (3, 6, 12, 24), 7),
    (18, 96): ("swin_small_patch4_window7_224", (3, 6, 12, 24), 7),
    (18, 128): ("swin_base_patch4_window7_224", (4, 8, 16, 32), 7),
    (18, 192): ("swin_large_patch4_window7_224", (6, 12, 24, 48), 7),
}
CONVNEXTS = {(9, 96): "convnext_tiny", (27, 96): "convnext_small", (27, 128): "convnext_base"}
CONVNEXTS |= {(27, 192): "convnext_large", (27, 256): "convnext_xlarge"}


def infer_family(state: State) -> Values | None:
    """Recipe values of the backbone; None if it is of none of these families.

    Raises:
        UserError: it is of another size than those that timm has.
    """
    for key, infer in (
        ("stem.conv.weight", _regnet),
        ("transition1.0.0.weight", _hrnet),
        ("patch_embed.proj.weight", _swin),
        ("stem_0.weight", _convnext),
    ):
        if f"{PREFIX}{key}" in state:
            values = infer(state)
            if "backbone.output_norms.0.weight" in state:
                values["output_norm"] = True
            return values
    return None


def _regnet(state: State) -> Values:
    depths = tuple(_blocks(state, f"s{stage}.b{{}}.conv1.conv.weight", first=1) for stage in range(1, 5))
    if depths not in REGNETS:
        raise UserError(f"its backbone is a RegNet of {depths} blocks a stage; RegNetX of 0.4 to 12 GF are converted")
    values: Values = {"name": REGNETS[depths], "options": {}}
    deformable = [s for s in range(1, 5) if f"{PREFIX}s{s}.b1.conv2.conv.conv_offset.weight" in state]
    return values | ({"deformable_stages": deformable} if deformable else {})


def _hrnet(state: State) -> Values:
    width = _width(state, "transition1.0.0.weight")
    if width not in HRNETS:
        raise UserError(
            f"its backbone is an HRNet of width {width}; those of {', '.join(map(str, HRNETS))} are converted"
        )
    return {"name": f"hrnet_w{width}", "options": {"feature_location": ""}}


def _swin(state: State) -> Values:
    width, table = _width(state, "patch_embed.proj.weight"), "layers_0.blocks.0.attn.relative_position_bias_table"
    blocks, rows = _blocks(state, "layers_2.blocks.{}.norm1.weight"), _width(state, table)
    heads, window = int(state[f"{PREFIX}{table}"].shape[-1]), (int(rows**0.5) + 1) // 2
    if not any(blocks == known for known, _ in SWINS):
        raise UserError(f"its backbone is a Swin Transformer of {blocks} blocks in stage 3; 6 or 18 are converted")
    name, usual_heads, usual_window = SWINS.get((blocks, width), SWINS[blocks, 96])
    options: Values = {"strict_img_size": False, "always_partition": True}
    if (blocks, width) not in SWINS:
        options["embed_dim"] = width
    if heads != usual_heads[0]:
        options["num_heads"] = [heads * 2**stage for stage in range(4)]
    if window != usual_window:
        options["window_size"] = window
    return {"name": name, "options": options}


def _convnext(state: State) -> Values:
    width, blocks = _width(state, "stem_0.weight"), _blocks(state, "stages_2.blocks.{}.conv_dw.weight")
    if not any(blocks == known for known, _ in CONVNEXTS):
        raise UserError(f"its backbone is a ConvNeXt of {blocks} blocks in stage 3; 9 or 27 are converted")
    name = CONVNEXTS.get((blocks, width), CONVNEXTS[blocks, 96])
    options = {} if (blocks, width) in CONVNEXTS else {"dims": [width * 2**stage for stage in range(4)]}
    return {"name": name, "options": options}


def _width(state: State, name: str) -> int:
    """Rows of a tensor that must be there."""
    tensor = state.get(f"{PREFIX}{name}")
    if tensor is None or tensor.dim() < 2 or 0 in tensor.shape:
        raise UserError(f"no tensor of its shape was found for our '{PREFIX}{name}'; the file is incomplete")
    return int(tensor.shape[0])


def _blocks(state: State, template: str, first: int = 0) -> int:
    """Count the template's keys that are there in a row."""
    count = 0
    while f"{PREFIX}{template.format(first + count)}" in state:
        count += 1
    return count
