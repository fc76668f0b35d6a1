"""Slopes measured at small widths against the predicted exponents, and the experiment that does so at larger ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_runs import without_processes

from experiments import exponents as experiment
from experiments.exponents import QUANTITIES, Row, measure, slopes

ROWS = [
    Row("D.2", "naive", "mup", "naive"),
    Row("D.2", "muP²", "mup", "effective"),
    Row("D.1", "ntp", "ntp", "global"),
    Row("D.1", "sp", "sp", "naive"),
    Row("1", "elementwise", "mup", "effective", "elementwise"),
    Row("1", "layerwise", "mup", "effective", "layerwise"),
    Row("1", "SAM-ON", "mup", "effective", "sam", "norm"),
    Row("A1", "decoupled", "mup", "effective", "sam", "all", "decoupled", 32),
    Row("A1", "decoupled-elementwise", "mup", "effective", "elementwise", "all", "decoupled", 32),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_measured_slopes(row):
    """The experiment measures all rows at larger widths. Small widths leave finite-size effects."""
    widths = [64, 128, 256, 512]
    values = [[measure(row, width, seed) for seed in range(3)] for width in widths]
    for quantity in QUANTITIES[: 1 if row.perturb == "norm" else 3]:
        slope = slopes(widths, np.array([[v[quantity] for v in by_seed] for by_seed in values]))
        predicted = getattr(row.prediction(), quantity)
        perturbed = ~np.isnan(slope)
        assert np.abs(slope - predicted)[perturbed].max() < 0.15, (quantity, slope, predicted)


def test_rows_are_those_of_the_tables():
    rows = experiment.rows()
    assert [sum(row.table == table for row in rows) for table in ("D.1", "D.2", "F.1", "1", "A1")] == [4, 5, 21, 12, 4]
    assert len(set(rows)) == len({(row.table, row.name) for row in rows}) == len(rows)


def test_the_command_writes_table_and_picture(tmp_path, monkeypatch, capsys):
    few = [row for row in experiment.rows() if row.table in ("D.1", "D.2") or "muP²" in row.name]
    monkeypatch.setattr(experiment, "rows", lambda: few)
    without_processes(monkeypatch)
    arguments = ["--widths", "16", "32", "--seeds", "1", "--jobs", "1", "--tolerance", "0", "--out", str(tmp_path)]
    assert experiment.main(arguments) == 1, "no measurement is exact"
    printed = capsys.readouterr().out
    assert printed.count(" <--") == len(few) and f"largest deviation of {len(few)} rows" in printed
    result = json.loads((tmp_path / "exponents.json").read_text())
    assert (result["widths"], result["seeds"], len(result["rows"])) == ([16, 32], 1, len(few))
    row = next(r for r in result["rows"] if r["name"] == "SAM-ON, muP²")
    assert row["exponents"]["perturbed"] == ["input"] and row["predicted"]["effect"] == [0, None, None]
    assert row["measured"]["effect"][1:] == [None, None] and len(row["values"]["update"][0]) == 2
    assert (tmp_path / "exponents.png").read_bytes()[:4] == b"\x89PNG"


def test_the_committed_results_are_those_of_todays_theory():
    result = json.loads((Path(experiment.__file__).parent / "results" / "exponents.json").read_text())
    rows = experiment.rows()
    assert result["worst"] <= 0.1 and result["seeds"] >= 6 and max(result["widths"]) >= 2048
    assert [(row["table"], row["name"]) for row in result["rows"]] == [(row.table, row.name) for row in rows]
    for saved, row in zip(result["rows"], rows):
        values = {q: np.array(saved["values"][q], dtype=float).T[:, None] for q in QUANTITIES}  # (width, seed, role)
        again = json.loads(json.dumps(experiment.compare(row, result["widths"], values)))
        assert (saved["exponents"], saved["predicted"]) == (again["exponents"], again["predicted"])
        assert saved["deviation"] == pytest.approx(again["deviation"], abs=2e-4), "it follows from the values"
