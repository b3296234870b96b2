import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tailseg.data.diagnosis import near_duplicates
from tailseg.data.diagnosis.near_duplicates import ALIKE, BITS, dhash, nearest_alike, thumbnail_of


def scene(seed: int, hw=(96, 144)) -> np.ndarray:
    """A smooth picture: a coarse grid of colours, enlarged."""
    cells = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize(hw[::-1], Image.Resampling.BICUBIC))


def thumbnails(*pictures):
    return np.stack([thumbnail_of(picture) for picture in pictures])


def test_a_thumbnail_is_the_mean_brightness():
    """Of 32 x 36 pixels, 2 x 2 each: the mean of red, green and blue as eyes weigh them."""
    grey = np.random.default_rng(0).integers(0, 255, (32, 36), dtype=np.uint8)
    found = thumbnail_of(np.repeat(grey[:, :, None], 3, axis=2))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, grey.reshape(16, 2, 18, 2).mean(axis=(1, 3)), atol=0.5)
    red = np.zeros((32, 36, 3), np.uint8)
    red[:, :, 0] = 200
    np.testing.assert_allclose(thumbnail_of(red), 0.299 * 200, atol=0.5)


@pytest.mark.parametrize("hw", [(1, 1), (3, 500), (16, 18), (700, 1000)])
def test_thumbnails_of_all_sizes(hw):
    picture = np.full((*hw, 3), 77, np.uint8)
    np.testing.assert_array_equal(thumbnail_of(picture), np.full((16, 18), 77))


def test_a_bit_of_the_hash_is_a_rise_to_the_right():
    """By hand: cells of 2 x 2, 8 rows of 9; only row 2 rises, between its columns 3 and 4."""
    thumbnail = np.zeros((1, 16, 18), np.float32)
    thumbnail[0, 4:6, 8:] = 1
    expected = np.packbits(np.arange(64) == 2 * 8 + 3).view(np.uint64)
    assert dhash(thumbnail).tolist() == expected.tolist()
    assert dhash(np.zeros((3, 16, 18), np.float32)).tolist() == [0, 0, 0]


def changed(picture: np.ndarray, how: str) -> np.ndarray:
    image = Image.fromarray(picture)
    if how == "scaled":
        return np.asarray(image.resize((72, 48)))
    if how == "squeezed":
        return np.asarray(image.resize((100, 100)))
    if how == "darkened":
        return (picture * 0.6).astype(np.uint8)
    if how == "noisy":
        noise = np.random.default_rng(1).normal(0, 10, picture.shape)
        return (picture + noise).clip(0, 255).astype(np.uint8)
    return np.asarray(image.convert("L").convert("RGB"))


@pytest.mark.parametrize("how", ["scaled", "squeezed", "darkened", "noisy", "grey"])
def test_copies_are_found_with_their_originals(how):
    originals = [scene(seed) for seed in range(8)]
    copies = [changed(originals[i], how) for i in (5, 0, 7)]
    others = [scene(99), *copies, scene(98)]
    images, found = nearest_alike(thumbnails(*others), thumbnails(*originals))
    assert images.tolist() == [1, 2, 3]
    assert found.tolist() == [5, 0, 7]


def test_the_most_alike_is_named():
    picture = scene(3)
    noisy = changed(picture, "noisy")
    images, found = nearest_alike(thumbnails(picture), thumbnails(noisy, picture, noisy))
    assert (images.tolist(), found.tolist()) == ([0], [1])


def test_a_mirrored_image_and_the_negative_are_others():
    picture = scene(3)
    images, _ = nearest_alike(thumbnails(picture[:, ::-1], 255 - picture), thumbnails(picture))
    assert images.tolist() == []


def test_images_of_one_colour_are_like_none():
    plain = [np.full((40, 40, 3), value, np.uint8) for value in (0, 20, 255)]
    images, _ = nearest_alike(thumbnails(*plain), thumbnails(*plain))
    assert images.tolist() == []


def test_small_things_on_white_paper_are_told_apart():
    """Nearly all bits of their hashes agree; the correlation does not."""
    pages = []
    for x in (20, 60, 100):
        page = np.full((96, 144, 3), 255, np.uint8)
        page[40:50, x : x + 12] = 0
        pages.append(page)
    found = thumbnails(*pages)
    assert np.bitwise_count(dhash(found[:1]) ^ dhash(found[1:])).max() <= BITS
    assert [part.tolist() for part in nearest_alike(found[:1], found[1:])] == [[], []]


def test_nothing_to_compare():
    none = np.zeros((0, 16, 18), np.float32)
    some = thumbnails(scene(0))
    for images, others in ((none, some), (some, none), (none, none)):
        assert [part.tolist() for part in nearest_alike(images, others)] == [[], []]


@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(0, 9), st.integers(1, 4))
def test_as_pair_by_pair(seed, count, other_count, block):
    """In blocks of any size, the same as each pair on its own."""
    rng = np.random.default_rng(seed)
    base = rng.normal(100, 30, (3, 16, 18))
    images = base[rng.integers(0, 3, count)] + rng.normal(0, 8, (count, 16, 18))
    others = base[rng.integers(0, 3, other_count)] + rng.normal(0, 8, (other_count, 16, 18))
    expected = {}
    for i, image in enumerate(images):
        best = ALIKE
        for j, other in enumerate(others):
            cells = [t.reshape(8, 2, 9, 2).mean(axis=(1, 3)) for t in (image, other)]
            bits = sum(((a[1:] > a[:-1]) != (b[1:] > b[:-1])).sum() for a, b in zip(*cells, strict=True))
            likeness = np.corrcoef(image.ravel(), other.ravel())[0, 1]
            if bits <= BITS and likeness >= best:
                best, expected[i] = likeness, j
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "BLOCK", block)
        found = nearest_alike(images.astype(np.float32), others.astype(np.float32))
    assert dict(zip(*(part.tolist() for part in found), strict=True)) == expected
