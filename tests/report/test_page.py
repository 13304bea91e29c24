"""The page is whole, needs nothing beside it, and shows what is put into it as text only."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from report_cases import EVALUATED, LOADING, make_case

from hf_gradnas.report.page import make_page
from hf_gradnas.report.plots import draw_picture

EMPTY = {"meta", "img", "rect", "path", "br", "hr", "link"}
PICTURE = b"\x89PNG and more"
HOSTILE = '<script>alert(1)</script>\x1b[2J" onload="x hf_ABCDEF123'


class Reader(HTMLParser):
    """Reads a page, in which every element must end."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1:] != ["style"]:
            self.texts.append(" ".join(data.split()))


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page():
    plan, _, _, summary = make_case(30, **EVALUATED)
    return make_page(summary, plan, PICTURE, loading=LOADING)


def test_the_page_says_all(page):
    said = " ".join(read(page).texts)
    for text in (
        "Kept 48.0% of the FLOPs",
        "perplexity 2.7 → 7.4",
        "2.00 × as fast",
        "FLOPs 100 48 48.00% 50 (50.0%)",
        "8 30.0 ms 10.0 ms 3.00 ×",
        "perplexity 2.7000 7.4000",
        "model.layers.2.mlp neurons 142 1,000 14%",
        "lm_head",
        "hf-gradnas prune --model user/large",
        "AutoModelForCausalLM",
    ):
        assert text in said, text


def test_it_needs_nothing_beside_it(page):
    reader = read(page)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    sources = [value for _, name, value in reader.attributes if name in {"src", "href", "srcset"}]
    links = {"../README.md", "../gradnas.json", "summary.json", "plan.csv"}
    pictures = [source for source in sources if source not in links]
    assert pictures == [f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"]
    assert "url(" not in page
    assert "http" not in page
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]


def test_it_fits_phones_and_both_schemes(page):
    assert ("meta", "content", "width=device-width, initial-scale=1") in read(page).attributes
    assert "prefers-color-scheme: dark" in page
    assert page.count('<div class="box"><table>') == page.count("<table>")


def test_equal_layers_are_one_row_and_the_plan_is_folded(page):
    plan, _, _, summary = make_case(30, **EVALUATED)
    said = read(page).texts
    assert "model.layers.{2-29}.self_attn" in said
    kept = plan.kept["model.layers.29.mlp:neurons"]
    assert ", ".join(map(str, kept)) in said
    assert read(page).tags.count("details") == len(summary.axes) + 2  # of them all, and of refusals


def test_texts_are_no_markup():
    plan, _, _, summary = make_case(**{**EVALUATED, "command": HOSTILE})
    summary = type(summary)(**{**vars(summary), "name": HOSTILE, "base_model": HOSTILE})
    page = make_page(summary, plan, PICTURE, loading=HOSTILE)
    reader = read(page)
    assert "script" not in reader.tags
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert not set("\x1b") & set(page)
    assert "hf_ABCDEF123" not in page
    assert any("<script>alert(1)</script>" in text for text in reader.texts)


def test_a_page_of_little_is_whole():
    plan, _, _, summary = make_case(layout="stock")
    said = " ".join(read(make_page(summary, plan, PICTURE, loading=LOADING)).texts)
    assert "Quality Nothing was measured" in said
    for missing in ("Speed", "None", "Undefined"):
        assert missing not in said


BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), None)
MEASURE = """<script>document.title = [document.documentElement.scrollWidth, innerWidth,
    document.images[0].naturalWidth > 0,
    [...document.querySelectorAll(".box, pre")].filter(e => e.scrollWidth > e.clientWidth).length,
    getComputedStyle(document.body).backgroundColor]
    .join(" ")</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_it_without_scrolling_aside(tmp_path, width):
    plan, _, scores, summary = make_case(30, **EVALUATED)
    page = make_page(summary, plan, draw_picture(summary, plan, scores)[1], loading=LOADING)
    file = tmp_path / "index.html"
    file.write_text(page.replace("</body>", MEASURE), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run(
        [*command, file.as_uri()], capture_output=True, check=True, text=True, timeout=60
    )
    title = re.search("<title>(.+)</title>", done.stdout)[1]
    whole, window, has_picture, cut_off, _ = title.split(" ", 4)
    assert int(whole) <= int(window) == width
    assert has_picture == "true"
    assert cut_off == "0"  # tables and commands
