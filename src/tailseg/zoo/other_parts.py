"""Parts of other projects' detectors that are not converted, told by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Project -> what is found in a tensor's own name -> the part that it belongs to; the first that fits is taken.
PARTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mmdet": (
        (r"^ema_", "a moving average beside the weights"),
        (r"^roi_head\.semantic_head\..*\.(bn|gn)\.", "norm in HTC's semantic branch"),
        (r"^roi_head\.semantic_head\.", "HTC's semantic branch, on no cascade"),
        (r"\.gn\d?\.", "group norm in some layers only"),
        (r"^roi_head\.mask_head\.\d+\.conv_res\.", "HTC's flow of masks from stage to stage"),
        (r"^roi_head\.feat_relay_head\.", "SCNet's feature relay, on no cascade"),
        (r"^roi_head\.glbctx_head\.", "a global context of another form than SCNet's on a cascade"),
        (r"^roi_head\.mask_iou_head\.", "a mask IoU head of another form than that of Mask Scoring R-CNN"),
        (r"^roi_head\.point_head\.", "PointRend's point head"),
        (r"^roi_head\.mask_head\.", "another mask head than FCNMaskHead"),
        (r"^roi_head\.bbox_head\..*(cls|reg)_(convs|fcs)\.", "a box head with layers for classes or boxes alone"),
        (r"^roi_head\.bbox_head\.", "another box head than Shared2FCBBoxHead and Shared4Conv1FCBBoxHead"),
        (r"^roi_head\.", "another RoI head"),
        (r"^neck\.upsample_modules\.", "CARAFE in the neck"),
        (r"^neck\.(lateral|fpn)_convs\.\d+\.bn\.", "norm in some layers of the neck only"),
        (r"^neck\.fpn_convs\.\d", "further levels of the pyramid by convolution"),
        (r"^neck\.(downsample|pafpn)_convs\.", "PAFPN's second pathway"),
        (r"^neck\.(fpn_transitions|lateral_skip|output_transition)", "FPG's grid of pathways"),
        (r"^neck\.\d\.", "a chain of necks, such as Libra R-CNN's"),
        (r"^neck\.rfp", "DetectoRS's recursive pyramid"),
        (r"^neck\.", "another neck than FPN"),
        (r"^rpn_head\.", "another RPN than that of Faster R-CNN"),
        (r"^backbone\..*\.(switch|weight_diff|pre_context|post_context)\b", "DetectoRS's switchable convolutions"),
        (r"^backbone\.rfp|\.rfp_conv\.", "DetectoRS's recursive pyramid"),
        (r"^backbone\..*\.context_block\d*\.", "context blocks of another form than GCNet's"),
        (r"^backbone\..*\.gen_attention_block\d*\.", "generalised attention"),
        (r"^backbone\.(patch_embed|stages|downsample_layers)\b", "a Swin Transformer or ConvNeXt of another form"),
        (r"^backbone\..*\.conv_offset\.", "deformable convolutions outside of a bottleneck's 3x3"),
        (r"^backbone\.", "another backbone than those that are converted"),
        (r"^(bbox_head|mask_head|panoptic|decode_head|query_head|encoder|decoder)", "another kind of detector"),
    ),
    "detectron2": (
        (r"^proposal_generator\.centernet_head\.", "CenterNet2's proposals"),
        (r"\.(zs_weight|freq_weight)$", "Detic's and CenterNet2's classifier"),
        (r"^roi_heads\.(box_head|box_predictor)\.\d+\.", "a cascade of another number of stages than 3"),
        (r"^roi_heads\.(box|mask)_head\..*\.norm\.", "norm in some layers of a head only"),
        (r"^roi_heads\.box_head\.(conv|fc)\d", "another box head than two layers, or convolutions with norm and one"),
        (r"^roi_heads\.(mask_coarse|mask_point|mask_head\.(coarse|point))", "PointRend's mask head"),
        (r"^roi_heads\.keypoint", "a keypoint head"),
        (r"^roi_heads\.res5\.|^backbone\.(stem|res\d)\.", "a C4 or DC5 model, without a pyramid"),
        (r"^roi_heads\.", "another RoI head"),
        (
            r"^backbone\.fpn_(lateral|output)\d\.norm\.",
            "norm in some layers of the neck only",
        ),
        (r"^backbone\.bottom_up\.stem\.", "a deep stem of several convolutions"),
        (r"^backbone\.bottom_up\.", "another backbone than ResNet and ResNeXt"),
        (r"^backbone\.", "another neck than FPN"),
        (r"^proposal_generator\.", "another RPN than that of Faster R-CNN"),
        (r"^sem_seg_head\.", "a semantic branch (Panoptic FPN)"),
    ),
    "torchvision": (
        (r"^roi_heads\.keypoint", "a keypoint head"),
        (r"^roi_heads\.", "another RoI head"),
        (r"^backbone\.fpn\.", "another neck than FPN"),
        (r"^backbone\.", "another backbone than ResNet and ResNeXt"),
        (r"^rpn\.", "another RPN than that of Faster R-CNN"),
    ),
}
UNKNOWN = "no part that is known"


def by_part(project: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Names of tensors that are left over, by the part that tailseg does not have.

    Args:
        project: whose names they are; of another than these all are unknown.
        names: the tensors' own.
    """
    parts: dict[str, list[str]] = {}
    for name in names:
        fitting = (part for pattern, part in PARTS.get(project, ()) if re.search(pattern, name))
        parts.setdefault(next(fitting, UNKNOWN), []).append(name)
    return parts
