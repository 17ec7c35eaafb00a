import re
from dataclasses import replace
from html.parser import HTMLParser

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
