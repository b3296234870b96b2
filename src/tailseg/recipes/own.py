"""Recipes for one GPU and data of one's own: Seesaw Loss, rare classes shown more often, `auto` batch and precision.

Sampler, augmentation and loss are those that won on the built-in set (docs/results/rare.md): repeat factors and
Copy-Paste with rare classes first.
"""

from tailseg.recipes import table1, table2
from tailseg.recipes.schema import Recipe
from tailseg.recipes.values import changed

# The batch and the precision are the machine's; one epoch of a small set is a few steps, so evaluations are rarer.
ONE_GPU = {
    "data.batch_per_device": "auto",
    "training.precision": "auto",
    "training.evaluate_every": 4,
    "schedule.kind": "cosine",
    "schedule.milestones": (),
    "schedule.warmup_steps": 200,
    "data.sampler": "repeat-factor",
    "data.repeat_threshold": 0.02,  # LVIS's 0.001 repeats nothing in sets of up to 1,000 images
    "data.copy_paste": 0.5,
}


def fast() -> Recipe:
    """Mask R-CNN R50-FPN at 640 px; `--init coco` fits it."""
    changes = {
        "name": "own/fast",
        "data.short_edges": (480, 512, 544, 576, 608, 640),
        "data.test_short_edge": 640,
        "data.long_edge": 1066,
        "optimizer.clip": 35.0,
        "schedule.epochs": 24,
    }
    return changed(table1.seesaw(), ONE_GPU | changes)


def accurate() -> Recipe:
    """Cascade Mask R-CNN with ConvNeXt-T (ImageNet-22k) at 800 px, an average of the weights, a longer schedule."""
    changes = {
        "name": "own/accurate",
        **table1.SEESAW,
        "model.backbone.name": "convnext_tiny.fb_in22k_ft_in1k",
        "model.backbone.frozen_stages": -1,
        "model.backbone.options": {"drop_path_rate": 0.2},
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 0.05,
        "optimizer.clip": 10.0,
        "schedule.epochs": 36,
        "training.ema": 0.999,
    }
    return changed(table2.cascade_mask_rcnn(), ONE_GPU | changes)
