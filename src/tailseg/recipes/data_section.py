"""The data section of a recipe: loading, augmentation, and which images a run sees how often."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tailseg.recipes.bounds import LONGEST_EDGE, Edge
from tailseg.recipes.section import Section

# Defaults that functions of tailseg.data have too: LVIS's frequency groups, and the cells of a stored mask.
RARE_MAX, COMMON_MAX, MASK_GRID = 10, 100, 112

MOST_AT_ONCE = 1024  # images of a batch, and loader processes

Sampler = Literal["random", "repeat-factor", "irfs", "class-aware"]


class DataRecipe(Section):
    """Loading and augmentation."""

    batch_per_device: int | Literal["auto"] = 2
    """Images a process and step. auto: on a GPU the most that fit, on a CPU 4; in all at most
    `optimizer.reference_batch`."""
    short_edges: tuple[Edge, ...] = Field((640, 672, 704, 736, 768, 800), min_length=1)
    """Pixels; one is drawn for each training image."""
    test_short_edge: int = Field(800, ge=32, le=LONGEST_EDGE)
    """Pixels."""
    long_edge: int = Field(1333, ge=32, le=LONGEST_EDGE)
    """Pixels; the longer edge is not made longer than this."""
    long_edges: tuple[Edge, Edge] | None = None
    """Pixels, least and most: if given, each training image's longer edge is drawn from these, not its shorter one."""
    crop: int | None = Field(None, ge=32, le=LONGEST_EDGE)
    """Pixels; if given, the side of a square that is cut out of each training image at random."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring a training image."""
    instaboost: float = Field(0.0, ge=0, le=1)
    """InstaBoost: probability that an image's objects are moved a little over an in-painted background."""
    instaboost_heatmap: bool = False
    """They are moved to where the surroundings look most like their own, instead of by chance."""
    copy_paste: float = Field(0.0, ge=0, le=1)
    """Simple Copy-Paste: probability that one to three objects of other training images are pasted into an image."""
    copy_paste_draw: Literal["rare-first", "uniform"] = "rare-first"
    """A class by its repeat factor, then an object of it; or every object equally often."""
    colour_jitter: float = Field(0.0, ge=0, lt=1)
    """Brightness, contrast and saturation of each training image change by factors from 1 - this to 1 + this."""
    keep_empty: bool = False
    """Train on images without any annotation too: all in them is background. By default they are left out."""
    sampler: Sampler | tuple[Sampler, ...] = "random"
    """Every image once an epoch, images of rare classes more often (by images, or by images and objects), or all
    classes equally often; of several, each supplies an equal share of every epoch."""
    epoch_images: int | None = Field(None, ge=1)
    """Images of an epoch; by default as many as the sampler makes. Gives all samplers the same number of steps."""
    repeat_threshold: float = Field(1e-3, gt=0, le=1)
    """Repeat factors, and Copy-Paste's: classes in a smaller share of the training images are repeated."""
    repeat_rounding: Literal["ceil", "stochastic"] = "ceil"
    """Repeat factors: up, every epoch alike, or down or up at random in each epoch."""
    mask_grid: int = Field(MASK_GRID, ge=14, le=4096)
    """Most cells a side of a stored mask; larger objects are area-averaged into it."""
    workers: int | Literal["auto"] = "auto"
    """Loader processes of each process. auto: on a GPU as many as its share of the processors, up to 8; 2 on a CPU."""
    groups: Literal["limits", "quantiles"] = "limits"
    """For data without frequency groups: by the two numbers below, or thirds of the classes by training images."""
    rare_max: int = Field(RARE_MAX, ge=0)
    """For data without frequency groups: a class in at most this many training images is rare."""
    common_max: int = Field(COMMON_MAX, ge=1)
    """For data without frequency groups: a class in at most this many is common, in more frequent."""

    @property
    def batch(self) -> int:
        """Images a process and step; 2 where that is still to be found."""
        return 2 if self.batch_per_device == "auto" else self.batch_per_device

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """The samplers, also where there is only one."""
        return self.sampler if isinstance(self.sampler, tuple) else (self.sampler,)

    @property
    def not_of_a_sample(self) -> frozenset[str]:
        """Keys that say which samples are drawn, how many at once and by how many hands, not what they look like."""
        keys = {"batch_per_device", "workers", "sampler", "keep_empty", "epoch_images", "repeat_rounding"}
        rare_first = self.copy_paste > 0 and self.copy_paste_draw == "rare-first"
        return frozenset(keys if rare_first else keys | {"repeat_threshold"})

    @field_validator("batch_per_device", "workers", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any, info: ValidationInfo) -> Any:
        least = 0 if info.field_name == "workers" else 1
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
        if value != "auto" and not (whole and least <= value <= MOST_AT_ONCE):
            raise ValueError(f"expected a whole number from {least} to {MOST_AT_ONCE} or auto, received {value!r}")
        return value if value == "auto" else int(value)

    @field_validator("sampler", mode="before")
    @classmethod
    def _known_samplers(cls, value: Any) -> Any:
        names = list(value) if isinstance(value, list | tuple) else [value]
        known = get_args(Sampler)
        if not names or any(name not in known for name in names) or len(set(names)) < len(names):
            raise ValueError(f"expected one of {', '.join(known)}, or several different ones, received {value!r}")
        return names[0] if len(names) == 1 else tuple(names)

    @model_validator(mode="after")
    def _draw_has_a_use(self) -> DataRecipe:
        if self.copy_paste_draw != "rare-first" and self.copy_paste == 0:
            raise ValueError(
                f"copy_paste_draw={self.copy_paste_draw} needs data.copy_paste above 0; set it, or leave out "
                "copy_paste_draw"
            )
        return self

    @model_validator(mode="after")
    def _groups_in_order(self) -> DataRecipe:
        limits = self.model_dump(include={"rare_max", "common_max"}, exclude_defaults=True)
        if self.groups == "quantiles" and limits:
            keys = " and ".join(limits)
            raise ValueError(f"groups=quantiles takes no {keys}; set data.groups=limits, or leave out {keys}")
        if self.rare_max >= self.common_max:
            raise ValueError(f"rare_max must be below common_max, received {self.rare_max} and {self.common_max}")
        return self

    @model_validator(mode="after")
    def _long_edges_in_order(self) -> DataRecipe:
        if self.long_edges is not None and not 32 <= self.long_edges[0] <= self.long_edges[1]:
            raise ValueError(f"long_edges must be two sizes of at least 32 in order, received {list(self.long_edges)}")
        return self
