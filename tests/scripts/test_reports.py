"""Reports of eval.py as a CSV file, and drawn."""

import csv
import importlib
import json
import sys

import pytest
from evaluating import data, rows, runs  # noqa: F401

from eval import main
from scripts.report import save_csv


@pytest.mark.slow
def test_reports_become_a_csv_and_a_figure(runs, tmp_path, monkeypatch):  # noqa: F811
    for pos in ("rope1", "none1"):
        given = ["--run", str(runs / pos), "--lengths", "32", "64", "--protocol", "same-targets", "per-position"]
        main([*given, "--json", str(tmp_path / f"{pos}.json")])
    reports = [str(tmp_path / f"{pos}.json") for pos in ("rope1", "none1")]
    assert "| same-targets | 64 |" in (tmp_path / "rope1.md").read_text()

    monkeypatch.chdir(tmp_path)

    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        importlib.import_module(name).main()

    script("report", "--csv", "all.csv", *reports)
    with open(tmp_path / "all.csv") as file:
        lines = list(csv.DictReader(file))
    report = json.loads((tmp_path / "rope1.json").read_text())
    assert len(lines) == 8 and {line["pos"] for line in lines} == {"rope", "none"}
    key = ("rope", "same-targets", "64")
    (cell,) = [line for line in lines if (line["pos"], line["protocol"], line["length"]) == key]
    assert float(cell["nats_per_token"]) == rows(report)[64]["nats_per_token"]
    assert (cell["split"], cell["data"]) == ("val", report["data_dir"])
    assert "config.n_embd" not in cell and "config.pos" in cell  # what all runs share is left out
    script("plot", *reports, "--out", "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    for name, option in (("report", "--csv"), ("plot", "--out")):
        with pytest.raises(SystemExit, match="^error: "):
            script(name, str(tmp_path / "other.json"), option, "x.png")


@pytest.mark.parametrize("order", ["a report first", "a missing report"])
def test_a_csv_overwrites_nothing_where_it_cannot_be_made(tmp_path, order):
    report, table = tmp_path / "a.json", tmp_path / "all.csv"
    report.write_text("{}")
    table.write_text("before")
    out, paths = (report, [table]) if order == "a report first" else (table, [report, tmp_path / "gone.json"])
    with pytest.raises((ValueError, OSError)):
        save_csv(str(out), paths)
    assert report.read_text() == "{}" and table.read_text() == "before"
