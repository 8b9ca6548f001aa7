"""The page of all studies: the tables' numbers, names that would break it, and what a click in a browser changes."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest
from studies import report_row, study_of, task_row, write_grid

from nanope import REPO
from nanope.study.markup import accuracy_cell, difference_cell, mean_cell, titled
from nanope.study.page import about, write_page
from nanope.study.results import Study
from nanope.study.tables import tables
from scripts.report import main

EVIL = '</script><i>a & "b"'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.parametrize("name", ["crope-2", "carope-1", "quickstart"])  # nats; perplexity, yarn; one seed
def test_its_numbers_are_those_of_the_tables(name):
    study = Study.read(REPO / "results" / name)
    made = {table.title: {row[0]: dict(zip(table.head, row)) for row in table.rows} for table in tables(study)}
    page, compared = about(study, name), 0
    for view in page["views"]:
        if view["lengths"]:
            evaluation, protocol = view["title"].split(": ")
            means = made[titled(view["setting"], f"{view['y'][0]} at context lengths, {protocol} ({evaluation})")]
            less = made[titled(view["setting"], f"{view['y'][1]} less {page['baseline']}, {protocol} ({evaluation})")]
            digits = 2 if "perplexity" in view["y"][0] else 4
            with_figures = [arm for arm, row in means.items() if {*row.values()} - {arm, "n/a"}]
            assert [curve["name"] for curve in view["curves"]] == with_figures
            for curve in view["curves"]:
                row = {str(int(x)): mean_cell([y], ends, digits=digits) for x, y, ends, _ in curve["mean"]}
                assert {k: v for k, v in means[curve["name"]].items() if v != "n/a"} == {"arm": curve["name"], **row}
                pairs = [(x, {"difference": y, "interval": ends, "seeds": n}) for x, y, ends, n in curve["less"]]
                row = {str(int(x)): difference_cell(found) for x, found in pairs}
                wanted = {k: v for k, v in less.get(curve["name"], {}).items() if v not in ("n/a", curve["name"])}
                assert wanted == row
                compared += len(row)
        if view["title"] == "Validation loss":
            for curve in view["curves"]:
                *_, (_, y, ends, n) = curve["mean"]
                row = made[titled(view["setting"], "training")][curve["name"]]
                assert (row["validation loss"], row["seeds"]) == (mean_cell([y], ends), str(n))
    assert compared >= 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two studies: `odd`, whose arms have names that would end a script, and `task`."""
    folder = tmp_path_factory.mktemp("studies")
    arms = {EVIL: {"pos": "rope"}, "alibi": {"pos": "alibi"}, "none": {"pos": "none"}}
    path = write_grid(folder / "grid", eval={"far": {"lengths": ["1x", "2x"]}}, question="Which <b>one?</b>")

    def rows(run):
        level = {"rope": 1.0, "alibi": 0.9, "none": 1.2}[run.config.pos] + run.seed / 100
        return [report_row([10 * level, 20 * level], n, f"{n}") for n in (16, 32)]

    study_of(folder / "odd", path, dict.fromkeys(arms, [1.0, 1.1]), rows=rows, arms=arms)
    made = dict.fromkeys(("rope", "alibi"), [1.0, 1.1])
    answers = {"answers": {"protocol": "task"}}
    right = {"rope": [4, 4, 4, 4, 3], "alibi": [4, 4, 0, 0, 0]}
    task = lambda run: [task_row(right[run.arm][: 5 - run.seed] + [4] * run.seed)]  # noqa: E731
    study_of(folder / "task", path, made, rows=task, eval=answers)
    (folder / "theory").mkdir()  # no study
    return folder


@pytest.fixture(scope="module")
def page(folder):
    pytest.importorskip("plotly", reason="needs plotly, of requirements-dev.txt")
    main([str(folder), "--html", str(folder / "page.html")])
    return folder / "page.html"


def test_equal_results_give_equal_bytes_that_need_no_network(folder, page, tmp_path):
    text = page.read_text()
    assert write_page(tmp_path / "again.html", [folder / "odd", folder / "task"]) == 2
    assert (tmp_path / "again.html").read_text() == text
    assert EVIL not in text and text.count("</script>") == 2
    assert not re.search("<(script|link|img)[^>]+(src|href)=", text)
    studies = json.loads(re.search("const STUDIES = (.*?), form", text)[1])
    assert [study["name"] for study in studies] == ["odd", "task"]
    assert studies[0]["views"][0]["curves"][0]["name"] == EVIL
    (task,) = studies[1]["views"]
    ((_, mean, ends, seeds),) = task["curves"][1]["mean"]
    answers = [{"accuracy": value} for value in (0.6, 0.8)]
    assert seeds == 2 and f"{mean:.1%} [{ends[0]:.1%}, {ends[1]:.1%}]" == accuracy_cell(answers)


def test_what_is_no_page_is_not_overwritten(page, tmp_path):
    before = page.read_bytes()
    main([str(page.parent / "task"), "--html", str(page)])
    assert page.read_bytes() != before
    page.write_bytes(before)
    (tmp_path / "mine.html").write_text("<!doctype html><p>mine")
    for out in (tmp_path / "mine.html", tmp_path, page.parent / "odd" / "grid.yaml"):
        with pytest.raises(SystemExit, match="is no page that --html made"):
            main([str(page.parent), "--html", str(out)])
    assert (tmp_path / "mine.html").read_text() == "<!doctype html><p>mine"
    with pytest.raises(SystemExit, match="no study with runs that are done"):
        main([str(tmp_path), "--html", str(tmp_path / "new.html")])


def test_without_plotly_it_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(SystemExit, match="^error: --html needs plotly: pip install plotly$"):
        main([str(folder), "--html", str(tmp_path / "page.html")])


CLICKS = """<script>
const wait = () => new Promise(done => setTimeout(done, 700)), found = []
const look = () => found.push({
  traces: document.querySelectorAll("#plot .scatterlayer .trace").length,
  points: document.querySelectorAll("#plot .scatterlayer .point").length,
  y: document.querySelector("#plot .ytitle").textContent,
  hover: document.querySelector("#plot").data[1].text[0],
  legend: [...document.querySelectorAll("#plot .legendtext")].map(text => text.textContent),
})
const press = thing => { for (const kind of ["mousedown", "mouseup", "click"])
  thing.dispatchEvent(new MouseEvent(kind, {bubbles: true, cancelable: true, view: window})) }
addEventListener("load", async () => {
  await wait(); look()
  press([...document.querySelectorAll("#plot .legendtoggle")].pop()); await wait(); look()
  document.querySelector("[name=less]").click(); await wait(); look()
  document.querySelector("[name=hide]").click(); await wait(); look()
  found.push(location.hash)
  location.hash = "study=task"; await wait(); look()
  document.title = JSON.stringify(found)
})
</script>"""


def title_of(page, folder):
    """The title of a page after a browser has run its scripts."""
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    flags += " --disable-component-update --virtual-time-budget=5000 --dump-dom"
    done = subprocess.run([CHROMIUM, *flags.split(), f"--user-data-dir={folder}", page],
        capture_output=True, text=True, timeout=300)  # fmt: skip
    return html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1])


@pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium, such as Debian's package chromium")
def test_a_click_changes_what_is_drawn(page, tmp_path):
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.read_text() + CLICKS)
    first, fewer, less, shorter, fragment, task = json.loads(title_of(clicked.as_uri(), tmp_path / "profile"))
    assert (first["traces"], first["points"], first["y"]) == (3, 6, "nats per token")
    assert first["legend"] == [EVIL, "alibi", "none"]
    assert re.fullmatch(
        r"alibi<br>context length \(tokens\): 16<br>0.9150 \[0.8515, 0.9785\]<br>2 seeds", first["hover"]
    )
    assert (fewer["traces"], fewer["points"]) == (2, 4)  # without the last arm of the legend
    assert (less["points"], less["y"]) == (2, f"nats per token less {EVIL}")  # the baseline has none from itself
    assert shorter["points"] == 1 and "less=on" in fragment and "hide=16" in fragment
    assert (task["traces"], task["y"]) == (2, "exact match")  # by the link alone
