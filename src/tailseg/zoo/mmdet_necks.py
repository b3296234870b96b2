"""mmdetection's names of necks -> ours: FPN, PAFPN, FPN with CARAFE, HRFPN, FPG."""

from __future__ import annotations

LEVELS = 5
MOST_PATHWAYS = 16
PARTS = {"lateral_convs": "lateral", "fpn_convs": "output", "downsample_convs": "down", "pafpn_convs": "path"}


def neck_names() -> dict[str, str]:
    """Their names, or beginnings up to a dot -> ours."""
    names: dict[str, str] = {"neck.reduction_conv.conv": "neck.reduction"}  # HRFPN's
    for level in range(LEVELS):
        for theirs, ours in PARTS.items():
            names[f"neck.{theirs}.{level}.conv"] = f"neck.{ours}_convs.{level}"
            for norm in ("bn", "gn"):
                names[f"neck.{theirs}.{level}.{norm}"] = f"neck.{ours}_norms.{level}"
        names[f"neck.upsample_modules.{level}.channel_compressor"] = f"neck.upsamplers.{level}.compressor"
        names[f"neck.upsample_modules.{level}.content_encoder"] = f"neck.upsamplers.{level}.encoder"
        names |= _grid_names(level)
    return names


def _grid_names(level: int) -> dict[str, str]:
    """The names of FPG at a level."""
    names = {f"neck.output_transition.{level}.conv_out.conv": f"neck.output_convs.{level}"}
    for part in ("weight", "bias"):  # of plain convolutions, unlike FPN's
        names[f"neck.lateral_convs.{level}.{part}"] = f"neck.lateral_convs.{level}.{part}"
    for pathway in range(MOST_PATHWAYS):
        cell, own = f"neck.fpn_transitions.{pathway}.{level}", f"neck.pathways.{pathway}.{level}"
        for term in ("same_up", "across_lateral", "across_skip", "across_down"):
            theirs = f"{cell}.{term}.conv" if term == "across_down" else f"{cell}.{term}"
            names |= {f"{theirs}.conv": f"{own}.{term}.conv", f"{theirs}.bn": f"{own}.{term}.norm"}
    return names
