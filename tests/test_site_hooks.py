"""What the hooks of the site do to a page: flags stay whole, long names may break, text is kept."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
from places import ROOT

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(*children):
    return SimpleNamespace(toc=[SimpleNamespace(children=children)], meta={})


@pytest.mark.parametrize(
    ("html", "made"),
    [
        ("<code>--no-eval</code>", '<code><span class="flag">--no-eval</span></code>'),
        ("<code>pre-commit</code> and --flag", "<code>pre-commit</code> and --flag"),
        (
            '<code><a id="__code-0-1" name="a--b"></a><span class="w"> </span>--set a=1</code>',
            '<code><a id="__code-0-1" name="a--b"></a><span class="w"> </span>'
            '<span class="flag">--set</span> a=1</code>',
        ),
        (
            "<td>BartForConditionalGeneration</td>",
            "<td>Bart<wbr>For<wbr>Conditional<wbr>Generation</td>",
        ),
        ("<td>BertModel</td>", "<td>BertModel</td>"),
        ('<td><a href="a_long_name_of_a_page.html">it</a></td>',) * 2,
        ("<p>BartForConditionalGeneration</p>",) * 2,
    ],
)
def test_lines_break_where_they_may(hooks, html, made):
    assert hooks.on_page_content(html, page("a heading")) == made
    assert re.sub("<[^>]+>", "", made) == re.sub("<[^>]+>", "", html)


def test_a_page_without_headings_has_no_contents(hooks):
    short, long = page(), page("a heading")
    hooks.on_page_content("", short)
    hooks.on_page_content("", long)
    assert (short.meta, long.meta) == ({"hide": ["toc"]}, {})
