"""Weight standardisation (arXiv 1903.10520), worked into the weights of the convolutions that had it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

EPS = 1e-5  # added to a filter's deviation
# mmdetection's parts -> beginnings of our names of what their `conv_cfg` is for.
CONVOLUTIONS = {
    "backbone": ("backbone.net.",),
    "neck": ("neck.",),
    "bbox_head": ("stages.{}.box_head.convs.",),
    "mask_head": ("stages.{}.mask_head.convs.",),
}
MOST_STAGES = 3


def standardize(state: dict[str, Tensor], parts: Iterable[str]) -> None:
    """Give every filter of these parts' convolutions a mean of 0 and a deviation of 1, as they had it in use.

    Args:
        state: tensors under our names, changed in place.
        parts: of `CONVOLUTIONS`.
    """
    templates = [template for part in parts for template in CONVOLUTIONS[part]]
    beginnings = tuple(template.format(stage) for template in templates for stage in range(MOST_STAGES))
    for key, weight in state.items():
        if weight.dim() == 4 and beginnings and key.startswith(beginnings):
            filters = weight.float().flatten(1)
            centred = filters - filters.mean(dim=1, keepdim=True)
            state[key] = (centred / (filters.std(dim=1, keepdim=True) + EPS)).view_as(weight).to(weight.dtype)
