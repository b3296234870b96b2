"""Seesaw Loss in Hugging Face's Mask2Former: another criterion, the same model, matcher and post-processing.

    pip install tailseg transformers scipy && python examples/transformers_mask2former.py [--seeds N]

Mask2Former's softmax over C classes and "no object" asks two questions: -ln p_i = -ln P(object) - ln P(i | object), the
first about the log-sum-exp of the class logits. Seesaw Loss takes the place of the second, over matched queries.
"""

from __future__ import annotations

import argparse
import colorsys

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

import tailseg

CLASSES, SIZE, QUERIES = 8, 64, 6
PICTURES, HELD_OUT = 160, 120
SHARES = 40.0 ** -(torch.arange(CLASSES) / (CLASSES - 1))  # of objects, the most frequent class first
BATCH, STEPS, LEARNING_RATE = 8, 400, 1e-3
GROUPS = {"all": slice(0, 8), "many": slice(0, 3), "few": slice(5, 8)}


class SeesawCriterion(Mask2FormerLoss):  # type: ignore[misc]  # transformers has no types for us
    """Mask2Former's losses with Seesaw Loss among the classes; with p = 0 they are its own."""

    def __init__(self, config: Mask2FormerConfig, weight_dict: dict[str, float], p: float = 0.8) -> None:
        super().__init__(config, weight_dict)
        self.seesaw = tailseg.SeesawLoss(config.num_labels, p=p, reduction="sum", ignore_index=config.num_labels)

    def loss_labels(
        self, class_queries_logits: Tensor, class_labels: list[Tensor], indices: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Logits (B, Q, C + 1), the objects' classes of each picture, and which query is matched to which object."""
        labels = torch.full(class_queries_logits.shape[:2], self.num_labels, device=class_queries_logits.device)
        for own, classes, (queries, objects) in zip(labels, class_labels, indices, strict=True):
            own[queries] = classes[objects]
        classes, nothing = class_queries_logits.float().split([self.num_labels, 1], dim=2)
        pair = torch.cat([classes.logsumexp(dim=2, keepdim=True), nothing], dim=2)  # object, no object
        weight = torch.stack([torch.ones_like(self.empty_weight[-1]), self.empty_weight[-1]])
        is_nothing = (labels == self.num_labels).long()
        objectness = F.cross_entropy(pair.transpose(1, 2), is_nothing, weight)
        which = self.seesaw(classes.transpose(1, 2), labels)  # (B, C, Q) and (B, Q); "no object" is ignored
        return {"loss_cross_entropy": objectness + which / weight[is_nothing].sum()}


def use_seesaw(model: Mask2FormerForUniversalSegmentation) -> Mask2FormerForUniversalSegmentation:
    """Replace the criterion of ``model``, new or from a hub."""
    model.criterion = SeesawCriterion(model.config, model.weight_dict).to(model.device)
    return model


def small_model() -> Mask2FormerForUniversalSegmentation:
    """A model of a million parameters, at random."""
    backbone = SwinConfig(
        image_size=SIZE, embed_dim=24, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"], drop_path_rate=0.0,
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=CLASSES, num_queries=QUERIES, feature_size=64, mask_feature_size=64,
        hidden_dim=64, encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=128, dim_feedforward=128,
        num_attention_heads=4, dropout=0.0, train_num_points=128,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config)


def pictures(
    count: int, shares: Tensor, hues: Tensor, generator: torch.Generator
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Noisy pictures (count, 3, SIZE, SIZE) of one or two discs, whose hue is their class; labels and masks of each."""
    colours = torch.tensor([colorsys.hsv_to_rgb(hue / CLASSES, 1.0, 1.0) for hue in hues.tolist()])
    axis = torch.arange(SIZE, dtype=torch.float32)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator) * 0.3
    all_labels, all_masks = [], []
    for image in images:
        number = int(torch.randint(1, 3, (1,), generator=generator))
        labels = shares.multinomial(number, replacement=True, generator=generator)
        owner = torch.full((SIZE, SIZE), -1)
        for index in range(number):
            x, y, radius = (
                torch.rand(3, generator=generator) * torch.tensor([40.0, 40.0, 6.0]) + torch.tensor([12.0, 12.0, 9.0])
            ).tolist()
            owner[(axis[:, None] - y) ** 2 + (axis - x) ** 2 < radius**2] = index
        masks = torch.stack([owner == index for index in range(number)])
        seen = masks.flatten(1).any(dim=1)  # a later disc may hide an earlier one
        labels, masks = labels[seen], masks[seen]
        image += (colours[labels][:, :, None, None] * masks[:, None]).sum(0)
        all_labels.append(labels)
        all_masks.append(masks.float())
    return images, all_labels, all_masks


@torch.no_grad()
def average_precision(
    model: Mask2FormerForUniversalSegmentation, images: Tensor, labels: list[Tensor], masks: list[Tensor]
) -> Tensor:
    """(CLASSES,) AP in percent at a mask IoU of 0.5: every query answers with every class."""
    outputs = [model.eval()(batch) for batch in images.split(40)]
    scores = torch.cat([out.class_queries_logits for out in outputs]).softmax(dim=2)
    found = torch.cat([out.masks_queries_logits for out in outputs])
    found = (F.interpolate(found, size=(SIZE, SIZE), mode="bilinear") > 0).flatten(2).float()
    result = torch.zeros(CLASSES)
    for label in range(CLASSES):
        answers, objects = [], 0
        for image_scores, image_masks, own, truth in zip(scores, found, labels, masks, strict=True):
            truth = truth[own == label].flatten(1)
            both = image_masks @ truth.T
            overlaps = both / (image_masks.sum(1, keepdim=True) + truth.sum(1) - both).clamp(min=1)
            objects += len(truth)
            for query in image_scores[:, label].argsort(descending=True).tolist():
                best, which = overlaps[query].max(0) if len(truth) else (torch.tensor(0.0), 0)
                right = bool(best > 0.5)
                if right:
                    overlaps[:, which] = 0  # found once
                answers.append((image_scores[query, label].item(), right))
        ranked = torch.tensor([right for _, right in sorted(answers, reverse=True)])
        precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
        envelope = precision.flip(0).cummax(0).values.flip(0)
        result[label] = 100 * envelope[ranked].sum() / objects
    return result


def result(seesaw: bool, seed: int) -> Tensor:
    """(3,) AP at IoU 0.5 in percent of all, many and few classes after training."""
    generator = torch.Generator().manual_seed(seed)
    hues = torch.randperm(CLASSES, generator=generator)  # another class is rare with each seed
    images, labels, masks = pictures(PICTURES, SHARES, hues, generator)
    torch.manual_seed(seed)
    model = small_model().train()
    model = use_seesaw(model) if seesaw else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        batch = torch.randint(PICTURES, (BATCH,)).tolist()
        chosen = [labels[index] for index in batch]
        value = model(images[batch], mask_labels=[masks[index] for index in batch], class_labels=chosen).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    by_class = average_precision(model, *pictures(HELD_OUT, torch.ones(CLASSES), hues, generator))
    return torch.stack([by_class[classes].mean() for classes in GROUPS.values()])


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Seesaw Loss against cross-entropy in Mask2Former.")
    parser.add_argument("--seeds", type=int, default=6, help="draws of the data, at least 2 (default 6)")
    seeds = parser.parse_args(arguments).seeds
    if seeds < 2:
        parser.error(f"expected at least 2 seeds, received {seeds}")
    print(f"AP at IoU 0.5 in percent, mean ± standard deviation of {seeds} seeds\n")
    print(f"{'loss':20}" + "".join(f"{group:>14}" for group in GROUPS))
    plain = torch.stack([result(False, seed) for seed in range(seeds)])
    seesaw = torch.stack([result(True, seed) for seed in range(seeds)])
    for name, values in {"cross-entropy": plain, "Seesaw": seesaw, "paired difference": seesaw - plain}.items():
        spreads = zip(values.mean(dim=0).tolist(), values.std(dim=0).tolist(), strict=True)
        print(f"{name:20}" + "".join(f"{f'{mean:.1f} ± {deviation:.1f}':>14}" for mean, deviation in spreads))


if __name__ == "__main__":
    main()
