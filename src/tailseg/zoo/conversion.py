"""From another project's tensors to an ordinary model of ours: names, recipe, categories, and a strict check."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailseg.checkpoint import save_model
from tailseg.data.annotations.annotations import Category
from tailseg.data.annotations.parsing import category_columns, read_categories
from tailseg.data.sources import same_name
from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.recipes.classifiers import GroupSoftmaxRecipe
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import merge, override, validate
from tailseg.zoo.architecture import infer_model
from tailseg.zoo.grouped_logits import sort_logits
from tailseg.zoo.other_parts import by_part

logger = logging.getLogger(__name__)

COUNTS = "box_head.classification.seesaw.counts"
# Counters, and what a loss knows of its training data, which a training of ours finds out for itself.
FROM_ZERO = (
    *("num_batches_tracked", COUNTS, "classification.positive_gradients", "classification.negative_gradients"),
    *("box_head.classification.spared", "box_head.classification.weights"),
)
LONGEST_NAME = 1000  # letters of a tensor's name
MOST_WRAPPERS = 4  # around a model, each of which puts "module." before all names
MOST_NAMED = 8  # names of a list that an error message prints; --explain prints all
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A checkpoint of another project, under our names.

    What its tensors decide is inferred from them; ``values`` hold the rest, as recipe values.
    """

    project: str
    path: Path
    state: dict[str, Tensor]  # our name -> tensor
    origins: Mapping[str, str] = field(default_factory=dict)  # our name -> theirs
    unknown: Sequence[str] = ()  # their names for which we have none
    unused: Sequence[str] = ()  # their names of what a model of ours says elsewhere
    loss: str | None = None  # of the classifier, where its number of logits does not tell
    refusal: str | None = None  # why its configuration cannot be converted
    names: Sequence[str] | None = None  # of the classes by label, if the file has them
    labels_are_ids: bool = False  # label i is the category with id i + 1
    values: Values = field(default_factory=dict)  # nested like a recipe, but for the classifier
    classifiers: Mapping[str, Values] = field(default_factory=dict)  # loss -> recipe values of the classifier
    remarks: Sequence[str] = ()  # what was assumed, one sentence each


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The model of ours that a checkpoint becomes."""

    recipe: Recipe
    num_classes: int
    wanted: Mapping[str, Tensor]  # our name -> a tensor of its shape and type, without values


def convert(
    foreign: ForeignModel, out: Path, *, categories: Path | None = None, settings: Sequence[str] = ()
) -> tuple[Recipe, tuple[Category, ...]]:
    """Write a model file that `predict`, `eval` and `train --init` take.

    Args:
        foreign: the checkpoint.
        out: model file, which must not exist.
        categories: annotation file with the classes that it was trained on.
        settings: recipe overrides, for what neither tensors nor configuration say.

    Raises:
        UserError: ``out`` exists, the checkpoint's configuration asks for what we have not, tensors are left over or
            missing, or the categories do not fit.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: a model file ends in .safetensors; give OUT that ending")
    if out.exists():
        raise UserError(f"{out}: already exists; remove it or choose another OUT")
    recipe, labels, state = converted(foreign, categories=categories, settings=settings)
    for remark in foreign.remarks:
        logger.warning("%s", remark)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent}: the folder cannot be made ({error.strerror}); choose another OUT") from error
    save_model(out, state, recipe, labels, step=0)
    return recipe, labels


def converted(
    foreign: ForeignModel, *, categories: Path | None, settings: Sequence[str]
) -> tuple[Recipe, tuple[Category, ...], dict[str, Tensor]]:
    """Recipe, categories and state dict of the model that `convert` writes, with its arguments and errors."""
    if foreign.refusal is not None:
        raise UserError(foreign.refusal)
    given = None if categories is None else listed_categories(categories)
    plan = plan_of(foreign, len(given) if given else None, settings)
    labels = _labels(foreign, plan.num_classes, given, categories)
    state = dict(foreign.state)
    if isinstance(plan.recipe.classifier, GroupSoftmaxRecipe):
        instances, source = [label.instance_count for label in labels], str(categories or "the checkpoint")
        sort_logits(state, instances, plan.recipe.classifier.thresholds, foreign.path, source)
    return plan.recipe, labels, _completed(foreign, state, plan.wanted)


def plan_of(foreign: ForeignModel, listed: int | None, settings: Sequence[str]) -> Plan:
    """The model that a checkpoint's tensors and configuration ask for, whether or not it has all of its tensors.

    Args:
        foreign: the checkpoint.
        listed: number of classes if it does not say it.
        settings: recipe overrides.

    Raises:
        UserError: the architecture cannot be told.
    """
    known = len(foreign.names) if foreign.names and not foreign.labels_are_ids else None
    with faults_named(foreign.path):
        try:
            inferred, num_classes = infer_model(foreign.state, known, listed, foreign.loss)
        except UserError as error:
            unknown = f" (not understood: {_left_over(foreign, foreign.unknown)})" if foreign.unknown else ""
            raise UserError(f"{foreign.path}: {error}{unknown}") from error
    recipe = override(_recipe(foreign, inferred), settings)
    try:
        with torch.device("meta"):  # shapes alone: nothing is allocated
            wanted = build_detector(recipe, num_classes).state_dict()
    except UserError as error:
        raise UserError(f"{foreign.path}: {error}") from error
    return Plan(recipe=recipe, num_classes=num_classes, wanted=wanted)


def left_over(foreign: ForeignModel, wanted: Mapping[str, Tensor] | None) -> list[str]:
    """Names, as in the checkpoint, of the tensors that have no place in the model; of all known ones if it is None."""
    placed = [] if wanted is None else [key for key in foreign.state if key not in wanted]
    return [*foreign.unknown, *(foreign.origins.get(key, key) for key in placed)]


def _recipe(foreign: ForeignModel, inferred: Values) -> Recipe:
    """Our defaults, over them what the tensors say, over that what the source says."""
    model, loss = inferred["model"], inferred["classifier"]["loss"]
    given = foreign.values.get("model", {}).get("stages") or [{}] * len(model["stages"])
    if len(given) != len(model["stages"]):
        raise UserError(
            f"{foreign.path}: a whole box head was found for {len(model['stages'])} of its {len(given)} stages only; "
            "the file is incomplete"
        )
    stages = [
        says | ({} if has["mask_weight"] else {"mask_weight": 0.0})
        for has, says in zip(model["stages"], given, strict=True)
    ]
    backbone = model["backbone"]
    usual = not backbone["options"] and "stem_channels" not in backbone
    values = merge(Recipe(name="").model_dump(mode="json"), inferred)
    values = merge(values, foreign.values)
    values = merge(values, {"classifier": {"loss": loss} | foreign.classifiers.get(loss, {})})
    values = merge(values, {"model": {"stages": stages}, "name": f"{foreign.project}/{foreign.path.stem}"})
    # ImageNet weights for a new training are those of the usual widths, of networks with their stride in the 3x3.
    if not usual or values["model"]["backbone"]["stride_in_1x1"]:
        values["model"]["backbone"]["pretrained"] = False
    return validate(values, str(foreign.path))


def rename(names: Iterable[str], prefixes: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Our names -> theirs, and those of theirs for which there is none, or which another has taken.

    Args:
        names: theirs.
        prefixes: their name, or its beginning up to a dot -> ours; the longest that fits is taken.
    """
    ours: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            own = prefixes.get(".".join(parts[:length]))
            if own is not None:
                key = ".".join([own, *parts[length:]])
                if key in ours:
                    unknown.append(name)
                ours.setdefault(key, name)
                break
        else:
            unknown.append(name)
    return ours, unknown


def rpn_convs(names: Container[str], template: str) -> dict[str, str]:
    """Names of the RPN's 3x3 convolutions -> ours, the last of which objectness and deltas read.

    Args:
        names: of all tensors.
        template: a convolution's name, with a place for its number.
    """
    count = 0
    while f"{template.format(count)}.weight" in names:
        count += 1
    return {template.format(i): "rpn.conv" if i == count - 1 else f"rpn.first_convs.{i}" for i in range(count)}


def state_dict_of(content: Any, path: Path, nests: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's content, whatever it is nested in, without the prefix of a parallel wrapper.

    Raises:
        UserError: there are none.
    """
    state = content
    for nest in nests:
        if isinstance(state, Mapping) and isinstance(state.get(nest), Mapping):
            state = state[nest]
            break
    found = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    tensors = {key: value for key, value in found.items() if isinstance(key, str) and len(key) <= LONGEST_NAME}
    if len(tensors) < len(found):
        raise UserError(
            f"{path}: a tensor has a name that is no text of at most {LONGEST_NAME:,} letters; the file is damaged or "
            "was edited"
        )
    if not tensors:
        raise UserError(
            f"{path}: holds no tensors by name, at its top or under {' or '.join(map(repr, nests))}; give a checkpoint "
            "with the model's state dict"
        )
    for _ in range(MOST_WRAPPERS):
        if all(key.startswith("module.") for key in tensors):
            tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


@contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """What fails inside, on a checkpoint whose tensors or settings are not those of its project, names the file."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
        raise UserError(
            f"{path}: holds tensors or settings that its project never writes ({reason}); the file is damaged or was "
            "edited: get it again"
        ) from error


def change(
    state: dict[str, Tensor], path: Path, ending: str | tuple[str, ...], function: Callable[[Tensor], Tensor]
) -> None:
    """Replace every tensor whose name has this ending, or one of these; ``path`` names the file in errors.

    Raises:
        UserError: one of them has no such sides.
    """
    for key in [key for key in state if key.endswith(ending)]:
        try:
            state[key] = function(state[key])
        except (IndexError, RuntimeError) as error:
            raise UserError(
                f"{path}: '{key}' has shape {tuple(state[key].shape)}, which no such tensor has; the file is damaged "
                "or was edited"
            ) from error


def _completed(foreign: ForeignModel, state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The detector's whole state dict; what frozen networks and other projects' losses never had is filled in."""
    for key, like in wanted.items():
        if key not in state and key.endswith(FROM_ZERO):
            state[key] = torch.zeros(like.shape, dtype=like.dtype)
    missing = [key for key in wanted if key not in state]
    surplus = left_over(foreign, wanted)
    if missing or surplus:
        faults = [f"tensors are left over: {_left_over(foreign, surplus)}"] if surplus else []
        faults += [f"tensors are missing: {_listed(missing)}"] if missing else []
        raise UserError(
            f"{foreign.path}: {'; '.join(faults)}; it is no Mask R-CNN or Cascade Mask R-CNN as tailseg builds them "
            "(--explain lists every tensor)"
        )
    for key, like in wanted.items():
        if state[key].shape != like.shape:
            raise UserError(
                f"{foreign.path}: '{key}' has shape {tuple(state[key].shape)}, but {tuple(like.shape)} was expected "
                "from its other tensors"
            )
        if state[key].is_complex():
            raise UserError(f"{foreign.path}: '{key}' holds complex numbers; the file is damaged or was edited")
    storages: set[int] = set()
    for key, like in wanted.items():  # only now: a small file can claim large shapes
        tensor = state[key].float() if state[key].is_floating_point() else state[key]
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{foreign.path}: '{key}' holds values that are not finite; the model had diverged")
        tensor = tensor.to(like.dtype)
        # Tensors that share memory there get their own here, where each is trained for itself.
        state[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    return {key: state[key] for key in wanted}


def _left_over(foreign: ForeignModel, names: Sequence[str]) -> str:
    return ", ".join(f"{_listed(own)} of {part}" for part, own in by_part(foreign.project, names).items())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:MOST_NAMED]) + more


def listed_categories(path: Path) -> list[Category]:
    """The categories of an annotation file, in its order."""
    rows = read_categories(path)
    ids, names, groups = category_columns(rows)
    about = {row["id"]: row for row in rows.rows}
    counts = [
        tuple(value if isinstance(value := about[i].get(key), int) else 0 for key in ("image_count", "instance_count"))
        for i in ids.tolist()
    ]
    frequencies = groups or ["f"] * len(names)
    return [
        Category(i, name, frequency, *count)
        for i, name, frequency, count in zip(ids.tolist(), names, frequencies, counts, strict=True)
    ]


def coco_ids() -> dict[str, int]:
    """Name -> category id of the 80 classes of COCO; ids go up to 90, with gaps."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {same_name(name): i for i, name in enumerate(names) if name not in ("__background__", "N/A")}


def _labels(
    foreign: ForeignModel, num_classes: int, given: Sequence[Category] | None, source: Path | None
) -> tuple[Category, ...]:
    """The category of each label: by the file's own names, an annotation file's categories, or COCO's."""
    if given is None:
        return tuple(_without_file(foreign, num_classes))
    if foreign.labels_are_ids:
        by_id = {category.id: category for category in given}
        ids = range(1, num_classes + 1)
        beyond = sorted(set(by_id) - set(ids))
        if beyond:
            raise UserError(f"{source}: has a category {beyond[0]}, but the model's go from 1 to {num_classes}")
        return tuple(by_id.get(i, Category(i, f"unused {i}", "f", 0, 0)) for i in ids)
    if foreign.names is not None:
        by_name = {same_name(category.name): category for category in given}
        absent = [name for name in foreign.names if same_name(name) not in by_name]
        if absent:
            raise UserError(
                f"{source}: has no category '{absent[0]}', which the model knows; give the file it was trained on"
            )
        given = [by_name[same_name(name)] for name in foreign.names]
    if len(given) != num_classes:
        raise UserError(
            f"{source}: has {len(given)} categories, the model {num_classes}; give the file it was trained on"
        )
    return tuple(given)


def _without_file(foreign: ForeignModel, num_classes: int) -> Iterator[Category]:
    coco, names = coco_ids(), foreign.names
    if names is None and num_classes == len(coco):
        names = list(coco)
    if names is None:
        raise UserError(f"{foreign.path}: does not name its classes; name them with --categories ANNOTATIONS.json")
    if len(names) != num_classes:
        raise UserError(f"{foreign.path}: names {len(names)} classes, but its tensors have {num_classes}")
    of_coco = not foreign.labels_are_ids and all(same_name(name) in coco for name in names)
    for label, name in enumerate(names):
        yield Category(coco[same_name(name)] if of_coco else label + 1, name, "f", 0, 0)
