import codecs

import pytest
from foreign_files import attempt
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.importers.xml_files import DEPTH, children_of_root, head_of, parse_xml, root_of
from tailseg.errors import UserError

BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;">]><a>&c;</a>'
bytes_like_xml = st.binary(max_size=80) | st.text(alphabet="<>/a&;!x= '", max_size=40).map(str.encode)


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("<a/>", "a"),
        ("<a x='1'><b/></a>", "a"),
        ("\n <?xml version='1.0'?>\n<!-- <b> -->\n<a>", "a"),
        (BOMB, "a"),
        ("<annotations\n>", "annotations"),
        ("<voc:annotation xmlns:voc='x'>", "annotation"),
        ("", ""),
        ("<", ""),
        ("a", ""),
        ("<!-- " + "x" * 5000 + "--><a/>", ""),  # beyond the first 4 KB
    ],
)
def test_the_root_is_told_by_the_beginning(tmp_path, text, root):
    path = tmp_path / "a.xml"
    for mark, encoding in ((b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")):
        path.write_bytes(mark + text.encode(encoding))
        if encoding == "utf-8" or len(text) < 2000:
            assert root_of(path) == root
            assert bool(head_of(path)) == bool(root)


def test_what_is_no_file_has_no_root(tmp_path):
    assert root_of(tmp_path) == root_of(tmp_path / "gone") == head_of(tmp_path) == ""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_document_types_and_entities_are_refused(tmp_path, encoding):
    path = tmp_path / "a.xml"
    for text in (BOMB, BOMB.replace("<!ENTITY", "<!ELEMENT"), '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>'):
        path.write_bytes(text.encode(encoding))
        sentence = f"{path}: it declares a document type; remove the line with <!DOCTYPE"
        assert attempt(parse_xml, path.read_bytes(), str(path)) == (None, sentence)
        assert attempt(lambda: list(children_of_root(path, "a"))) == (None, sentence)


@pytest.mark.parametrize(
    ("stated", "written", "text"),
    [
        ("utf-8", "utf-8", "行人"),
        ("UTF-8", "utf-8-sig", "行人"),
        ("GBK", "gbk", "行人"),
        ("gb2312", "gbk", "镕"),  # not a sign of GB 2312
        ("Big5", "big5", "行人"),
        ("Shift_JIS", "shift_jis", "歩行者"),
        ("EUC-KR", "euc_kr", "보행자"),
        ("ISO-8859-1", "latin-1", "bâtiment"),
        ("windows-1251", "cp1251", "дом"),
        ("utf-16", "utf-16", "行人"),
        ("utf-16", "utf-8", "行人"),
    ],
)
def test_encodings(stated, written, text):
    content = f'<?xml version="1.0" encoding="{stated}"?>\n<a>{text}</a>'.encode(written)
    assert parse_xml(content, "place").text == text


@pytest.mark.parametrize("stated", ["gbk", "cp999", "zip", "idna", "utf-8"])
def test_encodings_at_fault(stated):
    content = f'<?xml version="1.0" encoding="{stated}"?>\n<a>'.encode() + b"\xff\xff</a>"
    assert attempt(parse_xml, content, "place")[1].startswith("place: not valid XML: ")


@pytest.mark.parametrize("text", ["<a xmlns='x'><b/></a>", "<p:a xmlns:p='x'><p:b/></p:a>"])
def test_namespaces_are_left_out(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_text(text)
    tree = parse_xml(path.read_bytes(), "place")
    assert [tree.tag, tree[0].tag] == ["a", "b"]
    assert [child.tag for child in children_of_root(path, "a")] == ["b"]


@given(bytes_like_xml)
def test_any_bytes_are_xml_or_refused(content):
    found, refused = attempt(parse_xml, content, "place")
    assert found is not None or refused.startswith("place: ")
    assert "\n" not in refused


@given(bytes_like_xml)
def test_any_bytes_are_read_in_pieces_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.xml"
    path.write_bytes(content)
    whole, _ = attempt(parse_xml, content, "place")
    found, refused = attempt(lambda: [child.tag for child in children_of_root(path, "a")])
    if whole is not None and whole.tag == "a":
        assert found == [child.tag for child in whole]
    else:
        assert refused.startswith(f"{path}: ")


def test_children_come_one_by_one(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<a><b x='1'><c/><c>text</c></b><d/></a>")
    found = []
    for child in children_of_root(path, "a"):
        found.append((child.tag, dict(child.attrib), [(inner.tag, inner.text) for inner in child]))
    assert found == [("b", {"x": "1"}, [("c", None), ("c", "text")]), ("d", {}, [])]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<b/>", "it begins with <b>, not <a>; check the file"),
        ("<a><b></a>", "not valid XML: mismatched tag"),
        ("<a>" * (DEPTH + 1), "its elements are nested in more than 64 levels"),
        ("<?xml version='1.0' encoding='nonsense'?><a/>", "not valid XML"),
    ],
)
def test_files_at_fault_are_named(tmp_path, text, problem):
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path}: {problem}"):
        list(children_of_root(path, "a"))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}: cannot be read \(.*\); check the path and its rights"):
        list(children_of_root(tmp_path, "a"))


def test_deep_nesting_is_refused_at_once():
    """A million levels, 7 MB, took 17 s."""
    whole = parse_xml(b"<a>" * DEPTH + b"</a>" * DEPTH, "place")
    assert (whole.tag, len(list(whole.iter()))) == ("a", DEPTH)
    deeper = b"<a>" * (DEPTH + 1) + b"</a>" * (DEPTH + 1)
    for content in (deeper, b"<a>" * 1_000_000):
        _, sentence = attempt(parse_xml, content, "place")
        assert sentence == "place: its elements are nested in more than 64 levels; check the file"
    assert len(list(parse_xml(b"<a>" + b"<b></b>" * 100 + b"</a>", "place").iter())) == 101
