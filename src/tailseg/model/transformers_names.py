"""Names of tensors in Hugging Face transformers' ResNet, Swin, ConvNeXt and ConvNeXt V2 -> timm's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# A name with # for each number -> timm's name, of these numbers. What follows the name, after a dot, stays.
Rules = Mapping[str, Callable[..., str]]

RESNET: Rules = {
    "embedder.embedder.convolution": lambda: "conv1",
    "embedder.embedder.normalization": lambda: "bn1",
    "encoder.stages.#.layers.#.layer.#.convolution": lambda s, b, i: f"layer{s + 1}.{b}.conv{i + 1}",
    "encoder.stages.#.layers.#.layer.#.normalization": lambda s, b, i: f"layer{s + 1}.{b}.bn{i + 1}",
    "encoder.stages.#.layers.#.shortcut.convolution": lambda s, b: f"layer{s + 1}.{b}.downsample.0",
    "encoder.stages.#.layers.#.shortcut.normalization": lambda s, b: f"layer{s + 1}.{b}.downsample.1",
}
SWIN: Rules = {
    "embeddings.patch_embeddings.projection": lambda: "patch_embed.proj",
    "embeddings.norm": lambda: "patch_embed.norm",
    "encoder.layers.#.downsample": lambda s: f"layers.{s + 1}.downsample",  # which timm has in the stage that follows
    "encoder.layers.#.blocks.#.layernorm_before": lambda s, b: f"layers.{s}.blocks.{b}.norm1",
    "encoder.layers.#.blocks.#.layernorm_after": lambda s, b: f"layers.{s}.blocks.{b}.norm2",
    "encoder.layers.#.blocks.#.attention.self.query": lambda s, b: f"layers.{s}.blocks.{b}.attn.query",
    "encoder.layers.#.blocks.#.attention.self.key": lambda s, b: f"layers.{s}.blocks.{b}.attn.key",
    "encoder.layers.#.blocks.#.attention.self.value": lambda s, b: f"layers.{s}.blocks.{b}.attn.value",
    "encoder.layers.#.blocks.#.attention.self": lambda s, b: f"layers.{s}.blocks.{b}.attn",  # relative positions
    "encoder.layers.#.blocks.#.attention.output.dense": lambda s, b: f"layers.{s}.blocks.{b}.attn.proj",
    "encoder.layers.#.blocks.#.intermediate.dense": lambda s, b: f"layers.{s}.blocks.{b}.mlp.fc1",
    "encoder.layers.#.blocks.#.output.dense": lambda s, b: f"layers.{s}.blocks.{b}.mlp.fc2",
    "layernorm": lambda: "norm",
}
CONVNEXT: Rules = {
    "embeddings.patch_embeddings": lambda: "stem.0",
    "embeddings.layernorm": lambda: "stem.1",
    "encoder.stages.#.downsampling_layer.#": lambda s, i: f"stages.{s}.downsample.{i}",
    "encoder.stages.#.layers.#.dwconv": lambda s, b: f"stages.{s}.blocks.{b}.conv_dw",
    "encoder.stages.#.layers.#.layernorm": lambda s, b: f"stages.{s}.blocks.{b}.norm",
    "encoder.stages.#.layers.#.pwconv1": lambda s, b: f"stages.{s}.blocks.{b}.mlp.fc1",
    "encoder.stages.#.layers.#.grn": lambda s, b: f"stages.{s}.blocks.{b}.mlp.grn",
    "encoder.stages.#.layers.#.pwconv2": lambda s, b: f"stages.{s}.blocks.{b}.mlp.fc2",
    "encoder.stages.#.layers.#.layer_scale_parameter": lambda s, b: f"stages.{s}.blocks.{b}.gamma",
    "layernorm": lambda: "head.norm",
}
FAMILIES: Sequence[tuple[str, Rules]] = (  # told by a tensor
    ("embedder.embedder.convolution.weight", RESNET),
    ("encoder.layers.0.blocks.0.layernorm_before.weight", SWIN),
    ("encoder.stages.0.layers.0.dwconv.weight", CONVNEXT),
)
OWN_CLASSES = "classifier."
COMPUTED = "relative_position_index"  # from the window's size, by timm too


def in_timm_s_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network of transformers as timm names it, without its classifier; another state dict as it is.

    What has no place keeps its name.
    """
    for mark, rules in FAMILIES:
        key = next((key for key in state if key == mark or key.endswith(f".{mark}")), None)
        if key is not None:
            return _renamed(state, key.removesuffix(mark), rules)
    return dict(state)


def _renamed(state: Mapping[str, Tensor], prefix: str, rules: Rules) -> dict[str, Tensor]:
    patterns = [(_pattern(name), ours) for name, ours in rules.items()]
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        own = key.removeprefix(prefix)
        if key.startswith(OWN_CLASSES) or own.endswith(COMPUTED):
            continue
        for pattern, ours in patterns:
            if found := pattern.match(own):
                own = ours(*map(int, found.groups())) + own[found.end() :]
                break
        named[own] = value.flatten() if ".grn." in own else value
    for key in [key for key in named if ".attn.query." in key]:
        names = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        parts = [named[name] for name in names if name in named]
        if len(parts) == 3 and len({part.shape for part in parts}) == 1:
            named |= {key.replace(".query.", ".qkv."): torch.cat(parts)}
            for name in names:
                del named[name]
    return named


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)") + r"(?=\.|$)")
