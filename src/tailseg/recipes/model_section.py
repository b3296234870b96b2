"""The model section of a recipe: one class a part of the detector."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tailseg.recipes.backbone_options import require_known_options
from tailseg.recipes.bounds import DEEPEST, MOST_BOXES, WIDEST, Deviation
from tailseg.recipes.section import Section

# Norm after a convolution: none, batch norm over all processes, or group norm of 32 groups.
Norm = bool | Literal["group"]


def _require_pairs(residual: bool, convs: int) -> None:
    if residual and convs % 2:
        raise ValueError(f"residual needs an even number of convs, received {convs}")


class BackboneRecipe(Section):
    """`tailseg.model.backbone.Backbone`."""

    name: str = "resnet50.tv_in1k"
    """timm model with features at strides 4, 8, 16 and 32; after a dot, which of its weights.

    Those of `tv_in1k` are torchvision's first, as in mmdetection and the report. timm's own default, `a1_in1k`, was
    trained by another recipe, and SGD at a detector's usual rate does not suit it.
    """
    pretrained: bool = True
    """Start from ImageNet weights; false: from random ones, which frozen stages may not have."""
    weights: str | None = None
    """File (.safetensors, .pth, .bin) with these, in timm's or transformers' names; by default they are looked for."""
    frozen_stages: int = Field(1, ge=-1, le=4)
    """The stem and this many stages are not trained; -1 trains everything."""
    train_norm: bool = False
    """Update batch statistics while training."""
    norm_eps: float | None = Field(None, ge=0)
    """Added to the variance of batch norm; by default the network's own value."""
    stem_channels: int | None = Field(None, ge=1, le=WIDEST)
    """ResNets with a 7x7 stem: its channels; by default the network's own."""
    stride_in_1x1: bool = False
    """ResNets with bottlenecks: a stage's first 1x1 convolution has its stride, not the 3x3 one (the original form)."""
    res2net_pool: bool = True
    """Res2Nets: the first block of stage 1 averages its last part over 3x3 cells; those of mmdetection do not."""
    output_norm: bool = False
    """Swin Transformers and ConvNeXts: layer norm over the channels of each of the four maps."""
    context_stages: tuple[int, ...] = Field((), max_length=4)
    """ResNets with bottlenecks: stages (1 to 4) whose blocks end with a global context block (GCNet)."""
    context_ratio: float = Field(0.25, gt=0, le=1)
    """Hidden channels of these, as a share of the block's."""
    deformable_stages: tuple[int, ...] = Field((), max_length=4)
    """Stages (1 to 4) whose convolutions larger than 1x1 are modulated deformable ones (DCNv2)."""
    checkpointing: bool = False
    """Compute the maps of the stages again for the backward pass instead of keeping them: less memory, more time."""
    options: Annotated[dict[str, Any], AfterValidator(require_known_options)] = Field(default_factory=dict)
    """Further arguments of the timm model, such as `channels` or `drop_path_rate`."""


class NeckRecipe(Section):
    """`tailseg.model.fpn.FPN`, `pafpn.PAFPN`, `fpn_carafe.CarafeFPN`, `hrfpn.HRFPN` or `fpg.FPG`."""

    kind: Literal["fpn", "pafpn", "fpn-carafe", "hrfpn", "fpg"] = "fpn"
    """Feature pyramid network, alone, with PANet's path or with CARAFE; HRNet's pyramid, or feature pyramid grid."""
    channels: int = Field(256, ge=1, le=WIDEST)
    """Channels of P2..P6."""
    norm: Norm = False
    """FPN, PAFPN: true for batch norm after each convolution, over all processes; group for group norm."""
    pathways: int = Field(9, ge=1, le=DEEPEST)
    """FPG: pyramids beside each other."""
    deformable: bool = False
    """FPG: the convolutions after upsampling are modulated deformable ones (DCNv2)."""
    carafe: bool = False
    """FPG: CARAFE downsamples, and a convolution without stride follows; else a convolution with stride 2 does both."""

    @model_validator(mode="after")
    def _options_fit_the_kind(self) -> NeckRecipe:
        extra = self.model_dump(include={"pathways", "deformable", "carafe"}, exclude_defaults=True)
        if self.kind != "fpg" and extra:
            keys = ", ".join(extra)
            raise ValueError(f"an FPN has no {keys}; set model.neck.kind=fpg, or leave out {keys}")
        if self.kind == "fpg" and self.norm:
            raise ValueError("an FPG has batch norm in any case; leave out norm")
        if self.kind in ("fpn-carafe", "hrfpn") and self.norm:
            raise ValueError(f"a neck of kind {self.kind} has no norm; leave out norm, or set model.neck.kind=fpn")
        return self


class RpnRecipe(Section):
    """`tailseg.model.rpn.RPN`."""

    convs: int = Field(1, ge=1, le=DEEPEST)
    """Number of 3x3 convolutions before objectness and deltas."""
    width: int | None = Field(None, ge=1, le=WIDEST)
    """Channels of these convolutions; by default the neck's."""
    anchor_scale: float = Field(8.0, gt=0)
    """An anchor's side, in strides of its level."""
    pre_nms_train: int = Field(2000, ge=1, le=MOST_BOXES)
    """Anchors kept of each level before NMS, in training."""
    pre_nms_test: int = Field(1000, ge=1, le=MOST_BOXES)
    """The same at test time."""
    post_nms_train: int = Field(1000, ge=1, le=MOST_BOXES)
    """Proposals an image in training."""
    post_nms_test: int = Field(1000, ge=1, le=MOST_BOXES)
    """Proposals an image at test time."""
    nms_iou: float = Field(0.7, gt=0, le=1)
    """NMS threshold within a level."""
    box_beta: float = Field(0.0, ge=0)
    """Beta of the Smooth-L1 box loss; 0 is L1."""
    inside_image: bool = False
    """Only anchors that lie inside the image are trained."""
    rounded_anchors: bool = False
    """The corners of the anchor around (0, 0) are rounded to whole pixels, as in torchvision."""
    fitted_strides: bool = False
    """Anchors stand (image side // grid side) pixels apart, as in torchvision, instead of their level's stride."""


class RoiPoolingRecipe(Section):
    """`tailseg.model.roi_features.RoIPooler`."""

    sampling_ratio: int = Field(0, ge=0, le=32)
    """Sampling points along each side of a cell; 0 takes as many as the cell has feature pixels."""
    aligned: bool = True
    """A pixel's value stands at its centre; torchvision's own models have it at its upper left corner."""


class BoxHeadRecipe(Section):
    """`tailseg.model.box_head.BoxHead` and its sampler, the same in every stage."""

    width: int = Field(1024, ge=1, le=WIDEST)
    """Width of the two hidden layers."""
    convs: int = Field(0, ge=0, le=DEEPEST)
    """3x3 convolutions before the hidden layers, of which there is then one; not for TSD."""
    norm: Norm = True
    """After each of these convolutions: batch norm over all processes, group norm (group), or none (false)."""
    class_agnostic: bool = False
    """One box a RoI instead of one a class, of which a further stage refines the likeliest class's."""
    box_beta: float = Field(0.0, ge=0)
    """Beta of the Smooth-L1 box loss; 0 is L1."""
    low_quality: bool = True
    """An object whose best overlap reaches the stage's `iou` also takes every RoI with that same overlap."""
    rois: int = Field(512, ge=1, le=MOST_BOXES)
    """RoIs sampled an image in training."""
    max_positive: int = Field(128, ge=1, le=MOST_BOXES)
    """Most positives among them."""


class MaskHeadRecipe(Section):
    """`tailseg.model.mask_head.MaskHead`."""

    channels: int = Field(256, ge=1, le=WIDEST)
    """Channels of the hidden maps."""
    convs: int = Field(4, ge=1, le=DEEPEST)
    """Number of 3x3 convolutions."""
    residual: bool = False
    """They come in pairs, each with a shortcut (SCNet)."""
    norm: Norm = False
    """After each of them: batch norm over all processes (true), or group norm (group)."""
    upsample: Literal["deconv", "carafe"] = "deconv"
    """A transposed convolution, or content-aware reassembly (`tailseg.layers.carafe`)."""
    class_agnostic: bool = False
    """One mask a RoI instead of one a class: for sets too small to teach every class its own."""
    normalized: bool = False
    """The last 1x1 convolution is normalised (report, Eq. 3, at every place)."""
    temperature: float = Field(20.0, gt=0)
    """τ of a normalised one."""
    flow: bool = False
    """The mask head of each stage but the first also sees the hidden maps of the one before (HTC)."""
    interleaved: bool = False
    """Mask heads learn from boxes that their own stage has refined, sampled again (HTC)."""

    @model_validator(mode="after")
    def _flow_without_norm_and_pairs(self) -> MaskHeadRecipe:
        _require_pairs(self.residual, self.convs)
        if self.flow and self.norm:
            raise ValueError("mask heads that are chained have no norm; set model.mask_head.norm=false, or no flow")
        return self


class SemanticRecipe(Section):
    """`tailseg.model.semantic.SemanticBranch` (HTC, SCNet), of published models: for detection alone, untrained."""

    enabled: bool = False
    convs: int = Field(4, ge=1, le=DEEPEST)
    """Number of 3x3 convolutions."""
    residual: bool = False
    """They come in pairs, each with a shortcut (SCNet)."""

    @model_validator(mode="after")
    def _pairs(self) -> SemanticRecipe:
        _require_pairs(self.residual, self.convs)
        return self


class RelayRecipe(Section):
    """`tailseg.model.relay.FeatureRelay` (SCNet): for a mask head in the last stage alone."""

    enabled: bool = False
    """What the last box head saw in a RoI is added to the feature that its mask is made of."""


class ContextRecipe(Section):
    """`tailseg.model.context.ContextEncoder` (report, section 1.2): its vector is added to every RoI feature."""

    weight: float = Field(0.0, ge=0)
    """Of the multi-label loss; where it is 0 there is no context encoder."""
    convs: int = Field(4, ge=1, le=DEEPEST)
    """Number of 3x3 convolutions on P6."""
    residual: bool = False
    """They come in pairs, each with a shortcut."""
    norm: bool = False
    """Batch norm after each of them, over all processes."""
    unlabelled: Literal["negative", "ignored"] = "negative"
    """Classes that are neither annotated in an image nor verified to be absent: counted as absent, or left out."""

    @model_validator(mode="after")
    def _pairs(self) -> ContextRecipe:
        _require_pairs(self.residual, self.convs)
        return self


class TsdRecipe(Section):
    """`tailseg.model.tsd.TsdBoxHead`: the box head of the stages that say `tsd`."""

    shift_width: int = Field(256, ge=1, le=WIDEST)
    """Width of the layers that shift the proposals."""
    gamma: float = Field(0.1, gt=0)
    """γ: a shift of 1 moves by this share of the RoI's side."""
    class_margin: float = Field(0.3, ge=0, le=1)
    """Margin of the progressive constraint on class probabilities."""
    box_margin: float = Field(0.3, ge=0, le=1)
    """Margin of the progressive constraint on overlaps."""
    constrain_classes: bool = True
    """Use the former; the report leaves it out with Seesaw Loss."""
    zero_init_shifts: bool = False
    """Start with proposals where they are."""
    detach_targets: bool = False
    """No gradient from the box targets to the shift of the box."""


class MaskIouRecipe(Section):
    """`tailseg.model.mask_iou.MaskIouHead` (Mask Scoring R-CNN): after the last stage's mask head."""

    weight: float = Field(0.0, ge=0)
    """Of its squared error (0.5 in table 2); where it is 0 there is no such head."""
    channels: int = Field(256, ge=1, le=WIDEST)
    """Channels of the hidden maps."""
    width: int = Field(1024, ge=1, le=WIDEST)
    """Width of the two hidden layers."""


class StageRecipe(Section):
    """`tailseg.model.detector.Stage`: one of the rounds in which boxes are classified and refined."""

    iou: float = Field(0.5, gt=0, le=1)
    """A RoI is positive from this overlap with an object on."""
    stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    """Standard deviations of the box deltas."""
    tsd: bool = False
    """Its box head is TSD's (`model.tsd`)."""
    weight: float = Field(1.0, ge=0)
    """Of the losses of classes and boxes."""
    mask_weight: float = Field(1.0, ge=0)
    """Of the mask loss; a stage where it is 0 has no mask head."""


class ModelRecipe(Section):
    """The architecture; each section maps to one constructor."""

    backbone: BackboneRecipe = BackboneRecipe()
    neck: NeckRecipe = NeckRecipe()
    rpn: RpnRecipe = RpnRecipe()
    roi_pooling: RoiPoolingRecipe = RoiPoolingRecipe()
    box_head: BoxHeadRecipe = BoxHeadRecipe()
    mask_head: MaskHeadRecipe = MaskHeadRecipe()
    mask_iou: MaskIouRecipe = MaskIouRecipe()
    semantic: SemanticRecipe = SemanticRecipe()
    relay: RelayRecipe = RelayRecipe()
    context: ContextRecipe = ContextRecipe()
    tsd: TsdRecipe = TsdRecipe()
    stages: tuple[StageRecipe, ...] = Field((StageRecipe(),), min_length=1, max_length=16)
    """One for Mask R-CNN, three for a cascade; their masks are averaged."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of R, G, B in 0..255."""
    pixel_std: tuple[Deviation, Deviation, Deviation] = (58.395, 57.12, 57.375)
    """Standard deviation of R, G, B in 0..255."""

    @model_validator(mode="after")
    def _stages_fit_the_heads(self) -> ModelRecipe:
        if all(stage.mask_weight == 0 for stage in self.stages):
            raise ValueError(
                "no stage has a mask head; set the mask_weight of one, such as model.stages.0.mask_weight=1"
            )
        if self.mask_iou.weight > 0 and self.stages[-1].mask_weight == 0:
            last = f"model.stages.{len(self.stages) - 1}.mask_weight"
            raise ValueError(f"mask_iou judges the masks of the last stage, which has no mask head; set {last}=1")
        if self.box_head.convs > 0 and any(stage.tsd for stage in self.stages):
            raise ValueError("a TSD head has no convolutions; set model.box_head.convs=0, or no stage's tsd")
        if self.semantic.enabled and any(stage.tsd for stage in self.stages):
            raise ValueError("the semantic branch cannot be shifted as TSD shifts features; set no stage's tsd")
        if self.mask_head.flow and any(stage.mask_weight == 0 for stage in self.stages):
            raise ValueError("mask heads are chained from stage to stage, so each stage needs a mask_weight above 0")
        if self.mask_head.flow and self.mask_head.channels != self.neck.channels:
            raise ValueError(
                f"chained mask heads need the neck's {self.neck.channels} channels, and model.mask_head.channels is "
                f"{self.mask_head.channels}; set one to the other"
            )
        if self.mask_head.residual and self.mask_head.channels != self.neck.channels:
            raise ValueError(
                f"a residual mask head needs the neck's {self.neck.channels} channels, and model.mask_head.channels is "
                f"{self.mask_head.channels}; set one to the other"
            )
        if self.relay.enabled and any(stage.mask_weight > 0 for stage in self.stages[:-1]):
            raise ValueError("a feature relay serves the last mask head alone; set the others' mask_weight to 0")
        if self.relay.enabled and (self.stages[-1].tsd or self.mask_head.interleaved):
            raise ValueError(
                "a feature relay needs a plain box head of the mask's own RoIs in the last stage; set no tsd there and "
                "model.mask_head.interleaved=false"
            )
        return self
