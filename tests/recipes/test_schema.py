import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from tailseg.errors import UserError
from tailseg.losses import CLASSIFICATIONS
from tailseg.recipes.classifiers import CLASSIFIERS, ClassifierRecipe
from tailseg.recipes.data_section import DataRecipe
from tailseg.recipes.model_section import ContextRecipe, NeckRecipe
from tailseg.recipes.resolve import resolve
from tailseg.recipes.schema import FinetuneRecipe, Recipe, ScheduleRecipe
from tailseg.recipes.section import Section


def test_every_loss_has_one_home_for_its_defaults() -> None:
    for loss, kind in CLASSIFIERS.items():
        own = kind().model_dump(exclude=set(ClassifierRecipe.model_fields))
        signature = inspect.signature(CLASSIFICATIONS[loss]).parameters
        given = {name: p.default for name, p in signature.items() if name not in ("num_classes", "statistics")}
        assert own == given


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("classifier.loss=seesow", "classifier.loss: unknown loss 'seesow'; did you mean 'seesaw'? There are "),
        ("classifier.p=0.5", "key 'classifier.p' belongs to classifier.loss seesaw; set classifier.loss first"),
        ("classifier.alpha=1", "belongs to classifier.loss eql-v2 or focal"),
        ("classifier={loss: seesaw, threshold: 1}", "key 'classifier.threshold' belongs to classifier.loss eql"),
        ("classifier={loss: seesaw, p: -1}", "classifier.p: input should be greater than or equal to 0, received -1"),
        ("classifier={loss: eql, threshold: 2}", "classifier.threshold: input should be less than or equal to 1"),
        ("classifier={loss: eql-v2, mu: -1}", "classifier.mu: input should be greater than or equal to 0, received -1"),
        ("classifier={loss: seesaw, p: .inf}", "classifier.p: input should be a finite number, received inf"),
        ("classifier={loss: group-softmax, thresholds: [9, 3]}", "classifier: thresholds must be rising numbers"),
        ("test={tau_norm: -1}", "test.tau_norm: input should be greater than or equal to 0, received -1"),
        ("classifier={loss: seesaw, pp: 1}", "unknown key 'classifier.pp'; the nearest valid key is 'classifier.p'"),
    ],
)
def test_mistakes_about_losses_are_named(setting: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        resolve("demo/cross-entropy", [setting])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {stages: [{}, {iuo: 0.6}]}", "unknown key 'model.stages.1.iuo'; the nearest valid key is 'model.st"),
        ("model: {stages: [{}, 3]}", "model.stages.1: input should be "),
        ("model: {stages: [{}, {iou: 0}]}", "model.stages.1.iou: input should be greater than 0, received 0"),
        (
            "model: {stages: [{mask_weight: 0}, {mask_weight: 0}]}",
            "no stage has a mask head; set the mask_weight of one, such as model.stages.0.mask_weight=1",
        ),
    ],
)
def test_stages_of_a_file_at_fault(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: demo/seesaw\n{text}\n")
    with pytest.raises(UserError) as caught:
        resolve(str(path))
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_stage_needs_a_mask_head() -> None:
    assert len(resolve("table1/seesaw").model.stages) == 1
    with pytest.raises(UserError, match="no stage has a mask head"):
        resolve("table1/seesaw", ["model.stages.0.mask_weight=0"])


NO_CONVOLUTIONS = "model: a TSD head has no convolutions; set model.box_head.convs=0, or no stage's tsd"


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        (
            "table2/06-mask-scoring",
            ["model.stages.2.mask_weight=0", "model.stages.1.mask_weight=1"],
            "model: mask_iou judges the masks of the last stage, which has no mask head; "
            "set model.stages.2.mask_weight=1",
        ),
        ("table2/05-tsd", ["model.box_head.convs=4"], NO_CONVOLUTIONS),
        ("table2/04-htc-lite", ["model.box_head.convs=1", "model.stages.1.tsd=true"], NO_CONVOLUTIONS),
        (
            "table2/04-htc-lite",
            ["model.context={residual: true, convs: 3}"],
            "model.context: residual needs an even number of convs, received 3",
        ),
        ("table2/04-htc-lite", ["model.context.weight=-1"], "greater than or equal to 0, received -1"),
        ("table2/04-htc-lite", ["model.context.unlabelled=absent"], "'negative' or 'ignored', received 'absent'"),
        ("table2/03-carafe", ["model.mask_head.upsample=nearest"], "'deconv' or 'carafe', received 'nearest'"),
        ("table2/05-tsd", ["model.tsd.gama=1"], "unknown key 'model.tsd.gama'; the nearest valid key is 'model.tsd."),
        ("table2/05-tsd", ["model.stages.1.tds=true"], "the nearest valid key is 'model.stages.1."),
        ("table2/06-mask-scoring", ["model.mask_iou=1"], "'model.mask_iou' is a section; set one of its keys"),
        (
            "table2/06-mask-scoring",
            ["model.neck.carafe=true", "model.neck.pathways=3"],
            "model.neck: an FPN has no pathways, carafe; set model.neck.kind=fpg, or leave out pathways, carafe",
        ),
        ("table2/08-neck", ["model.neck.kind=bifpn"], "'fpg', received 'bifpn'"),
        ("table2/11-finetune", ["finetune.cache=true"], "cannot be cached; set finetune.views, for example to 1"),
        ("table2/12-tta", ["test.tta_long_edges=[]"], "test.tta_long_edges: tuple should have at least 1 item"),
        ("table2/12-tta", ["test.tta_long_edges=[1200, 8]"], "greater than or equal to 32, received 8"),
        ("table2/07-augmentation", ["data.instaboost=1.5"], "less than or equal to 1, received 1.5"),
        ("table2/07-augmentation", ["data.colour_jitter=1"], "data.colour_jitter: input should be less than 1"),
        (
            "table2/07-augmentation",
            ["data.copy_paste_draw=uniform"],
            "data: copy_paste_draw=uniform needs data.copy_paste above 0; set it, or leave out copy_paste_draw",
        ),
        (
            "table2/11-finetune",
            ["data.sampler=rfs"],
            "data.sampler: expected one of random, repeat-factor, irfs, class-aware, or several different ones, "
            "received 'rfs'",
        ),
        ("table2/11-finetune", ["data.sampler=[irfs, irfs]"], "several different ones, received ['irfs', 'irfs']"),
        ("table2/11-finetune", ["data.sampler=[]"], "several different ones, received []"),
        ("table2/11-finetune", ["data.sampler=2"], "several different ones, received 2"),
    ],
)
def test_mistakes_about_the_parts_of_table_2_are_named(name: str, settings: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(name, settings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def sections(kind: type[Section] = Recipe) -> Iterator[type[Section]]:
    """A section and those within it."""
    yield kind
    for field in kind.model_fields.values():
        for part in get_args(field.annotation) or (field.annotation,):
            if isinstance(part, type) and issubclass(part, Section):
                yield from sections(part)


@pytest.mark.parametrize("kind", dict.fromkeys(sections()), ids=lambda kind: kind.__name__)
def test_every_section_is_frozen_strict_and_told(kind: type[Section]) -> None:
    """What a section says it configures exists; its fields cannot be set, and no other is accepted."""
    for name in re.findall(r"`(tailseg[\w.]+)`", kind.__doc__ or ""):
        assert pkgutil.resolve_name(name)
    made = kind(name="x") if kind is Recipe else kind()
    assert kind.model_validate(made.model_dump(mode="json")) == made
    for field in kind.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(made, field, None)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind.model_validate({**made.model_dump(), "naem": 1})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NeckRecipe(kind="fpg", norm=True), "an FPG has batch norm in any case; leave out norm"),
        (lambda: NeckRecipe(pathways=3, carafe=True), "an FPN has no pathways, carafe; set model.neck.kind=fpg, or"),
        (lambda: ScheduleRecipe(milestones=(8, 8)), r"milestones must be rising epochs from 1 on, received \[8, 8\]"),
        (lambda: ScheduleRecipe(milestones=(0, 8)), r"milestones must be rising epochs from 1 on, received \[0, 8\]"),
        (lambda: DataRecipe(long_edges=(64, 32)), r"long_edges must be two sizes of at least 32 in order, .*\[64, 32"),
        (lambda: DataRecipe(long_edges=(31, 64)), r"long_edges must be two sizes of at least 32 in order, .*\[31, 64"),
        (lambda: DataRecipe(rare_max=100), "rare_max must be below common_max, received 100 and 100"),
        (
            lambda: DataRecipe(groups="quantiles", rare_max=2),
            "groups=quantiles takes no rare_max; set data.groups=limits, or leave out rare_max",
        ),
        (
            lambda: DataRecipe(groups="quantiles", rare_max=2, common_max=5),
            "takes no rare_max and common_max; set data.groups=limits, or leave out rare_max and common_max",
        ),
        (lambda: FinetuneRecipe(cache=True), "never seen twice cannot be cached; set finetune.views, for example to 1"),
        (lambda: ContextRecipe(residual=True, convs=3), "residual needs an even number of convs, received 3"),
    ],
)
def test_values_that_contradict_each_other(make: Callable[[], Section], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        make()


def test_samplers_are_one_or_several() -> None:
    assert DataRecipe().samplers == ("random",)
    several = resolve("demo/seesaw", ["data.sampler=[repeat-factor, class-aware]"]).data
    assert several.sampler == several.samplers == ("repeat-factor", "class-aware")
    assert resolve("demo/seesaw", ["data.sampler=[irfs]"]).data.sampler == "irfs"


def test_the_threshold_is_of_a_sample_where_it_decides_what_is_pasted() -> None:
    assert "repeat_threshold" in DataRecipe().not_of_a_sample
    assert "repeat_threshold" not in DataRecipe(copy_paste=0.5).not_of_a_sample
    assert "repeat_threshold" in DataRecipe(copy_paste=0.5, copy_paste_draw="uniform").not_of_a_sample
    assert DataRecipe().not_of_a_sample <= DataRecipe.model_fields.keys()


def test_what_just_fits() -> None:
    assert ScheduleRecipe(milestones=()).milestones == ()
    assert DataRecipe(long_edges=(32, 32)).long_edges == (32, 32)
    assert DataRecipe(rare_max=0, common_max=1).groups == "limits"
    assert DataRecipe(groups="quantiles").groups == "quantiles"
    assert FinetuneRecipe(cache=True, views=1).cache
