"""Batches of samples of unlike sizes."""

import torch

from tailseg.data.batches import collate, rounded_rows
from tailseg.structures import Instances, Sample


def sample(height, width, count, image_id=1, side=6):
    return Sample(
        image=torch.full((3, height, width), image_id, dtype=torch.uint8),
        instances=Instances(
            boxes=torch.arange(count * 4, dtype=torch.float32).reshape(-1, 4),
            labels=torch.arange(count) + 5,
            masks=torch.full((count, side, side), 255, dtype=torch.uint8),
            mask_frames=torch.ones(count, 4),
        ),
        absent=torch.arange(20) == count + 5,
        image_id=image_id,
        original_hw=(height * 2, width * 2),
    )


def test_collate_pads_right_and_below():
    batch = collate([sample(40, 50, 2, image_id=7), sample(33, 70, 0, image_id=9)])
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.images[0, :, :40, :50].unique().tolist() == [7]
    assert int(batch.images[0].sum()) == 7 * 3 * 40 * 50  # nothing but zeros around it
    assert int(batch.images[1].sum()) == 9 * 3 * 33 * 70
    assert batch.image_sizes.tolist() == [[40, 50], [33, 70]]
    assert batch.original_sizes.tolist() == [[80, 100], [66, 140]]
    assert batch.image_ids.tolist() == [7, 9]
    assert batch.valid.tolist() == [[True, True], [False, False]]
    assert batch.labels.tolist() == [[5, 6], [0, 0]]
    assert batch.boxes[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.boxes[1].abs().sum() == 0
    assert batch.masks[0].min() == 255
    assert batch.masks[1].max() == 0
    # Classes are a row an image, whatever the number of its objects.
    assert batch.absent.shape == (2, 20)
    assert batch.absent.nonzero().tolist() == [[0, 7], [1, 5]]


def test_collate_without_any_object_keeps_one_row():
    batch = collate([sample(64, 64, 0)], divisor=64)
    assert batch.images.shape == (1, 3, 64, 64)
    assert batch.boxes.shape == batch.mask_frames.shape == (1, 1, 4)
    assert batch.masks.shape == (1, 1, 6, 6)
    assert not batch.valid.any()


def test_few_shapes():
    """Sides of 128 pixels, rows of 32 and 128: what is in a batch stays, what is added is padding."""
    samples = [sample(40, 50, 2, image_id=7), sample(33, 170, 40, image_id=9)]
    plain, batch = collate(samples, 64), collate(samples, 64, few_shapes=True)
    assert plain.images.shape == (2, 3, 64, 192)
    assert batch.images.shape == (2, 3, 128, 256)
    assert plain.boxes.shape[1] == 40
    assert batch.boxes.shape[1] == batch.masks.shape[1] == 128
    assert torch.equal(batch.images[:, :, :64, :192], plain.images)
    assert batch.images.sum() == plain.images.sum()
    assert not batch.valid[:, 40:].any()
    for name in ("boxes", "labels", "valid", "masks", "mask_frames"):
        assert torch.equal(getattr(batch, name)[:, :40], getattr(plain, name)), name
    for name in ("image_sizes", "original_sizes", "image_ids", "absent"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    assert [rounded_rows(rows) for rows in (0, 32, 33, 128, 129, 600)] == [32, 32, 128, 128, 512, 2048]
