import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from evaluation.reports import DEAD, clean, finding, member, over_eps, proof, report

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation.report.page import to_html
from sj_robust.evaluation.result import OVER_EPS

VOID = {"meta", "br", "hr", "img", "link", "path", "use", "input"}


class Page(HTMLParser):
    """Elements of a page, with a check that they are closed in order and have names of their
    own.
    """

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.open = []
        self.text = []
        self.feed(text)
        assert not self.open
        names = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        self.names = set(names)
        assert len(self.names) == len(names)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def text():
    return to_html(report(curve=over_eps()))


def test_nothing_comes_from_elsewhere(text):
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "object", "img", "base"} & {
        tag for tag, _ in page.elements
    }
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,"))


def test_names_are_unique_and_references_resolve(text):
    page = Page(text)
    assert len(page.names) > 20
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= page.names


def test_readable_on_any_screen(text):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert text.count('<svg role="img" aria-label="') == 3
    svgs = text.split("</style>", 1)[1]
    for color in ("#0072b2", "#d55e00", "#767676", "#010203", "#000000"):
        assert color not in svgs, f"{color} does not follow the theme"


def test_readable_by_everybody(text):
    """Language, headings in order, keyboard where it scrolls, names of pictures, contrast of WCAG
    in both themes.
    """
    page = Page(text)
    assert ("html", {"lang": "en"}) in page.elements
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    for before, after in pairwise(headings):
        assert after - before <= 1
    for tag, attributes in page.elements:
        assert attributes.get("class") != "wide" or attributes["tabindex"] == "0"
        assert tag != "svg" or attributes["aria-label"]
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w+)", block))
        for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    ]
    assert len(themes) == 2
    for theme in themes:
        for ground in ("page", "panel"):
            for ink, least in {"ink": 4.5, "soft": 4.5, "blue": 3, "orange": 3, "grey": 3}.items():
                found = contrast(theme[ink], theme[ground])
                assert found >= least, (ink, ground)
        assert contrast(theme["alarm"], theme["alarm-page"]) >= 4.5


def contrast(one, other):
    """Of two colours, by WCAG 2: (lighter + 0.05) / (darker + 0.05) of their relative
    luminances.
    """
    values = []
    for color in (one, other):
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        red, green, blue = (linear(digits[place : place + 2]) for place in (0, 2, 4))
        values.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(values) / min(values)


def linear(digits):
    """The light of a colour's part, from two hexadecimal digits of sRGB."""
    part = int(digits, 16) / 255
    if part <= 0.04045:
        return part / 12.92
    return ((part + 0.055) / 1.055) ** 2.4


def test_every_number_is_in_a_table(text):
    words = " ".join(Page(text).text)
    for figure in report().accuracies:
        assert figure.name in words
        assert f"{100 * figure.accuracy:.1f}" in words
    for value in (
        "16.8 to 68.7",
        "net.5",
        "0.4",
        "abc",
        "PiecewiseQuadratic(alpha=1.0)",
        "atan:4",
        "0.05",
    ):
        assert value in words


@pytest.mark.slow
def test_alarms_stand_first():
    failed = (finding("zero_gradients", passed=False),)
    control = member("control/a", seen=(0,), group="control")
    text = to_html(report(firing=(DEAD,), findings=failed, right=(0,), members=(control,)))
    body = text.split("<body>")[1]
    assert (
        body.index('role="alert">DEAD NETWORK')
        < body.index('class="cards"')
        < body.index("CHECK zero_gradients")
    )
    assert body.count('class="card doubtful"') == 3
    assert "<details open>" in body
    assert body.index('class="verdict"') < body.index('role="alert"')
    assert "Checks for gradient masking: 0 of 1 passed" in body
    assert "DEAD NETWORK" not in to_html(report())


@pytest.mark.slow
def test_the_page_opens_with_the_verdict_and_one_heat_map():
    rows = tuple(
        {"member": f"apgd_ce/atan:4/r{i}", "samples": 6, "layers": {"net.1": [0.1, 0.4]}}
        for i in range(2)
    )
    text = to_html(report(potential=rows, curve=over_eps()))
    verdict = re.sub("`(.*?)`", r"<code>\1</code>", report().verdict)
    assert text.count(verdict) == 1
    assert "Checks for gradient masking: 2 of 2 passed" in text
    shown, folded = text.split("<h2>Accuracies</h2>")
    found = (shown.count("<svg"), folded.count("<svg"))
    assert found == (3, 1)


def test_names_are_escaped(tmp_path):
    name = "<script>alert('&')</script>"
    made = report(name=name, dataset=name, members=(member(f"a{name}", (1,)),))
    made.page(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    Page(text)


def test_proofs_over_events_have_columns_although_the_first_point_has_none():
    threat = ThreatModel("L0", 2)
    points = [clean(variant=OVER_EPS)]
    for eps, fell in ((1, ()), (2, (0, 1))):
        at = {"norm": "L0", "eps": eps, "largest": eps}
        points.append(member(f"flips@{eps}", fell, variant=OVER_EPS, **at))
    proved = proof((4, 5), variant=OVER_EPS)
    points.append(replace(proved, threat=threat))
    attack = member("flips", (0,), norm="L0", eps=2, largest=2)
    made = report(threat=threat, members=(attack,), curve=points)
    assert [point.verified is None for point in made.over_eps] == [True, True, False]
    text = to_html(made)
    table = text[text.index(">events</th>") :].partition("</table>")[0]
    assert ">verified</th>" in table
    row = table.split("<tr>")[-1]
    assert [*re.findall(r">(\d+)</td>", row)][-2:] == ["2", "10"]


def test_a_bare_report():
    empty = dict.fromkeys(("potential", "members", "firing", "findings", "estimators"), ())
    text = to_html(report(network={}, **empty))
    assert text.count("<svg") == 1
    for absent in (
        "Checks for gradient masking",
        "Gradient estimators tried",
        "Firing rates by layer",
        "MS-MPPD",
    ):
        assert absent not in text
    assert "80.0 %" in text
    assert "8 of 10" in text
    Page(text)


@pytest.mark.slow
def test_the_same_report_gives_the_same_page(text):
    assert to_html(report(curve=over_eps())) == text
