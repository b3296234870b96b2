"""The typed recipe: everything that a run depends on but its data, its seed and its devices.

A recipe is complete and frozen. Built-in ones are functions, one file a table; `tailseg.recipes.resolve`
makes recipes of names and files, `tailseg.recipes.values` changes them by key.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tailseg.recipes.bounds import MOST_BOXES, TestEdges
from tailseg.recipes.classifiers import AnyClassifier, CrossEntropyRecipe
from tailseg.recipes.data_section import DataRecipe
from tailseg.recipes.model_section import ModelRecipe
from tailseg.recipes.section import Section

# Trackers of a run, for `training.loggers`.
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]
# Parts of a detector, for `training.freeze` and `optimizer.rates`.
Part = Literal["backbone", "neck", "rpn", "context", "box_heads", "mask_heads", "mask_iou"]


class OptimizerRecipe(Section):
    """The optimiser."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.02, gt=0)
    """Learning rate for `reference_batch` images a step; it scales linearly with the images there are."""
    reference_batch: int = Field(16, ge=1)
    """Images."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD only."""
    weight_decay: float = Field(1e-4, ge=0)
    """On every parameter."""
    clip: float | None = Field(None, gt=0)
    """Largest global norm of the gradient; none by default."""
    rates: dict[Part, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Factors of the learning rate of parts of the detector, such as {backbone: 0.1}; the others have 1."""


class ScheduleRecipe(Section):
    """The learning rate over time."""

    epochs: int = Field(12, ge=1)
    kind: Literal["milestones", "cosine"] = "milestones"
    """The rate falls at milestones, or along half a cosine to 0 at the end of the last epoch (arXiv 1608.03983)."""
    milestones: tuple[int, ...] = (8, 11)
    """Epochs after which the learning rate is multiplied by `gamma`."""
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_steps: int = Field(500, ge=0)
    """Steps over which the rate rises linearly from `warmup_factor` of itself."""
    warmup_factor: float = Field(0.001, gt=0, le=1)

    @model_validator(mode="after")
    def _milestones_in_order(self) -> ScheduleRecipe:
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ValueError(f"milestones must be rising epochs from 1 on, received {list(self.milestones)}")
        if self.kind == "cosine" and self.milestones:
            raise ValueError("kind=cosine takes no milestones; set schedule.milestones=[]")
        return self


class TrainingRecipe(Section):
    """The loop."""

    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """auto: bf16 on a GPU that has it."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients make one step."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then what is saved and evaluated."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between evaluations on the validation split; the last epoch is always evaluated."""
    save_steps: int = Field(1000, ge=1)
    """Steps between checkpoints; the end of an epoch always saves one."""
    log_steps: int = Field(20, ge=1)
    """Steps between lines of metrics.jsonl."""
    loggers: tuple[LoggerName, ...] = ()
    """Trackers that get what metrics.jsonl gets, and pictures; the extra `track` has their packages."""
    validation_loss: bool = False
    """After each evaluation, compute the losses on the validation split, without augmentation."""
    patience: int | None = Field(None, ge=1)
    """The run ends once so many evaluations one after the other did not beat the best segm AP; by default never."""
    cuda_graphs: bool = False
    """Record the launches of a step by shape of batch and send them in one go: for a single GPU (see docs/speed.md)."""
    freeze: tuple[Part, ...] = ()
    """Parts of the detector that stay as they are at the start; batch norm in them keeps its statistics."""

    @field_validator("loggers", mode="before")
    @classmethod
    def _each_logger_once(cls, loggers: Any) -> Any:
        if isinstance(loggers, str):
            raise ValueError(f"is a list; write training.loggers=[{loggers}]")
        twice = [name for name in loggers if loggers.count(name) > 1] if isinstance(loggers, list | tuple) else []
        if twice:
            raise ValueError(f"names {twice[0]} twice; name each logger once")
        return loggers


class TestRecipe(Section):
    """Inference."""

    score_threshold: float = Field(1e-4, ge=0, le=1)
    nms_iou: float = Field(0.5, gt=0, le=1)
    """NMS threshold within a class."""
    max_detections: int = Field(300, ge=1, le=MOST_BOXES)
    """Of an image, over all classes."""
    stage_average: Literal["logits", "scores"] = "logits"
    """A cascade's mean over its stages: of logits, as in mmdetection, or of scores, as in detectron2."""
    min_size: float | None = Field(None, ge=0)
    """Boxes with a side of at most this many network pixels are dropped; by default none is."""
    tau_norm: float = Field(0.0, ge=0)
    """Classifier rows are divided by their norm to this power (`tailseg.losses.tau_normalize`); 0 leaves them."""
    tta: bool = False
    """Average over views of each image, of several sizes and mirrored (`tailseg.evaluation.tta`)."""
    tta_long_edges: TestEdges | None = None
    """Pixels: longer edge of each size of view; by default five, 0.94 to 1.56 times the size that is tested at."""
    tta_flip: bool = True
    """Each of them mirrored too."""


class FinetuneRecipe(Section):
    """`tailseg.training.finetune`: a second classification branch in each stage of a trained model, all else frozen."""

    enabled: bool = False
    """Train such branches, from the model that `--init` names; scores are then the mean of both branches'."""
    start: Literal["copy", "random"] = "copy"
    """The new branch starts as the trained one, or from random weights."""
    views: int | None = Field(None, ge=1)
    """Number of different augmentations of an image; by default a new one every time."""
    cache: bool = False
    """Keep the frozen part's features of every view of every image on disk, instead of computing them each epoch."""

    @model_validator(mode="after")
    def _cache_needs_views(self) -> FinetuneRecipe:
        if self.cache and self.views is None:
            raise ValueError("what is never seen twice cannot be cached; set finetune.views, for example to 1")
        return self


class Recipe(Section):
    """A complete run."""

    name: str
    """`table1/seesaw` for a built-in one; a file's own name otherwise."""
    model: ModelRecipe = ModelRecipe()
    classifier: Annotated[AnyClassifier, Field(discriminator="loss")] = CrossEntropyRecipe()
    data: DataRecipe = DataRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    training: TrainingRecipe = TrainingRecipe()
    test: TestRecipe = TestRecipe()
    finetune: FinetuneRecipe = FinetuneRecipe()

    @model_validator(mode="after")
    def _finetuning_has_no_parts(self) -> Recipe:
        for key, value in (("training.freeze", self.training.freeze), ("optimizer.rates", self.optimizer.rates)):
            if self.finetune.enabled and value:
                raise ValueError(f"finetune.enabled trains its own branches alone; leave out {key}")
        return self
