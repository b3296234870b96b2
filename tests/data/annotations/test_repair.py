"""Rows that are not plain; what becomes of them in a file is tested in test_parsing.py and test_filtering.py."""

import math

import pytest

from tailseg.data.annotations.oddities import Tally
from tailseg.data.annotations.repair import meant, plain_annotation, plain_category, plain_image, whole, wrapped


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3), (3.0, 3), (-3, -3), (2**64 - 1, 2**64 - 1), (-(2**63), -(2**63)), (1e18, 10**18)]
    + [(value, None) for value in (2**64, -(2**63) - 1, 3.5, "3", True, None, [3], math.inf, math.nan, 1e30)],
)
def test_whole_numbers(value, number):
    found = whole(value)
    assert found == number
    assert type(found) is type(number)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *[("3", 3), ("-3", -3), (3.0, 3), (str(2**64 - 1), 2**64 - 1)],
        *[(value, None) for value in (str(2**64), "3.0", "a3", "", "\N{ARABIC-INDIC DIGIT THREE}", "9" * 5000)],
    ],
)
def test_numbers_may_be_written_as_texts(value, number):
    assert meant(value) == number


def test_numbers_of_64_bits_keep_their_bits():
    assert [wrapped(number) for number in (0, 2**63 - 1, 2**63, 2**64 - 1, -5)] == [0, 2**63 - 1, -(2**63), -1, -5]


def test_a_plain_row_stays_as_it_is():
    met = Tally()
    image = {"id": 1, "height": 4, "width": 5, "file_name": "a", "coco_url": None, "neg_category_ids": [1], "x": 2}
    assert plain_image(image, "image 1", met) == image
    category = {"id": 1, "name": "a", "frequency": "r"}
    assert plain_category(category, "category 1", met) == category
    row = {"id": 1, "image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4.5], "area": 7, "iscrowd": 0, "ignore": 1}
    assert plain_annotation(row, "annotation 1", 0, met) == row
    assert met.counts == {}


def test_numbers_of_a_box_may_be_texts():
    met, row = Tally(), {"id": 1, "image_id": 2, "category_id": 3}
    assert plain_annotation(row | {"bbox": ["1", 2, "3.5", "4"]}, "p", 0, met)["bbox"] == [1, 2, 3.5, 4]
    assert met.places == {"form": ["p"]}
    for box in (["1", 2, 3, "x"], ["1", 2, 3, "nan"], ["1", 2, 3, "1e9"], ["1", 2, 3], "1234"):
        assert all(map(math.isnan, plain_annotation(row | {"bbox": box}, "p", 0, met)["bbox"]))
    assert met.counts == {"form": 1}


def test_a_row_of_nothing():
    met = Tally()
    assert plain_image({}, "image number 1 of the list", met) is None
    assert plain_category({}, "category number 1 of the list", met) is None
    assert plain_annotation({}, "annotation number 1 of the list", 0, met) is None
    assert met.places == {
        "image_id": ["image number 1 of the list: its id is missing"],
        "category_id": ["category number 1 of the list: its id is missing"],
        "annotation_id": ["annotation number 1 of the list"],
        "no_image": ["annotation number 1 of the list: its image_id is missing"],
    }


def test_an_annotation_with_ids_alone_has_no_box_and_no_area():
    row = plain_annotation({"image_id": 2.0, "category_id": 3}, "p", 8, Tally())
    assert (row["id"], row["image_id"], row["area"]) == (8, 2, None)
    assert all(map(math.isnan, row["bbox"]))
