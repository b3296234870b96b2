"""The table of parts that are not converted; the names are those of the projects' own modules."""

import re

import pytest

from tailseg.zoo.other_parts import PARTS, UNKNOWN, by_part

EXAMPLES = {
    "mmdet": {
        "roi_head.semantic_head.lateral_convs.0.conv.weight": "HTC's semantic branch",
        "roi_head.mask_head.1.conv_res.conv.bias": "HTC's flow of masks",
        "roi_head.feat_relay_head.fc.weight": "SCNet's feature relay",
        "roi_head.semantic_head.convs.0.bn.weight": "norm in HTC's semantic branch",
        "backbone.layer1.0.gn4.weight": "group norm in some layers only",
        "neck.upsample_modules.0.channel_compressor.weight": "CARAFE in the neck",
        "neck.fpn_convs.0.bn.running_mean": "norm in some layers of the neck",
        "neck.fpn_convs.4.conv.weight": "further levels",
        "neck.fpn_transitions.0.0.same_up.conv.conv.weight": "FPG",
        "neck.1.refine.g.conv.weight": "chain of necks",
        "backbone.layer2.0.context_block.channel_mul_conv.0.weight": "another form than GCNet's",
        "backbone.absolute_pos_embed": "another backbone",
        "backbone.layer2.0.conv2.weight_diff": "switchable",
        "backbone.stages.0.blocks.0.attn.w_msa.logit_scale": "Swin",
        "roi_head.bbox_head.cls_fcs.0.weight": "for classes or boxes alone",
        "bbox_head.retina_cls.weight": "another kind of detector",
        "ema_backbone_conv1_weight": "moving average",
    },
    "detectron2": {
        "roi_heads.box_head.3.fc1.weight": "a cascade of another number of stages",
        "roi_heads.box_predictor.0.cls_score.zs_weight": "Detic",
        "proposal_generator.centernet_head.bbox_pred.weight": "CenterNet2",
        "sem_seg_head.predictor.weight": "Panoptic FPN",
        "roi_heads.res5.0.conv1.weight": "C4",
        "backbone.fpn_lateral2.norm.weight": "norm in some layers of the neck",
        "roi_heads.box_head.conv1.norm.weight": "norm in some layers of a head",
        "roi_heads.box_head.conv1.bias": "convolutions with norm and one",
    },
    "torchvision": {
        "roi_heads.box_head.9.weight": "another RoI head",
        "backbone.fpn.extra_blocks.p6.weight": "another neck",
        "roi_heads.keypoint_head.0.weight": "a keypoint head",
    },
}


@pytest.mark.parametrize(
    ("project", "name", "part"), [(project, *row) for project, rows in EXAMPLES.items() for row in rows.items()]
)
def test_a_tensor_tells_its_part(project: str, name: str, part: str) -> None:
    (found,) = by_part(project, [name])
    assert part in found


def test_names_stay_in_order_under_their_part() -> None:
    names = ["what.x", "roi_head.semantic_head.b", "else.y", "roi_head.semantic_head.a"]
    assert by_part("mmdet", names) == {
        UNKNOWN: ["what.x", "else.y"],
        "HTC's semantic branch, on no cascade": ["roi_head.semantic_head.b", "roi_head.semantic_head.a"],
    }
    assert by_part("another project", ["roi_head.semantic_head.b"]) == {UNKNOWN: ["roi_head.semantic_head.b"]}
    assert by_part("mmdet", []) == {}


def test_patterns_compile_and_parts_are_phrases() -> None:
    for rows in PARTS.values():
        assert len({pattern for pattern, _ in rows}) == len(rows)
        for pattern, part in rows:
            re.compile(pattern)
            assert part == part.strip(" .")
