"""The page of a report: one well-formed file with the numbers of the report, whatever the names of its layers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pissa_kernels import Report
from pissa_kernels.report.layer import HEADS, layer_row
from pissa_kernels.report.spectrum import least_rank, suggestion

from ..support.marks import slow_but
from ..support.reports import LLAMA, in_first_triplets, layer, llama, power_law

pytest.importorskip("matplotlib", reason="the page has pictures, which need matplotlib")
pytest.importorskip("jinja2", reason="the page is a template of Jinja2")

from pissa_kernels.report.page import render_page, write_page

SVG_URI = "data:image/svg+xml;base64,"
VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = 'x.0.</script><script>alert(1)</script>"\' onload="x" <b>&amp; --> ]]>'
GPT2 = [f"transformer.h.{depth}.{name}" for depth in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
SMALL = llama(2, LLAMA[:4])


class Page(HTMLParser):
    """Opening tags, text with its innermost tag, rows of tables, and ids; an unbalanced tag fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[tuple[dict[str, str | None], list[str]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/>: only foreign elements, such as svg, may close themselves")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.append((self._open[-1], data))
            if self._open[-1] in ("td", "th"):
                self.rows[-1][1][-1] += data

    def text(self, tag: str) -> list[str]:
        return [text for within, text in self.texts if within == tag]

    def pictures(self) -> list[str]:
        """The SVG files in the data URIs."""
        sources = [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]
        return [b64decode(source.removeprefix(SVG_URI), validate=True).decode() for source in sources]

    def report(self) -> object:
        (index,) = (i for i, (tag, attributes) in enumerate(self.tags) if attributes.get("id") == "report")
        number = [tag for tag, _ in self.tags[:index]].count("script")
        return json.loads(self.text("script")[number])


def with_loose(report: Report, *loose: int) -> Report:
    """The report, with these layers not converged."""
    layers = [
        dataclasses.replace(entry, certificate=dataclasses.replace(entry.certificate, converged=index not in loose))
        for index, entry in enumerate(report.layers)
    ]
    return Report(layers, 1.5, 3 * 2**20)


REPORTS = {
    "one layer": Report([layer("lm_head", (2.0,))]),
    "224 layers": llama(32),
    "Conv1D": with_loose(power_law(GPT2), 1),
    "hostile": with_loose(Report([layer(HOSTILE), layer("x.1.\x1b\x00ünï"), layer("x.1.a--b")]), 0),
    "same names": power_law(["Linear"] * 3),
}


@pytest.fixture(scope="module", params=list(REPORTS))
def drawn(request: pytest.FixtureRequest) -> tuple[Report, str]:
    report = REPORTS[request.param]
    if request.param == "hostile":
        with pytest.warns(UserWarning, match="Glyph"):  # the font has no glyph for a control character
            return report, render_page(report, (0.5, 0.9), title=HOSTILE)
    return report, render_page(report, (0.5, 0.9), title=HOSTILE)


@pytest.mark.slow
def test_is_well_formed_and_needs_nothing_else(drawn: tuple[Report, str]) -> None:
    page = Page(drawn[1])
    assert len(set(page.ids)) == len(page.ids)
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"srcset", "action", "poster", "data", "onload", "xlink:href", "style"}, tag
        assert "src" not in attributes or str(attributes["src"]).startswith(SVG_URI)
        href = attributes.get("href") or "#"
        assert href == "#" or href[1:] in page.ids
    policy = next(str(found["content"]) for _, found in page.tags if found.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "url(" not in "".join(page.text("style"))
    assert "http" not in re.sub(r'http-equiv="|base64,[^"]*', "", drawn[1])
    assert {tag for tag, _ in page.tags} >= {"title", "h1", "img", "table", "footer"}
    assert drawn[1].startswith("<!DOCTYPE html>\n")


def test_pictures_are_well_formed_and_need_nothing_else(drawn: tuple[Report, str]) -> None:
    pictures = Page(drawn[1]).pictures()
    assert len(pictures) == 3
    for picture in pictures:
        assert "<!--" not in picture, "a comment may hold a layer's name, and with it characters that XML forbids"
        elements = list(ElementTree.fromstring(picture).iter())
        tags = {element.tag.rpartition("}")[2] for element in elements}
        assert (
            {"svg", "path", "use"} <= tags <= {"svg", "defs", "style", "g", "path", "use", "clipPath", "rect", "image"}
        )
        ids = [element.attrib["id"] for element in elements if "id" in element.attrib]
        assert len(set(ids)) == len(ids)
        attributes = [(name.rpartition("}")[2], value) for element in elements for name, value in element.items()]
        assert not [name for name, _ in attributes if name.startswith("on")]
        targets = {value for name, value in attributes if name == "href"}
        targets.update(target for _, value in attributes for target in re.findall(r"url\(([^)]*)\)", value))
        inside = {f"#{name}" for name in ids}
        assert all(target.startswith("data:image/png;base64,") for target in targets - inside), targets - inside
        assert "http" not in re.sub(r'<!DOCTYPE[^>]*>|xmlns(:xlink)?="[^"]*"|base64,[^"]*', "", picture)


def test_shows_the_numbers_of_the_report(drawn: tuple[Report, str]) -> None:
    report, text = drawn
    page = Page(text)
    assert page.report() == report.to_dict()
    assert page.text("title") == page.text("h1") == [HOSTILE]
    rows = [row for row in page.rows if len(row[1]) == len(HEADS)]
    assert rows[0][1] == list(HEADS)
    # Unlike a browser, html.parser keeps a control character as it is.
    assert [cells for _, cells in rows[1:]] == [layer_row(entry) for entry in report.layers]
    highlighted = [attributes.get("class") == "loose" for attributes, _ in rows[1:]]
    assert highlighted == [not entry.certificate.converged for entry in report.layers]
    for share in (0.5, 0.9):
        assert suggestion(report.layers, share) + "." in page.text("p")


def test_names_are_escaped(drawn: tuple[Report, str]) -> None:
    page = Page(drawn[1])
    assert [tag for tag, _ in page.tags if tag in ("script", "b")] == ["script", "script"]
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]


def test_is_accessible() -> None:
    page = Page(render_page(SMALL))
    alternatives = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(alternatives) == 3
    assert all(alternatives)
    assert "from 10.0 % in model.layers.0.self_attn.q_proj to 13.5 % in" in str(alternatives[0])
    assert len(page.text("figcaption")) == 3
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags


@pytest.mark.slow
def test_layers_that_did_not_converge_are_marked() -> None:
    text = render_page(with_loose(llama(2), 3, 5))
    page = Page(text)
    assert "2 of 14 not converged" in page.text("strong")
    assert page.text("code")[:2] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"]
    assert "and 2 more" not in text
    many = Page(render_page(with_loose(llama(2), *range(9))))
    assert ("a", {"href": "#layers"}) in many.tags
    assert "and 4 more, marked in " in many.text("li")
    calm = render_page(llama(2))
    assert "all converged" in Page(calm).text("strong")
    assert 'class="warning"' not in calm
    assert 'class="loose"' not in calm


def test_unmeasured_time_and_memory_are_omitted() -> None:
    known = Page(render_page(with_loose(SMALL)))
    assert known.text("dd") == ["1.500 s", "2.000 s", "3.0 MiB"]
    assert Page(render_page(SMALL)).text("dd") == ["2.000 s"]
    slow = Report([layer("h.0.q"), layer("h.1.q", seconds=0.75), layer("h.2.q", seconds=0.0)])
    rows = [cells for _, cells in Page(render_page(slow)).rows if len(cells) == 5]
    assert [(cells[0], *cells[3:]) for cells in rows[1:]] == [
        ("h.1.q", "750.0", "75.0"),
        ("h.0.q", "250.0", "25.0"),
        ("h.2.q", "0.0", "0.0"),
    ]


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_page(SMALL, tmp_path / name, (0.5, 0.9))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = Report.from_dict(Page((tmp_path / "a").read_text(encoding="utf-8")).report())
    assert render_page(again, (0.5, 0.9)) == (tmp_path / "a").read_text(encoding="utf-8")


def test_a_users_matplotlibrc_does_not_matter() -> None:
    from matplotlib import rc_context, rcParams

    plain = render_page(SMALL)
    with rc_context({"svg.fonttype": "none", "svg.image_inline": False, "svg.hashsalt": "another"}):
        assert render_page(SMALL) == plain
        assert rcParams["svg.fonttype"] == "none", "the user's setting is unchanged"


def test_writes_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("\n<!doctype HTML><title>old</title>")
    write_page(SMALL, str(path))
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert path.stat().st_mode & 0o777 == 0o644
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_page(llama(1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("report", "path", "shares", "error", "words"),
    [
        (Report(), "page.html", (0.9,), ValueError, "no layer was initialized, so there is nothing to show"),
        (SMALL, "page.html", (0.9, 90.0), ValueError, "at most 1"),
        (Report([layer("q", seconds=float("nan"))]), "page.html", (), ValueError, "seconds is NaN"),
        (
            SMALL,
            "missing/page.html",
            (),
            FileNotFoundError,
            "cannot write page.html: the folder .*missing does not exist",
        ),
        (SMALL, "", (), FileExistsError, "is a folder"),
    ],
)
def test_refusals_write_nothing(
    report: Report, path: str, shares: tuple[float, ...], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        write_page(report, tmp_path / path, shares)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", slow_but(['{"a": 1}', "old", "<svg></svg>", "\0\1<html>"], "old"))
def test_only_a_page_is_replaced(content: str, tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text(content)
    link.symlink_to("file")
    for target in path, link:
        with pytest.raises(FileExistsError, match=f"{target} exists and is not a web page, so it is not replaced"):
            write_page(SMALL, target)
    assert path.read_text() == content
    path.write_text("")
    write_page(SMALL, link)  # an empty file, where the link leads
    write_page(SMALL, link)
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="dangling is a link to nowhere, which is no file"):
        write_page(SMALL, tmp_path / "dangling")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe is not a regular file"):
        write_page(SMALL, tmp_path / "pipe")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_a_package_of_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'pissa-kernels\[report\]'") as raised:
        write_page(SMALL, tmp_path / "page.html")
    assert raised.value.name == package
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_python_for_peft() -> None:
    peft = pytest.importorskip("peft", reason="the configuration is of PEFT")
    layers = in_first_triplets({"h.0.attn.c_proj": 8, "h.0.mlp.c_proj": 4, "h.1.mlp.c_proj": 5, 'h.0."ü\\': 2})
    (code,) = Page(render_page(Report(layers), (1.0,))).text("code")
    config = eval(code, {"LoraConfig": peft.LoraConfig})
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 16, "pissa")
    assert config.rank_pattern == {"mlp.c_proj": 5, '"ü\\\\': 2}
    assert config.alpha_pattern == {"mlp.c_proj": 10, '"ü\\\\': 4}
    assert [least_rank(entry, 1.0) for entry in layers] == [8, 4, 5, 2]
    same = Page(render_page(Report([layer("q"), layer("k")]))).text("code")
    assert "pattern" not in same[0]
