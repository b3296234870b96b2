import gzip
import json

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.annotations.streaming import brackets, read_lists
from tailseg.errors import UserError

KEYS = ("images", "annotations")

text = st.text(st.sampled_from('ab"\\[]{},:é\n '), max_size=8)
plain = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text
)
value = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=3))
rows = st.lists(st.dictionaries(text, value, max_size=3) | value, max_size=12)
documents = st.fixed_dictionaries(
    {}, optional={"info": value, "images": rows | plain, "more": rows, "annotations": rows}
)


def collect(path, block):
    lists = {}
    for key, first, part in read_lists(path, KEYS, block):
        if first == 0:
            lists[key] = part
        else:
            assert first == len(lists[key])
            lists[key] += part
    return lists


@given(document=documents, block=st.integers(1, 60), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_pieces_make_up_the_lists(tmp_path_factory, document, block, indent, ascii_only):
    path = tmp_path_factory.mktemp("stream") / "a.json"
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert collect(path, block) == {key: document[key] for key in KEYS if key in document}


@given(
    document=documents,
    block=st.integers(1, 60),
    place=st.floats(0, 1),
    byte=st.sampled_from(list(b'"\\[]{},:x1 \xff\n')),
    how=st.sampled_from(["cut", "insert", "replace", "remove"]),
)
def test_a_damaged_file_is_refused_or_still_valid(tmp_path_factory, document, block, place, byte, how):
    content = json.dumps(document, ensure_ascii=False).encode()
    at = int(place * (len(content) - 1))
    rest = {"cut": b"", "insert": content[at:], "replace": content[at + 1 :], "remove": content[at + 1 :]}[how]
    damaged = content[:at] + (bytes([byte]) if how in ("insert", "replace") else b"") + rest
    path = tmp_path_factory.mktemp("stream") / "a.json"
    path.write_bytes(damaged)
    try:
        expected = orjson.loads(damaged)
    except orjson.JSONDecodeError:
        expected = None
    if isinstance(expected, dict):
        assert collect(path, block) == {key: expected[key] for key in KEYS if key in expected}
    else:
        with pytest.raises(UserError) as caught:
            collect(path, block)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [4, 9, 1000])
def test_numbers_that_are_none_count_as_null(tmp_path, block):
    path = tmp_path / "a.json"
    path.write_text('{"x": NaN, "images": [{"a": [NaN, -Infinity], "b": "NaN \\" NaN"}, {"a": Infinity}]}')
    assert collect(path, block) == {"images": [{"a": [None, None], "b": 'NaN " NaN'}, {"a": None}]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b" \n ", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"[1, 2]", "found a list"),
        (b'"a"', "found a str"),
        (b"\x1f\x8b\x08", "not a whole gzip file"),
        (b'{"images": [{"a": 1},\n {"a": 2', r"cut off at line 2, column 9 \(byte 30\)"),
        (b'{"images": [\n{"a": 1}, {"a": nan}]}', "not valid JSON: .* at line 2, column 17"),
        (b'{"images": [\n{"a": NaN}, {"a": nan}]}', "not valid JSON: .* at line 2, column 19"),
        (b"\xff\xfe{\0}\0", "the text is UTF-16; save it as UTF-8"),
        (b'{"images": [{"a": 1} {"a": 2}]}', "expected ',' or '\\]' at line 1, column 22"),
        (b'{"images": [{"a": 1},]}', "not valid JSON: .* at line 1, column 2[12]"),
        (b'{"images": [{"a": [1}]}', "not valid JSON"),
        (b'{"images": [{"a": "\xff"}]}', "not UTF-8 text at line 1, column 20"),
        (b'{"images": []} 3', "expected the end of the file"),
        (b'{"images": [],}', "expected the name of an entry"),
        (b'{"images": [] "a": 3}', "expected ',' or '}'"),
        (b'{"images"; []}', "expected ':'"),
        (b'{"images": tru', "cut off at line 1, column 15"),
    ],
)
@pytest.mark.parametrize("block", [4, 9, 1000])
def test_faults_name_their_place(tmp_path, content, problem, block):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        collect(path, block)


def test_a_lost_quote_is_found_where_it_is(tmp_path):
    """What looks like one endless string is not read to the end of the file."""
    path = tmp_path / "a.json"
    rows = [json.dumps({"id": i, "name": "n"}) for i in range(2000)]
    rows[20] = '{"id: 20, "name": "n"}'
    path.write_text('{"images": [\n' + ",\n".join(rows) + "]}")
    with pytest.raises(UserError, match=r"not valid JSON: .* at line 22, column"):
        collect(path, 500)


def test_brackets_by_hand():
    places, depths = brackets(rb'{"a[": "\\", "b\"]": [1]}, 3')
    assert places.tolist() == [0, 21, 23, 24]
    assert depths.tolist() == [1, 2, 1, 0]
    assert brackets(b"")[0].size == 0
    assert brackets(rb'"\\\""')[0].dtype == np.int64


@pytest.mark.parametrize("block", [4, 9, 1000])
def test_a_packed_file_reads_as_the_plain_one(tmp_path, block):
    content = b'{"images": [{"a": 1}, {"a": [2]}], "x": 3}'
    (tmp_path / "a.json").write_bytes(gzip.compress(content))  # whatever its name
    (tmp_path / "plain.json").write_bytes(content)
    assert collect(tmp_path / "a.json", block) == collect(tmp_path / "plain.json", block)
    (tmp_path / "a.json").write_bytes(gzip.compress(content[:-12]))
    with pytest.raises(UserError, match=r"a\.json: the file is cut off at line 1, column 31"):
        collect(tmp_path / "a.json", block)
    (tmp_path / "a.json").write_bytes(gzip.compress(content)[:-5])
    with pytest.raises(UserError, match=r"a\.json: not a whole gzip file"):
        collect(tmp_path / "a.json", block)
