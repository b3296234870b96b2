"""Networks of Hugging Face transformers under timm's names; with transformers itself it was once checked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import made
from torch import Tensor, nn

from tailseg.errors import UserError
from tailseg.model.backbone import Backbone
from tailseg.model.pretrained import load_pretrained
from tailseg.model.transformers_names import in_timm_s_names

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
Pairs = dict[str, str]  # timm's name -> theirs


def resnet(depths: tuple[int, ...], convs: int) -> Pairs:
    pairs = {"conv1.weight": "embedder.embedder.convolution.weight"}
    pairs |= {f"bn1.{part}": f"embedder.embedder.normalization.{part}" for part in NORM}
    for stage, depth in enumerate(depths):
        for block in range(depth):
            theirs, ours = f"encoder.stages.{stage}.layers.{block}", f"layer{stage + 1}.{block}"
            layers = [(f"layer.{i}", f"conv{i + 1}", f"bn{i + 1}") for i in range(convs)]
            for their, conv, norm in [*layers, ("shortcut", "downsample.0", "downsample.1")]:
                pairs[f"{ours}.{conv}.weight"] = f"{theirs}.{their}.convolution.weight"
                pairs |= {f"{ours}.{norm}.{part}": f"{theirs}.{their}.normalization.{part}" for part in NORM}
    return {f"{key}": f"resnet.{value}" for key, value in pairs.items()}


def convnext(depths: tuple[int, ...], prefix: str) -> Pairs:
    pairs = {"stem.0": "embeddings.patch_embeddings", "stem.1": "embeddings.layernorm", "head.norm": "layernorm"}
    for stage, depth in enumerate(depths):
        for i in (0, 1):
            pairs[f"stages.{stage}.downsample.{i}"] = f"encoder.stages.{stage}.downsampling_layer.{i}"
        for block in range(depth):
            theirs, ours = f"encoder.stages.{stage}.layers.{block}", f"stages.{stage}.blocks.{block}"
            pairs |= {f"{ours}.conv_dw": f"{theirs}.dwconv", f"{ours}.norm": f"{theirs}.layernorm"}
            pairs |= {f"{ours}.mlp.fc{i}": f"{theirs}.pwconv{i}" for i in (1, 2)}
            pairs[f"{ours}.mlp.grn"] = f"{theirs}.grn"
            pairs[f"{ours}.gamma"] = f"{theirs}.layer_scale_parameter"
    both = {f"{key}.{part}": f"{value}.{part}" for key, value in pairs.items() for part in ("weight", "bias")}
    gammas = {key: value for key, value in pairs.items() if key.endswith("gamma")}
    return {key: f"{prefix}.{value}" for key, value in (both | gammas).items()}


def swin(depths: tuple[int, ...]) -> Pairs:
    pairs = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "patch_embed.norm": "embeddings.norm"}
    pairs["norm"] = "layernorm"
    for stage, depth in enumerate(depths):
        for part in ("norm", "reduction"):
            pairs[f"layers.{stage + 1}.downsample.{part}"] = f"encoder.layers.{stage}.downsample.{part}"
        for block in range(depth):
            theirs, ours = f"encoder.layers.{stage}.blocks.{block}", f"layers.{stage}.blocks.{block}"
            pairs |= {f"{ours}.norm1": f"{theirs}.layernorm_before", f"{ours}.norm2": f"{theirs}.layernorm_after"}
            pairs |= {f"{ours}.attn.proj": f"{theirs}.attention.output.dense"}
            pairs |= {f"{ours}.attn.{part}": f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")}
            pairs |= {f"{ours}.mlp.fc1": f"{theirs}.intermediate.dense", f"{ours}.mlp.fc2": f"{theirs}.output.dense"}
    both = {f"{key}.{part}": f"swin.{value}.{part}" for key, value in pairs.items() for part in ("weight", "bias")}
    table = "relative_position_bias_table"
    for stage, depth in enumerate(depths):
        for block in range(depth):
            theirs = f"swin.encoder.layers.{stage}.blocks.{block}.attention.self.{table}"
            both[f"layers.{stage}.blocks.{block}.attn.{table}"] = theirs
    return both


def theirs_of(network: nn.Module, pairs: Pairs) -> dict[str, Tensor]:
    """Random tensors of a network of timm's under their names and in their shapes, with a classifier."""
    found: dict[str, Tensor] = {"classifier.weight": torch.ones(2, 3), "classifier.bias": torch.ones(2)}
    for key, like in network.state_dict().items():
        value = torch.rand(like.shape) if like.is_floating_point() else torch.ones_like(like)
        if ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[pairs[key.replace("qkv", name)]] = part
        elif ".mlp.grn." in key:
            found[pairs[key]] = value.view(1, 1, 1, -1)
        elif ".mlp.fc" in key and value.dim() > 1:
            found[pairs[key]] = value.flatten(1)
        elif not key.startswith(("fc.", "head.fc.")):
            found[pairs[key]] = value
    return found


WIDTHS, DEPTHS = (8, 16, 24, 32), (1, 2, 1, 1)


@pytest.mark.parametrize("family", ["resnet", "convnext", "convnextv2", "swin"])
def test_every_tensor_finds_its_place(family: str) -> None:
    network: nn.Module
    torch.manual_seed(0)
    if family == "resnet":
        network = timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, DEPTHS, channels=WIDTHS)
        pairs = resnet(DEPTHS, 3)
    elif family == "swin":
        sizes = {"img_size": 56, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
        network, pairs = timm.models.swin_transformer.SwinTransformer(**sizes), swin((2, 2))
    else:
        second = {"use_grn": True, "ls_init_value": None} if family == "convnextv2" else {}
        network = timm.models.convnext.ConvNeXt(dims=WIDTHS, depths=DEPTHS, **second)
        pairs = convnext(DEPTHS, family)
    theirs = theirs_of(network, pairs)
    index = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    more = {index: torch.zeros(49, 49)} if family == "swin" else {}
    ours = in_timm_s_names(theirs | more)
    for key, like in network.state_dict().items():
        if ".attn.qkv." in key:
            parts = [theirs[pairs[key.replace("qkv", name)]] for name in ("query", "key", "value")]
            assert torch.equal(ours.pop(key), torch.cat(parts))
        elif not key.startswith(("fc.", "head.fc.")):
            own = ours.pop(key)
            assert own.shape == like.shape, key
            assert torch.equal(own.flatten(), theirs[pairs[key]].flatten()), key
    assert not ours
    bare = {key.partition(".")[2]: value for key, value in theirs.items() if not key.startswith("classifier.")}
    assert in_timm_s_names(bare).keys() == in_timm_s_names(theirs).keys()  # as saved without a head


def test_other_networks_keep_their_names() -> None:
    state = {"conv1.weight": torch.zeros(1), "layernorm.weight": torch.zeros(1)}
    assert in_timm_s_names(state) == state


def test_a_file_of_transformers_is_loaded(tmp_path: Path) -> None:
    """Timm has 1x1 convolutions in this network where transformers has linear layers."""
    torch.manual_seed(0)
    source = timm.create_model("convnextv2_atto")
    state = theirs_of(source, convnext((2, 2, 6, 2), "convnextv2"))
    layer = "convnextv2.encoder.stages.3.layers.1.pwconv1.weight"
    assert state[layer].shape == (1280, 320)
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    backbone = made(Backbone, "convnextv2_atto", frozen_stages=-1)
    assert load_pretrained(backbone, path) == f"convnextv2_atto with weights from {path}"
    assert torch.equal(backbone.net.state_dict()["stages_3.blocks.1.mlp.fc1.weight"].flatten(1), state[layer])
    save_file({key: value for key, value in state.items() if "stages.2" not in key}, path)
    with pytest.raises(UserError, match="does not hold the tensors of timm's 'convnextv2_atto'"):
        load_pretrained(backbone, path)
