"""mmdetection's configurations, read as data: the recorded ones, those of 2.x, and texts that try something."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tailseg.errors import UserError
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import merge, validate
from tailseg.zoo.conversion import convert
from tailseg.zoo.mmdet import read_mmdet
from tailseg.zoo.mmdet_config import Conventions, conventions
from tailseg.zoo.mmdet_text import read_config


def config_of(text: str) -> dict[str, Any]:
    config = read_config({"cfg": text})
    assert isinstance(config, dict)
    return config


def said(text: str, stages: int = 1) -> Conventions:
    return conventions(config_of(text), stages)


def recorded_text(shared: Path, name: str) -> str:
    text = torch.load(shared / "reference" / f"{name}.pth", weights_only=True)["meta"]["cfg"]
    assert isinstance(text, str)
    return text


# ---------------------------------------------------------------------------------------------------------
# Texts that are in use

RPN_OF_BOTH = {
    "anchor_scale": 8.0,
    "pre_nms_train": 2000,
    "pre_nms_test": 1000,
    "post_nms_test": 1000,
    "nms_iou": 0.7,
}
DATA = {"short_edges": [640, 672, 704, 736, 768, 800], "test_short_edge": 800, "long_edge": 1333}
PIXELS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}
TEST = {"score_threshold": 1e-4, "nms_iou": 0.5, "max_detections": 300}
SEESAW = {"normalized": True, "temperature": 20.0, "p": 0.8, "q": 2.0}


def test_recorded_mask_rcnn(shared: Path) -> None:
    found = said(recorded_text(shared, "model_mask_rcnn"))
    assert found.classifier == SEESAW
    assert found.blue_first is False
    assert found.values == {
        "model": {
            "backbone": {"frozen_stages": 1, "train_norm": False},
            "rpn": RPN_OF_BOTH | {"box_beta": 0.0, "post_nms_train": 1000},
            "roi_pooling": {"sampling_ratio": 0},
            "box_head": {"box_beta": 0.0, "low_quality": True, "rois": 512, "max_positive": 128},
            "mask_head": {"normalized": False},
            "mask_iou": {},
            "context": {},
            "stages": [{"iou": 0.5, "stds": [0.1, 0.1, 0.2, 0.2], "weight": 1.0, "mask_weight": 1.0}],
            **PIXELS,
        },
        "data": DATA,
        "test": TEST,
    }


def test_recorded_cascade(shared: Path) -> None:
    found = said(recorded_text(shared, "model_cascade"), 3)
    assert found.classifier == SEESAW
    assert found.values == {
        "model": {
            "backbone": {"frozen_stages": 1, "train_norm": False},
            "rpn": RPN_OF_BOTH
            | {"box_beta": pytest.approx(1 / 9, abs=1e-9), "post_nms_train": 2000, "inside_image": True},
            "roi_pooling": {"sampling_ratio": 0},
            "box_head": {"box_beta": 1.0, "low_quality": False, "rois": 512, "max_positive": 128},
            "mask_head": {"normalized": False},
            "mask_iou": {},
            "context": {},
            "stages": [
                {"iou": 0.5, "stds": [0.1, 0.1, 0.2, 0.2], "weight": 1.0, "mask_weight": 1.0},
                {"iou": 0.6, "stds": [0.05, 0.05, 0.1, 0.1], "weight": 0.5, "mask_weight": 0.5},
                {"iou": 0.7, "stds": [0.033, 0.033, 0.067, 0.067], "weight": 0.25, "mask_weight": 0.25},
            ],
            **PIXELS,
        },
        "data": DATA,
        "test": TEST,
    }


@pytest.mark.parametrize("name", ["model_mask_rcnn", "model_cascade"])
def test_the_recordings_become_their_recipe(shared: Path, tmp_path: Path, name: str) -> None:
    """Nothing of a configuration is lost on the way to the model file."""
    recipe, _ = convert(read_mmdet(shared / "reference" / f"{name}.pth"), tmp_path / "o.safetensors")
    values = said(recorded_text(shared, name), len(recipe.model.stages)).values
    filled = recipe.model_dump(mode="json")
    filled["name"] = recipe.name
    assert validate(merge(filled, values), "test") == recipe
    assert recipe.classifier.model_dump() == {"loss": "seesaw", "objectness": True, **SEESAW}


VERSION_2 = """
dataset_type = 'LVISV1Dataset'
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='Resize',
        img_scale=[(1333, 640), (1333, 672), (1333, 704), (1333, 736), (1333, 768), (1333, 800)],
        multiscale_mode='value',
        keep_ratio=True),
    dict(type='RandomFlip', flip_ratio=0.5),
    dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    dict(type='Pad', size_divisor=32)
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=(1200, 600),
        flip=False,
        transforms=[dict(type='Resize', keep_ratio=True), dict(type='RandomFlip')])
]
model = dict(
    type='MaskRCNN',
    pretrained='torchvision://resnet50',
    backbone=dict(type='ResNet', depth=50, frozen_stages=0, norm_cfg=dict(type='BN', requires_grad=True),
                  norm_eval=False, style='pytorch'),
    rpn_head=dict(
        type='RPNHead',
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='SmoothL1Loss', loss_weight=1.0)),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=2, aligned=False),
            featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(
            type='Shared2FCBBoxHead',
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0, 0, 0, 0], target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
        mask_head=dict(type='FCNMaskHead', num_convs=4)),
    train_cfg=dict(
        rpn=dict(allowed_border=-1),
        rpn_proposal=dict(nms_pre=1500, max_per_img=700, nms=dict(type='nms', iou_threshold=0.7)),
        rcnn=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.55, match_low_quality=False),
                  sampler=dict(type='RandomSampler', num=256, pos_fraction=0.3))),
    test_cfg=dict(
        rpn=dict(nms_pre=900, max_per_img=800, nms=dict(type='nms', iou_threshold=0.65), min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.45), max_per_img=100, mask_thr_binary=0.5)))
optimizer = dict(type='SGD', lr=0.02)
"""


def test_text_of_version_2(tmp_path: Path) -> None:
    config = read_config({"mmdet_version": "2.28.0", "config": VERSION_2})
    assert config is not None
    found = conventions(config, 1)
    assert found.classifier == {"normalized": False}
    assert found.blue_first is False
    assert found.values == {
        "model": {
            "backbone": {"frozen_stages": 0, "train_norm": True},
            "rpn": {
                "anchor_scale": 4.0,
                "box_beta": 1.0,
                "pre_nms_train": 1500,
                "post_nms_train": 700,
                "pre_nms_test": 900,
                "post_nms_test": 800,
                "nms_iou": 0.65,
            },
            "roi_pooling": {"sampling_ratio": 2, "aligned": False},
            "box_head": {"box_beta": 0.0, "low_quality": False, "rois": 256, "max_positive": 76},
            "mask_head": {"normalized": False},
            "mask_iou": {},
            "context": {},
            "stages": [{"iou": 0.55, "stds": [0.1, 0.1, 0.2, 0.2], "weight": 1.0, "mask_weight": 1.0}],
            **PIXELS,
        },
        "data": DATA | {"test_short_edge": 600, "long_edge": 1200},
        "test": {"score_threshold": 0.05, "nms_iou": 0.45, "max_detections": 100},
    }
    assert isinstance(validate({"name": "x", **found.values}, "test"), Recipe)


def test_settings_beside_the_model_as_before_2_5() -> None:
    """``train_cfg`` and ``test_cfg`` stood at the top then."""
    text = (
        "model = dict(type='MaskRCNN')\n"
        "train_cfg = dict(rcnn=dict(assigner=dict(pos_iou_thr=0.6)))\n"
        "test_cfg = dict(rcnn=dict(score_thr=0.2))\n"
    )
    values = said(text).values
    assert values["model"]["stages"][0]["iou"] == 0.6
    assert values["test"] == {"score_threshold": 0.2}


CAFFE = {
    "version 2": (
        "model = dict(backbone=dict(type='ResNet', style='caffe', norm_cfg=dict(type='BN', requires_grad=False)))\n"
        "img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 2.0, 3.0], to_rgb=False)\n"
    ),
    "version 3": (
        "model = dict(backbone=dict(type='ResNet', style='caffe'), data_preprocessor=dict(\n"
        "  mean=[103.53, 116.28, 123.675], std=[1.0, 2.0, 3.0], bgr_to_rgb=False, pad_size_divisor=32))\n"
    ),
    "version 3, by its default": (
        "model = dict(backbone=dict(type='ResNet', style='caffe'), data_preprocessor=dict(\n"
        "  type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675], std=[1.0, 2.0, 3.0]))\n"
    ),
}


@pytest.mark.parametrize("kind", CAFFE)
def test_caffe_style_with_blue_first(shared: Path, tmp_path: Path, kind: str) -> None:
    """Mean and deviation are turned round, and with them what the first convolution does to each colour."""
    checkpoint = torch.load(shared / "reference" / "model_mask_rcnn.pth", weights_only=True)
    checkpoint["meta"]["cfg"] = CAFFE[kind]
    torch.save(checkpoint, tmp_path / "m.pth")
    foreign = read_mmdet(tmp_path / "m.pth")
    recipe, _ = convert(foreign, tmp_path / "o.safetensors")
    assert recipe.model.pixel_mean == (123.675, 116.28, 103.53)
    assert recipe.model.pixel_std == (3.0, 2.0, 1.0)
    assert recipe.model.backbone.stride_in_1x1
    assert not recipe.model.backbone.pretrained
    theirs = checkpoint["state_dict"]["backbone.conv1.weight"]
    red_green_blue = torch.rand(1, 3, 32, 32)
    blue_green_red = red_green_blue[:, [2, 1, 0]]
    own = foreign.state["backbone.net.conv1.weight"]
    expected = torch.nn.functional.conv2d(blue_green_red, theirs)
    assert (torch.nn.functional.conv2d(red_green_blue, own) - expected).abs().max() < 1e-5
    assert not torch.equal(own, theirs)


NORMALIZE = "dict(type='Normalize', mean=[1, 2, 3], std=[4, 5, 6], to_rgb=False)"
NORMALIZING = {
    "a step alone": f"test_pipeline = [dict(type='MultiScaleFlipAug', transforms=[{NORMALIZE}])]",
    "a step before what stands beside it": (
        f"test_pipeline = [dict(type='MultiScaleFlipAug', transforms=[{NORMALIZE}])]\n"
        "img_norm_cfg = dict(mean=[7, 8, 9], std=[1, 1, 1], to_rgb=True)"
    ),
    "the step of the data set": (
        f"data = dict(test=dict(pipeline=[{NORMALIZE}]))\n"
        "test_pipeline = [dict(type='Normalize', mean=[7, 8, 9], std=[1, 1, 1], to_rgb=True)]"
    ),
}


@pytest.mark.parametrize("kind", NORMALIZING)
def test_the_test_pipeline_says_how_pixels_are_normalised(kind: str) -> None:
    found = said(f"model = dict()\n{NORMALIZING[kind]}")
    assert found.blue_first
    assert found.values["model"]["pixel_mean"] == [3, 2, 1]
    assert found.values["model"]["pixel_std"] == [6, 5, 4]


@pytest.mark.parametrize(
    ("about", "blue_first"),
    [
        ("bgr_to_rgb=False", True),
        ("type='DetDataPreprocessor'", True),
        ("mean=None, std=None, bgr_to_rgb=True", False),
        ("mean=None, std=None, rgb_to_bgr=True", False),  # turns them round whatever they were
    ],
)
def test_a_preprocessor_without_a_mean_leaves_pixels_as_they_are(about: str, blue_first: bool) -> None:
    found = said(f"model = dict(data_preprocessor=dict({about}))\nimg_norm_cfg = dict(mean=[7, 8, 9], std=[1, 1, 2])")
    assert found.blue_first == blue_first
    assert found.values["model"]["pixel_mean"] == [0, 0, 0]
    assert found.values["model"]["pixel_std"] == [1, 1, 1]


def test_pixels_that_are_normalised_in_two_places_are_refused() -> None:
    with pytest.raises(UserError, match=r"data_preprocessor beside a step of the test pipeline = \['Normalize'\]"):
        said(f"model = dict(data_preprocessor=dict(mean=[1, 2, 3], std=[1, 1, 1]))\ntest_pipeline = [{NORMALIZE}]")


def test_proposals_in_the_words_of_version_2_0() -> None:
    train = "rpn_proposal=dict(nms_pre=2000, nms_post=700, max_num=700, nms_thr=0.7)"
    test = "rpn=dict(nms_across_levels=False, nms_pre=900, nms_post=800, max_num=800, nms_thr=0.6, min_bbox_size=0)"
    found = said(f"model = dict()\ntrain_cfg = dict({train})\ntest_cfg = dict({test})")
    assert found.values["model"]["rpn"] == {
        "pre_nms_train": 2000,
        "post_nms_train": 700,
        "pre_nms_test": 900,
        "post_nms_test": 800,
        "nms_iou": 0.6,
    }
    found = said("model = dict(test_cfg=dict(rpn=dict(nms_post=300)))")
    assert found.values["model"]["rpn"] == {"post_nms_test": 300}


def test_the_size_of_the_data_set_that_is_tested_on() -> None:
    steps = "[dict(type='Resize', scale=(640, 640))]"
    found = said(
        "model = dict()\ntest_pipeline = [dict(type='Resize', scale=(1333, 800))]\n"
        f"test_dataloader = dict(dataset=dict(pipeline={steps}))"
    )
    assert found.values["data"] == {"test_short_edge": 640, "long_edge": 640}


@pytest.mark.parametrize(
    "backbone",
    [
        "type='ResNet', strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1), act_cfg=dict(type='ReLU')",
        "type='RegNet', strides=(2, 2, 2, 2)",
        "type='SwinTransformer', strides=(4, 2, 2, 2), act_cfg=dict(type='GELU')",
    ],
)
def test_usual_values_that_are_said_are_no_obstacle(backbone: str) -> None:
    heads = (
        "bbox_roi_extractor=dict(roi_layer=dict(output_size=7, pool_mode='avg')),"
        "mask_roi_extractor=dict(roi_layer=dict(output_size=(14, 14))),"
        "bbox_head=dict(reg_predictor_cfg=dict(type='Linear'), bbox_coder=dict(clip_border=True)),"
        "mask_head=dict(predictor_cfg=dict(type='Conv'))"
    )
    anchors = "anchor_generator=dict(base_sizes=[4, 8, 16, 32, 64])"
    found = said(f"model = dict(backbone=dict({backbone}), rpn_head=dict({anchors}), roi_head=dict({heads}))")
    assert found.values["model"]["backbone"] == {}


def test_red_first_by_the_default_of_version_2() -> None:
    """There, pictures are turned to R, G, B unless it says otherwise."""
    found = said("model = dict(type='MaskRCNN')\nimg_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 6])")
    assert not found.blue_first
    assert found.values["model"]["pixel_mean"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("predictor", "expected"),
    [
        ("dict(type='NormedLinear', tempearture=20)", {"normalized": True, "temperature": 20.0}),
        ("dict(type='NormedLinear', tempearture=30)", {"normalized": True, "temperature": 30.0}),
        ("dict(type='NormedLinear', temperature=16)", {"normalized": True, "temperature": 16.0}),
        ("dict(type='NormedLinear')", {"normalized": True, "temperature": 20.0}),
        ("dict(type='Linear')", {"normalized": False}),
        ("None", {"normalized": False}),
    ],
)
def test_temperature_misspelt_and_right(predictor: str, expected: dict[str, Any]) -> None:
    head = f"dict(cls_predictor_cfg={predictor}, loss_cls=dict(type='SeesawLoss', p=0.6, q=0.0))"
    assert said(f"model = dict(roi_head=dict(bbox_head={head}))").classifier == expected | {"p": 0.6, "q": 0.0}
    head = f"dict(predictor_cfg={predictor})".replace("NormedLinear", "NormedConv2d")
    assert said(f"model = dict(roi_head=dict(mask_head={head}))").values["model"]["mask_head"] == expected


LATER_PARTS = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='SCNet',
    backbone=dict(type='ResNet', frozen_stages=1, norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=False),
    neck=dict(type='FPN', out_channels=256),
    roi_head=dict(
        type='SCNetRoIHead',
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[dict(type='Shared4Conv1FCBBoxHead', norm_cfg=dict(type='SyncBN', requires_grad=True, eps=1e-05))],
        mask_head=dict(
            type='FCNMaskHead',
            norm_cfg=dict(type='BN'),
            upsample_cfg=dict(type='carafe', scale_factor=2, up_kernel=5, up_group=1, encoder_kernel=3,
                              encoder_dilation=1, compressed_channels=64)),
        mask_iou_head=dict(type='MaskIoUHead', num_convs=4, num_fcs=2, roi_feat_size=14,
                           loss_iou=dict(type='MSELoss', loss_weight=0.4)),
        semantic_head=None,
        feat_relay_head=None,
        glbctx_head=dict(type='GlobalContextHead', num_convs=4, loss_weight=2, norm_cfg=dict(type='MMSyncBN'))),
    train_cfg=dict(rcnn=[dict(mask_thr_binary=0.5)]))
"""


def test_later_parts() -> None:
    model = said(LATER_PARTS, 3).values["model"]
    assert model["backbone"] == {"frozen_stages": 1, "train_norm": True}
    assert model["mask_head"] == {"normalized": False}  # what tensors show is left to them
    assert model["mask_iou"] == {"weight": 0.4}
    assert model["context"] == {"weight": 2.0}
    # SCNet's single mask head learns with the weights of all stages.
    assert [(stage["weight"], stage["mask_weight"]) for stage in model["stages"]] == [
        (1.0, 1.75),
        (0.5, 1.75),
        (0.25, 1.75),
    ]


@pytest.mark.parametrize(
    ("heads", "mask_iou", "context"),
    [
        # mmdetection's defaults: 0.5 of a head that does not name its loss, 1 of a loss that does not name its weight.
        ("mask_iou_head=dict(type='MaskIoUHead'), glbctx_head=dict(type='GlobalContextHead')", {}, {"weight": 1.0}),
        ("mask_iou_head=dict(loss_iou=dict(type='MSELoss')), glbctx_head=None", {"weight": 1.0}, {}),
    ],
)
def test_weights_of_later_parts_by_default(heads: str, mask_iou: dict[str, Any], context: dict[str, Any]) -> None:
    model = said(f"model = dict(roi_head=dict({heads}))").values["model"]
    assert (model["mask_iou"], model["context"]) == (mask_iou, context)


def test_seesaw_by_its_defaults() -> None:
    found = said("model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(type='SeesawLoss'))))")
    assert found.classifier == {"normalized": False, "p": 0.8, "q": 2.0}


SIZES = {
    "one of version 3": ("dict(type='Resize', scale=(1333, 800), keep_ratio=True)", [800], (800, 1333)),
    "short first": ("dict(type='Resize', img_scale=(480, 640))", [480], (480, 640)),
    "a choice": (
        "dict(type='RandomChoiceResize', scales=[(1333, 640), (1333, 800)])",
        [640, 800],
        (640, 1333),
    ),
    "a range, from which we do not draw": (
        "dict(type='Resize', img_scale=[(1333, 640), (1333, 800)], multiscale_mode='range')",
        None,
        None,
    ),
    "other steps": ("dict(type='RandomCrop', scale=(100, 200))", None, None),
    "stretched": ("dict(type='Resize', scale=(1333, 800), keep_ratio=False)", None, None),
    "no size": ("dict(type='Resize', scale_factor=2.0)", None, None),
    "no step": ("None", None, None),
}


@pytest.mark.parametrize("kind", SIZES)
def test_image_sizes(kind: str) -> None:
    step, short_edges, test = SIZES[kind]
    data = said(f"model = dict()\ntrain_pipeline = [{step}]\ntest_pipeline = [{step}]").values["data"]
    expected: dict[str, Any] = {}
    if test is not None:
        expected = {"short_edges": short_edges, "test_short_edge": test[0], "long_edge": test[1]}
    assert data == expected


def test_an_empty_configuration_leaves_our_defaults() -> None:
    found = said("model = dict()")
    stages = [{"weight": 1.0, "mask_weight": 1.0}]
    parts = ("backbone", "rpn", "roi_pooling", "box_head", "mask_head", "mask_iou", "context")
    assert found.values["model"] == {**{part: {} for part in parts}, "stages": stages}
    assert (found.values["data"], found.values["test"], found.classifier) == ({}, {}, {})


# ---------------------------------------------------------------------------------------------------------
# What we have not

REFUSED = {
    "rpn_head=dict(loss_bbox=dict(type='DistanceLoss'))": "model.rpn_head.loss_bbox.type = 'DistanceLoss'",
    "roi_head=dict(bbox_head=dict(loss_bbox=dict(type='DistanceLoss')))": "model.roi_head.bbox_head.loss_bbox.type",
    "rpn_head=dict(anchor_generator=dict(ratios=[0.5, 1.0]))": "model.rpn_head.anchor_generator.ratios = [0.5, 1.0]",
    "rpn_head=dict(anchor_generator=dict(strides=[8, 16, 32, 64, 128]))": "model.rpn_head.anchor_generator.strides",
    "rpn_head=dict(anchor_generator=dict(scales=[2, 4, 8]))": "model.rpn_head.anchor_generator.scales = [2, 4, 8]",
    "rpn_head=dict(anchor_generator=dict(octave_base_scale=4))": "anchor_generator.octave_base_scale = 4",
    "rpn_head=dict(loss_cls=dict(use_sigmoid=False))": "model.rpn_head.loss_cls.use_sigmoid = False",
    "roi_head=dict(bbox_head=dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True)))": "use_sigmoid = True",
    "roi_head=dict(bbox_head=dict(loss_cls=dict(type='GHMC')))": "model.roi_head.bbox_head.loss_cls.type = 'GHMC'",
    "roi_head=dict(bbox_head=dict(bbox_coder=dict(target_means=[0.5, 0, 0, 0])))": "bbox_coder.target_means",
    "roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(type='RoIPool')))": "roi_layer.type = 'RoIPool'",
    "roi_head=dict(mask_roi_extractor=dict(featmap_strides=[4, 8, 16]))": "mask_roi_extractor.featmap_strides",
    "roi_head=dict(bbox_roi_extractor=dict(finest_scale=112))": "bbox_roi_extractor.finest_scale = 112",
    "roi_head=dict(mask_roi_extractor=dict(roi_layer=dict(output_size=28)))": "mask_roi_extractor.roi_layer.output_s",
    "roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(output_size=14)))": "bbox_roi_extractor.roi_layer.output_s",
    "roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(pool_mode='max')))": "roi_layer.pool_mode = 'max'",
    "roi_head=dict(bbox_roi_extractor=[dict(), dict(finest_scale=112)])": "bbox_roi_extractor.finest_scale = 112",
    "backbone=dict(type='ResNet', dilations=(1, 1, 1, 2))": "model.backbone.dilations = [1, 1, 1, 2]",
    "backbone=dict(type='ResNet', strides=(1, 2, 2, 1))": "model.backbone.strides = [1, 2, 2, 1]",
    "backbone=dict(type='RegNet', strides=(1, 2, 2, 2))": "model.backbone.strides = [1, 2, 2, 2]",
    "backbone=dict(type='ResNet', act_cfg=dict(type='GELU'))": "model.backbone.act_cfg.type = 'GELU'",
    "backbone=dict(type='SwinTransformer', act_cfg=dict(type='ReLU'))": "model.backbone.act_cfg.type = 'ReLU'",
    "rpn_head=dict(act_cfg=dict(type='SiLU'))": "model.rpn_head.act_cfg.type = 'SiLU'",
    "roi_head=dict(mask_head=dict(act_cfg=dict(type='LeakyReLU')))": "mask_head.act_cfg.type = 'LeakyReLU'",
    "roi_head=dict(bbox_head=dict(act_cfg=dict(type='GELU')))": "bbox_head.act_cfg.type = 'GELU'",
    "roi_head=dict(mask_head=dict(predictor_cfg=dict(type='NormedConv2d', power=0.5)))": "predictor_cfg.power = 0.5",
    "roi_head=dict(mask_head=dict(predictor_cfg=dict(type='DCN')))": "mask_head.predictor_cfg.type = 'DCN'",
    "roi_head=dict(bbox_head=dict(cls_predictor_cfg=dict(type='NormedLinear', power=0.5)))": "cls_predictor_cfg.power",
    "roi_head=dict(bbox_head=dict(cls_predictor_cfg=dict(type='NormedLinear', eps=0.1)))": "cls_predictor_cfg.eps",
    "roi_head=dict(bbox_head=dict(reg_predictor_cfg=dict(type='NormedLinear')))": "bbox_head.reg_predictor_cfg.type",
    "roi_head=dict(bbox_head=dict(bbox_coder=dict(clip_border=False)))": "bbox_head.bbox_coder.clip_border = False",
    "roi_head=dict(bbox_head=dict(bbox_coder=dict(add_ctr_clamp=True)))": "bbox_head.bbox_coder.add_ctr_clamp = True",
    "rpn_head=dict(bbox_coder=dict(type='TBLRBBoxCoder'))": "rpn_head.bbox_coder.type = 'TBLRBBoxCoder'",
    "rpn_head=dict(bbox_coder=dict(target_means=[0, 0, 0, 0.5]))": "rpn_head.bbox_coder.target_means",
    "rpn_head=dict(bbox_coder=dict(clip_border=False))": "rpn_head.bbox_coder.clip_border = False",
    "rpn_head=dict(anchor_generator=dict(base_sizes=[16, 32, 64, 128, 256]))": "anchor_generator.base_sizes = [16, 32,",
    "rpn_head=dict(anchor_generator=dict(centers=[(0, 0)]))": "anchor_generator.centers = [[0, 0]]",
    "test_cfg=dict(rpn=dict(max_num=100, nms_post=300))": "model.test_cfg.rpn.nms_post = 300",
    "test_cfg=dict(rpn=dict(nms_across_levels=True))": "model.test_cfg.rpn.nms_across_levels = True",
    "test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms', iou_threshold=0.5)))": "model.test_cfg.rcnn.nms.type = 'soft_n",
    "test_cfg=dict(rcnn=dict(mask_thr_binary=0.45))": "model.test_cfg.rcnn.mask_thr_binary = 0.45",
    "test_cfg=dict(rcnn=dict(mask_thr_binary=-1))": "model.test_cfg.rcnn.mask_thr_binary = -1",
    "test_cfg=dict(rcnn=dict(nms=dict(type='nms', iou_threshold=0.5, class_agnostic=True)))": "class_agnostic = True",
    "rpn_head=dict(anchor_generator=dict(center_offset=0.5))": "model.rpn_head.anchor_generator.center_offset = 0.5",
    "rpn_head=dict(anchor_generator=dict(type='LegacyAnchorGenerator'))": "anchor_generator.type = 'LegacyAnchorG",
    "rpn_head=dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]))": "model.rpn_head.bbox_coder.target_stds",
    "roi_head=dict(bbox_head=dict(bbox_coder=dict(type='LegacyDeltaXYWHBBoxCoder')))": "bbox_head.bbox_coder.type",
    "backbone=dict(type='TridentResNet')": "model.backbone.type = 'TridentResNet'",
    "backbone=dict(type='ResNeSt', avg_down_stride=False)": "model.backbone.avg_down_stride = False",
    "backbone=dict(type='ResNet', style='tensorflow')": "model.backbone.style = 'tensorflow'",
    "backbone=dict(type='ResNet', norm_cfg=dict(type='GN', num_groups=16))": "model.backbone.norm_cfg.num_groups = 16",
    "neck=dict(type='FPN', norm_cfg=dict(type='IN'))": "model.neck.norm_cfg.type = 'IN'",
    "neck=dict(type='FPN', act_cfg=dict(type='ReLU'))": "model.neck.act_cfg.type = 'ReLU'",
    "neck=dict(type='NASFPN', stack_times=7)": "model.neck.type = 'NASFPN'",
    "neck=dict(type='FPN_CARAFE', upsample_cfg=dict(type='deconv'))": "model.neck.upsample_cfg.type = 'deconv'",
    "roi_head=dict(bbox_head=dict(norm_cfg=dict(type='IN')))": "bbox_head.norm_cfg.type = 'IN'",
    "roi_head=dict(mask_head=dict(norm_cfg=dict(type='GN', num_groups=16)))": "mask_head.norm_cfg.num_groups = 16",
    "roi_head=dict(mask_head=dict(norm_cfg=dict(type='BN', eps=0.001)))": "mask_head.norm_cfg.eps = 0.001,",
    "roi_head=dict(glbctx_head=dict(norm_cfg=dict(type='GN')))": "glbctx_head.norm_cfg.type = 'GN'",
    "roi_head=dict(glbctx_head=dict(type='OwnHead'))": "model.roi_head.glbctx_head.type = 'OwnHead'",
    "roi_head=dict(mask_head=dict(upsample_cfg=dict(type='bilinear')))": "mask_head.upsample_cfg.type = 'bilinear'",
    "roi_head=dict(mask_head=dict(upsample_cfg=dict(type='deconv', scale_factor=4)))": "upsample_cfg.scale_factor = 4",
    **{
        f"roi_head=dict(mask_head=dict(upsample_cfg=dict(type='carafe', {key}={value})))": f"_cfg.{key} = {value}"
        for key, value in (
            ("up_kernel", 3),
            ("up_group", 4),
            ("encoder_kernel", 5),
            ("encoder_dilation", 2),
            ("compressed_channels", 32),
        )
    },
    "roi_head=dict(mask_iou_head=dict(type='OwnIoUHead'))": "model.roi_head.mask_iou_head.type = 'OwnIoUHead'",
    "roi_head=dict(mask_iou_head=dict(loss_iou=dict(type='L1Loss')))": "mask_iou_head.loss_iou.type = 'L1Loss'",
    "roi_head=dict(mask_iou_head=dict(num_convs=4)), train_cfg=dict(rcnn=dict(mask_thr_binary=0.3))": (
        "model.train_cfg.rcnn.mask_thr_binary = 0.3"
    ),
    "roi_head=dict(semantic_head=dict(type='PanopticFPNHead'))": "semantic_head.type = 'PanopticFPNHead'",
    "roi_head=dict(type='PointRendRoIHead')": "model.roi_head.type = 'PointRendRoIHead'",
    "roi_head=dict(feat_relay_head=dict(scale_factor=1))": "feat_relay_head.scale_factor = 1",
    "roi_head=dict(type='HybridTaskCascadeRoIHead', mask_info_flow=False)": "model.roi_head.mask_info_flow = False",
}


@pytest.mark.parametrize("part", REFUSED)
def test_refused_by_the_name_of_the_key(part: str) -> None:
    with pytest.raises(UserError, match=r"^its configuration has model\.") as caught:
        said(f"model = dict({part})")
    assert REFUSED[part] in str(caught.value)
    assert "which tailseg has not" in str(caught.value)


def test_what_only_a_training_has_is_no_obstacle() -> None:
    losses = "rpn_head=dict(loss_bbox=dict(type='CIoULoss'), reg_decoded_bbox=True)"
    heads = "bbox_head=dict(loss_bbox=dict(type='BalancedL1Loss', beta=1.0))"
    found = said(f"model = dict({losses}, roi_head=dict(type='PISARoIHead', {heads}))")
    assert found.trained_otherwise == (
        "CIoULoss of boxes in the RPN (here L1 of deltas)",
        "BalancedL1Loss of deltas in the box heads (here L1 of deltas)",
        "prime sample attention (PISA; here random samples)",
    )
    assert found.values["model"]["rpn"] == {"box_beta": 0.0}
    assert found.values["model"]["box_head"] == {"box_beta": 0.0}
    usual = said("model = dict(rpn_head=dict(loss_bbox=dict(type='SmoothL1Loss', beta=0.5), reg_decoded_bbox=False))")
    assert usual.trained_otherwise == ()
    assert usual.values["model"]["rpn"] == {"box_beta": 0.5}


def test_whole_numbers_are_as_good_as_others() -> None:
    found = said("model = dict(rpn_head=dict(anchor_generator=dict(ratios=(0.5, 1, 2), scales=(8,))))")
    assert found.values["model"]["rpn"] == {"anchor_scale": 8.0}


# ---------------------------------------------------------------------------------------------------------
# Texts that are no configuration, or more than one

NO_PYTHON = [
    "",
    "model = ",
    "model = dict(",
    "{'model': 1",
    "model: MaskRCNN\n  backbone: 3",
    "\x00",
    "model = 'text'",
    "model = dict",
    "model = [dict()]",
    "model += dict()",
    "ünïcödé",
    "model = " + "(" * 5000 + ")" * 5000,
    "model = " + "[" * 150 + "]" * 150,
    "model = " + "-" * 100_000 + "1",
    "model = " + "1+" * 100_000 + "1",
    "model = " + "a." * 50_000 + "b",
]


@pytest.mark.parametrize("text", NO_PYTHON, ids=range(len(NO_PYTHON)))
def test_a_text_that_holds_no_model(text: str) -> None:
    assert read_config({"cfg": text}) is None
    assert read_config({"config": text}) is None


@pytest.mark.parametrize("meta", [{}, {"cfg": None}, {"cfg": 3}, {"cfg": {"model": {}}}, {"config": b"model = dict()"}])
def test_no_text(meta: dict[str, Any]) -> None:
    assert read_config(meta) is None


def test_deep_nesting_within_a_model() -> None:
    for depth in (50, 90, 150, 1000, 20_000):
        text = "model = dict(type='X', " + "a=dict(" * depth + ")" * depth + ", b=[" + "[" * depth + "]" * depth + "])"
        config = read_config({"cfg": text})
        assert config is None or config["model"]["type"] == "X"


def test_calls_are_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    attacks = [
        f"open({str(marker)!r}, 'w').close()",
        f"__import__('pathlib').Path({str(marker)!r}).touch()",
        f"exec({f'open({str(marker)!r}, 1)'!r})",
        f"[open({str(marker)!r}, 'w') for _ in 'a']",
        f"(lambda: open({str(marker)!r}, 'w'))()",
        f'f"{{open({str(marker)!r}, chr(119))}}"',
        f"dict(open({str(marker)!r}, 'w'))",
        f"dict(**open({str(marker)!r}, 'w'))",
        f"(x := open({str(marker)!r}, 'w'))",
    ]
    for attack in attacks:
        config = config_of(
            f"import os\n{attack}\na = {attack}\nif {attack}:\n    pass\n"
            f"model = dict(type='MaskRCNN', x={attack}, y=[{attack}], z={{'k': {attack}}})\n"
            f"class A:\n    {attack}\n"
        )
        assert config["model"]["type"] == "MaskRCNN"
        assert config["model"]["x"] in (None, {})
        assert config["model"]["y"] in ([None], [{}])
        conventions(config, 1)
    assert not marker.exists()


def test_only_literals_are_read() -> None:
    config = config_of(
        "a = 1\nb = a\n"
        "model = dict(x=a, y=1 + 1, z=-3, t=(1, 'b', None), u={'k': [True], 2: -0.5}, **{'v': 1}, w={1, 2})"
    )
    assert config == {
        "a": 1,
        "b": None,
        "model": {
            "x": None,
            "y": None,
            "z": -3,
            "t": [1, "b", None],
            "u": {"k": [True], 2: -0.5},
            "w": None,
        },
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested values, containers included."""
    if path:
        yield path
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in rows:
        yield from places(inner, (*path, key))


ODD = (None, "text", "", -1, 0, 10**30, float("nan"), 2.5, True, [], [None], ["a"], [[]], {}, {"type": 3}, [{}, 1])


@pytest.mark.parametrize(("name", "stages"), [("model_mask_rcnn", 1), ("model_cascade", 3), ("", 3)])
def test_odd_values_give_a_recipe_or_one_sentence(shared: Path, name: str, stages: int) -> None:
    """Whatever stands at any place of a configuration."""
    config = config_of(recorded_text(shared, name) if name else LATER_PARTS)
    config = {key: config[key] for key in ("model", "train_pipeline", "test_pipeline") if key in config}
    base = Recipe(name="").model_dump(mode="json")
    base["model"]["box_head"]["class_agnostic"] = stages > 1  # as tensors say
    refused = taken = 0
    faults = []
    for place in places(config):
        for odd in ODD:
            changed = copy.deepcopy(config)
            target: Any = changed
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = odd
            if not isinstance(changed["model"], dict):
                continue  # which `read_config` lets through nowhere
            try:
                found = conventions(changed, stages)
                values = merge(base, found.values)
                validate(merge(values, {"classifier": {"loss": "seesaw"} | found.classifier}), "test")
                taken += 1
            except UserError as error:
                refused += 1
                if "\n" in str(error):
                    faults.append(f"{place} = {odd!r}: several lines")
            except Exception as error:
                faults.append(f"{'.'.join(map(str, place))} = {odd!r}: {type(error).__name__}: {error}")
    assert not faults, f"{len(faults)} places, such as:\n" + "\n".join(faults[::10])
    assert refused > 100
    assert taken > (1000 if name else 300)
