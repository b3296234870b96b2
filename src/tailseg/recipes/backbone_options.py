"""The arguments of timm's models that a recipe may give, in `model.backbone.options`, and names that reach outside.

timm takes others too, some of which open files (`checkpoint_path`) or reach the hub.
"""

from __future__ import annotations

import difflib
from typing import Any

_NUMBERS = {  # the shape of a network, and how it is regularised
    *("channels", "cardinality", "base_width", "stem_width", "reduce_first", "block_reduce_first"),
    *("dims", "embed_dim", "embed_dims", "num_heads", "mlp_ratio", "window_size", "img_size", "patch_size"),
    *("avg_down", "deep_stem", "replace_stem_pool", "zero_init_last", "ls_init_value", "layer_scale_init_value"),
    *("drop_rate", "drop_path_rate", "drop_block_rate", "attn_drop_rate", "proj_drop_rate"),
    *("conv_mlp", "conv_bias", "use_grn", "bn_eps", "bn_momentum", "strict_img_size", "always_partition"),
}
_NAMES = {"stem_type", "act_layer", "norm_layer", "aa_layer", "feature_location"}  # of kinds that timm knows
KNOWN = _NUMBERS | _NAMES
LARGEST = 65536
LONGEST = 16


def require_known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options if all are known; ValueError, with the nearest known key, otherwise."""
    for key, value in options.items():
        if key not in KNOWN:
            near = difflib.get_close_matches(str(key), sorted(KNOWN), 1, 0.0)
            raise ValueError(
                f"{str(key)[:40]!r} is no option that a recipe may give to timm; did you mean {near[0]!r}? There are "
                f"{', '.join(sorted(KNOWN))}"
            )
        if not (_is_name(value) if key in _NAMES else _is_numbers(value)):
            what = "a name" if key in _NAMES else f"a number up to {LARGEST}, or a list of at most {LONGEST}"
            raise ValueError(f"{key} must be {what}")
    return options


def reaches_outside(name: str) -> bool:
    """True if timm takes a backbone of that name from a hub or a folder."""
    return ":" in name or "/" in name or "\\" in name


def _is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 40 and f"a{value}".replace("_", "").isalnum())


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= LONGEST and all(not isinstance(item, list | tuple) and _is_numbers(item) for item in value)
    return value is None or (isinstance(value, int | float) and abs(value) <= LARGEST)
