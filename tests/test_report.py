"""The report is one file that opens offline, says what it shows, and takes nothing a user writes as markup."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from loopaware.observe import figures
from loopaware.observe.report import Report

ADDRESSES = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.said: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data):
        self.said.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def values(self, *names):
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in names]


def curve(label: str = "learned", points: int = 3) -> Figure:
    drawn = figures.figure(4, 3)
    (axes,) = drawn.axes
    axes.plot(range(points), [i % 7 for i in range(points)], label=label)
    axes.legend()
    return drawn


@pytest.fixture
def written(tmp_path):
    def write(report: Report) -> tuple[str, Page]:
        source = report.write(tmp_path / "report.html").read_text()
        return source, Page(source)

    return write


@pytest.fixture
def full():
    report = Report("Distances", seeds=(0, 1, 2))
    report.heading("Accuracy")
    report.text("One.\n\nTwo.")
    report.table(("reader", "right"), [("learned", 1.0), ("fixed", 0.25)], caption="Share right.")
    report.figure(curve(), alt="One curve rises.", caption="A curve.")
    report.figure(curve(), alt="The same curve again.")
    report.frames([curve(), curve(), curve()], ["Loop 0.", "Loop 1.", "Loop 2."])
    return report


def test_asks_for_nothing_from_outside(full, written):
    source, page = written(full)
    for address in page.values(*ADDRESSES):
        assert address.startswith(("#", "data:image/png;base64,")), address
    assert not re.search(r"https?:|url\((?!#)|@import|<link|<iframe", source)


def test_ids_are_unique_and_every_reference_has_one(full, written):
    source, page = written(full)
    ids = Counter(page.values("id"))
    assert ids
    assert max(ids.values()) == 1
    references = set(re.findall(r'(?:url\(|href=")#([^")]+)', source))
    assert references
    assert references <= set(ids)


def test_every_figure_is_named_for_those_who_do_not_see_it(full, written):
    _, page = written(full)
    svgs = page.all("svg")
    assert [svg["aria-label"] for svg in svgs] == [
        "One curve rises.",
        "The same curve again.",
        "Loop 0.",
        "Loop 1.",
        "Loop 2.",
    ]
    assert {svg["role"] for svg in svgs} == {"img"}


def test_user_text_is_never_markup(written):
    evil = '<script>alert("&")</script>'
    report = Report(evil)
    report.heading(evil)
    report.text(evil)
    report.table((evil, "b"), [(evil, evil)], caption=evil)
    report.figure(curve(evil), alt=evil, caption=evil)
    _, page = written(report)
    assert len(page.all("script")) == 1
    assert page.all("svg")[0]["aria-label"] == evil
    assert "".join(page.said).count(evil) == 10  # title 2, heading, text, table 4, legend, figcaption


def test_numbers_are_right_aligned_and_words_are_not(written):
    report = Report("Table")
    rows = [("learned", 13_000, 0.98, "0.98 ± 0.01", None), ("fixed", 7, float("nan"), "0.50 (0.41–0.59)", 1e-9)]
    report.table(("reader", "parameters", "right", "spread", "rest"), rows, caption="Sizes.")
    _, page = written(report)
    assert [cell.get("class") for cell in page.all("th")[:5]] == [None, "number", "number", "number", "number"]
    assert [cell.get("class") for cell in page.all("td")] == ["number"] * 8
    assert [cell.get("scope") for cell in page.all("th")] == ["col"] * 5 + ["row"] * 2
    assert {"13000", "0.980", "nan", "–", "1e-09"} <= set(page.said)


def test_a_table_without_rows_is_a_table(written):
    report = Report("Table")
    report.table(("reader",), [], caption="Nothing was measured.")
    _, page = written(report)
    assert len(page.all("table")) == 1
    assert not page.all("td")


def test_heavy_figures_become_pictures(written, monkeypatch):
    monkeypatch.setattr(figures, "HEAVY", 1_000)
    report = Report("Heavy")
    report.figure(curve(), alt='Many "points".')
    _, page = written(report)
    (image,) = page.all("img")
    assert not page.all("svg")
    assert image["src"].startswith("data:image/png;base64,iVBOR")
    assert image["alt"] == 'Many "points".'
    assert (image["width"], image["height"]) == ("384", "288")


def test_frames_are_all_there_before_any_script_runs(full, written):
    _, page = written(full)
    assert len(page.all("figure")) == 5
    assert page.all("div")[-1] == {"class": "controls", "hidden": ""}
    (slider,) = page.all("input")
    assert (slider["min"], slider["max"]) == ("0", "2")


def test_a_figure_is_drawn_when_it_is_added(written):
    drawn = curve("before")
    report = Report("Twice")
    report.figure(drawn, alt="Before.")
    drawn.axes[0].legend(["after"])
    report.figure(drawn, alt="After.")
    _, page = written(report)
    assert {"before", "after"} <= {text.strip() for text in page.said}


def test_says_how_it_was_made(full, written, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/loopaware", "run", "distances", "--title", "a b"])
    _, page = written(full)
    assert {"loopaware run distances --title 'a b'", "0, 1, 2"} <= set(page.said)
    assert any(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", text) for text in page.said)
    assert any("loopaware 0.1.0" in text and "torch 2" in text for text in page.said)


def test_two_writes_differ_in_the_date_alone(full, tmp_path):
    first, second = (full.write(tmp_path / name).read_text() for name in ("a.html", "b.html"))
    dateless = [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", source) for source in (first, second)]
    assert dateless[0] == dateless[1]


def test_colours_do_not_come_from_shared_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    left, right = figures.figure(6, 3, columns=2).axes
    assert dict(matplotlib.rcParams) == before
    assert left.plot([1, 2])[0].get_color() == right.plot([1, 2])[0].get_color() == figures.PALETTE[0]


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_words_are_refused(text):
    with pytest.raises(ValueError, match="title must be text that says something, got"):
        Report(text)
    report = Report("Errors")
    with pytest.raises(ValueError, match="alt must be text that says something, got"):
        report.figure(curve(), alt=text)
    with pytest.raises(ValueError, match="caption must be text that says something, got"):
        report.table(("a",), [(1,)], caption=text)
    with pytest.raises(ValueError, match="alt must be text that says something, got"):
        report.frames([curve()], [text])
    with pytest.raises(ValueError, match="heading must be text that says something, got"):
        report.heading(text)


def test_wrong_input_is_refused():
    report = Report("Errors")
    with pytest.raises(ValueError, match="a row must have 2 cells, got 1"):
        report.table(("a", "b"), [(1, 2), (3,)], caption="Ragged.")
    with pytest.raises(TypeError, match="figure must be a matplotlib figure, got Axes"):
        report.figure(curve().axes[0], alt="Axes are no figure.")
    with pytest.raises(ValueError, match="frames must be one or more figures with a caption each, got 1 figures and 2"):
        report.frames([curve()], ["one", "two"])
    with pytest.raises(ValueError, match="frames must be one or more figures with a caption each, got 0 figures"):
        report.frames([], [])
    with pytest.raises(ValueError, match="level must be at most 4, got 5"):
        report.heading("Too deep", level=5)
    with pytest.raises(ValueError, match="level must be at least 2, got 1"):
        report.heading("Too high", level=1)
    with pytest.raises(ValueError, match="width must be above 0 and at most 40, got 0"):
        figures.figure(0, 3)
    with pytest.raises(ValueError, match="height must be above 0 and at most 40, got nan"):
        figures.figure(4, float("nan"))
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        figures.figure(4, 3, columns=0)


def test_figures_stand_beside_the_page_as_files(tmp_path):
    report = Report("Files")
    report.figure(curve(), alt="A curve.")
    report.frames([curve()], ["A frame is no file."])
    report.write(tmp_path / "report.html")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["figure1.svg"]
    svg = ElementTree.fromstring((tmp_path / "figures" / "figure1.svg").read_text())
    assert svg.tag.endswith("svg") and svg.get("viewBox")


def test_a_report_that_cannot_be_written_says_so(full, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="must fit on the disk and be writable"):
        full.write(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
