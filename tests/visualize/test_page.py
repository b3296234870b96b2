"""The shell of the pages: what it escapes, what it refuses, and that nothing is fetched."""

import base64
import re

import jinja2
import pytest
from markupsafe import Markup

from tailseg.visualize.charts import new_figure, to_svg
from tailseg.visualize.page import ENVIRONMENT, data_uri, render


def detections(**content):
    return render("detections.html", **{"summary": "", "picture": None, "without": "", "rows": [], "more": 0} | content)


def test_text_is_escaped_and_charts_stand_as_they_are():
    page = detections(summary="a < b", rows=[["<b>", '"&', 2]])
    assert "<p>a &lt; b</p>" in page
    assert "<td>&lt;b&gt;</td><td>&#34;&amp;</td><td>2</td>" in page
    assert "<svg></svg>" in render("page.html", title="", verdict=Markup("<svg></svg>"))


def test_names_run_no_script_and_hold_no_control_characters():
    evil = "\x1b[2J\u202e\x9b</td><script>alert(1)</script><img src=x onerror=alert(1)>"
    page = detections(rows=[[evil, "é"]])
    assert "<script" not in page
    assert "<img src=x" not in page
    assert not set("\x1b\u202e\x9b") & set(page)
    assert r"\x1b[2J\u202e\x9b&lt;/td&gt;&lt;script&gt;" in page


def test_content_that_is_missing_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="is undefined"):
        render("analysis.html")
    with pytest.raises(jinja2.UndefinedError, match="title"):
        render("page.html")


def test_no_template_fetches_anything_and_two_have_a_script():
    names = ENVIRONMENT.list_templates()
    ours = {
        "analysis.css",
        "analysis.html",
        "analysis.js",
        "demo.html",
        "dataset.html",
        "detections.html",
        "macros.html",
        "page.css",
        "page.html",
        "comparison.html",
        "sortable.css",
        "sortable.js",
    }
    assert ours == set(names)
    for name in names:
        source = ENVIRONMENT.loader.get_source(ENVIRONMENT, name)[0]
        assert not re.search(
            r"https?:|<script[^>]|<link|@import|url\(|\bon\w+=|fetch|import\(|XMLHttp|innerHTML", source
        ), name
        assert source.count("<script>") == (name in ("analysis.html", "comparison.html")), name
        assert "|safe" not in source.replace(" ", ""), name


def test_pictures_are_their_own_address():
    address = data_uri(b"\x89PNG", "image/png")
    assert address.startswith("data:image/png;base64,")
    assert base64.b64decode(address.partition(",")[2]) == b"\x89PNG"


def test_a_chart_takes_the_colour_of_the_text_and_escapes_its_description():
    with new_figure() as (figure, axes):
        axes.set_xlabel("x")
        svg = to_svg(figure, "a chart", 'less < more & "so"')
    assert isinstance(svg, Markup)
    assert 'aria-label="less &lt; more &amp; &#34;so&#34;"' in svg
    assert "currentColor" in svg
    assert ">x</text>" in svg  # as text, not as outlines
    identifiers = re.findall(r' id="([^"]*)"', svg)
    assert identifiers
    assert all(identifier.startswith("a-chart-") for identifier in identifiers)
