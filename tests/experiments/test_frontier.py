"""The cheaper ways of SAM: how many passes they take, the search for their best points, and what is reported."""

import json
import math
import shutil

import pytest
import torch
from small_runs import ROOT, sweep_rows, without_processes
from test_sweep import few_digits, interrupted_after

import mup2_fused as mup2
from experiments import frontier, frontier_transfer, sweep
from experiments.climb import Point
from experiments.frontier import SETTINGS
from experiments.frontier_report import BASE, LONGER, format_summary, format_table, what_to_see
from experiments.sweep import WAYS, Place, Run

RESULTS = ROOT / "experiments" / "results"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    without_processes(monkeypatch)
    for module in (sweep, frontier):
        monkeypatch.setattr(module, "data_on", few_digits)


@pytest.mark.parametrize("way", [None, *WAYS])
def test_passes_of_a_way(monkeypatch, way):
    """Samples that go forward, and backward, in training; and from when on the weights are perturbed."""
    seen, forward = [], mup2.MLP.forward

    def counted(model, x):
        f = forward(model, x)
        if model.training:
            seen.append([len(x), 0])
            f.register_hook(lambda g, entry=seen[-1]: entry.__setitem__(1, len(g)))
        return f

    monkeypatch.setattr(mup2.MLP, "forward", counted)
    rho = 0.0 if way is None else 0.1
    sweep.train(Run("mnist1d", "muP²", 8, 0.01, rho, 0, 8, "mlp-momentum", way or "sam"), Place())
    forward, backward = map(sum, zip(*seen))
    assert forward == backward == 8 * 256 * (1.0 if way is None else WAYS[way].passes)
    sizes, late = [size for size, _ in seen], way and WAYS[way].late
    if way and late < 1:
        steps = round(8 * 4 * (1 - late))
        assert sizes == [64] * len(sizes) and len(seen) == steps + 2 * (32 - steps)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "sam"])
def test_a_way_is_not_another_one(way):
    runs = [
        Run("mnist1d", "muP²", 8, 0.02, rho, 0, 8, "mlp-momentum", w) for rho, w in ((0, way), (0.3, "sam"), (0.3, way))
    ]
    losses = []
    for run in runs:
        train, _ = few_digits("mnist1d", None, "cpu")
        _, training = sweep.trainings(run, train, Place())
        batches = [tuple(t[i : i + 64] for t in train) for i in range(0, 256, 64)]
        losses.append([training.train_epoch(batches).item() for _ in range(3)])
    if WAYS[way].late == 1:
        assert len({tuple(found) for found in losses}) == 3
    else:
        assert losses[1] == losses[2] != losses[0]


def test_a_frontier_resumes_and_reports(tmp_path, capsys, monkeypatch):
    """Interrupted once: nothing is trained twice. Best points have worse neighbours, and seeds of their own."""
    command = ["--settings", "mnist1d-momentum", "--ways", "interval-4", "momentum", "--epochs", "2", "--width", "8"]
    command += ["--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(frontier, "TIMED_ROUNDS", {"time": 2, "wide_time": 1})
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "train", interrupted_after(9))
        assert frontier.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert frontier.main(command) == 0
    printed, path = capsys.readouterr().out, tmp_path / "frontier_mnist1d-momentum.jsonl"
    rows = sweep_rows(path)
    runs = {Run(**{key: row[key] for key in Run._fields}): row["best"] for row in rows}
    assert len(runs) == len(rows)
    found = json.loads(path.with_suffix(".json").read_text())
    assert {row["way"] for row in found["rows"]} == {BASE, LONGER, "sam", "interval-4", "momentum"}
    for row in found["rows"]:
        alone, epochs = row["way"] in (BASE, LONGER), 4 if row["way"] == LONGER else 2
        mine = {
            run: accuracy
            for run, accuracy in runs.items()
            if run.epochs == epochs and (run.rho == 0 if alone else run.rho and run.way == row["way"])
        }
        scores = {}
        for run, accuracy in mine.items():
            scores.setdefault((run.lr, run.rho), {})[run.seed] = accuracy
        best = scores.pop((row["lr"], row["rho"]))
        assert {*best} == {0, 1, 2, 3} and row["accuracy"] == pytest.approx((best[2] + best[3]) / 2)
        assert row["error"] == pytest.approx(abs(best[2] - best[3]) / 2) and row["seeds"] == 2
        factors = {(2, 1), (0.5, 1)} | (set() if alone else {(1, 2**0.5), (1, 0.5**0.5)})
        around = [
            values
            for (lr, rho), values in scores.items()
            if any(
                math.isclose(lr, row["lr"] * a, rel_tol=1e-3) and math.isclose(rho, row["rho"] * b, rel_tol=1e-3)
                for a, b in factors
            )
        ]
        assert len(around) == len(factors) and all(v[0] + v[1] <= best[0] + best[1] for v in around)
        assert row["time"] > 0 and f"| {row['passes']:.2f} | {row['time']:.2f} | {row['wide_time']:.2f} |" in printed
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_frontier_of_known_runs(tmp_path):
    """What is kept of SAM's gain; that points of the grid are what they say; and that plain SGD has no momentum."""
    args = frontier.parse_args(["--ways", "interval-4", "momentum", "--seeds", "2", "--out", str(tmp_path)])
    plain, other = (frontier.Frontier(name, args) for name in ("mnist1d", "mnist1d-momentum"))
    assert plain.ways == ["interval-4"] and other.ways == ["interval-4", "momentum"]
    run = plain.run("interval-4", Point(-1, 3), 5)
    assert (run.lr, run.rho, run.seed, run.epochs, run.way) == (0.2, 1.131, 5, 60, "interval-4")
    assert plain.run(LONGER, Point(0, 3), 5) == Run("mnist1d", "muP-SGD", 256, 0.4, 0.0, 5, 120)
    points = dict.fromkeys((BASE, "sam", "interval-4"), Point(0, 0))
    for way, scores in {BASE: (60, 62), "sam": (70, 72), "interval-4": (68, 69)}.items():
        plain.runs |= {plain.run(way, Point(0, 0), 2 + i): {"best": score} for i, score in enumerate(scores)}
    rows = plain.rows(points)
    assert [row["kept"] for row in rows] == [0, 1, 0.75] and [row["error"] for row in rows] == [1, 1, 0.5]
    timed = [row | {"time": 1.3, "wide_time": 1.26} for row in rows]
    table = format_table(timed, 1024)
    assert "| every 4th step | 1.25 | 1.30 | 1.26 | 0.4 | 0.4 | 68.50 ± 0.50 (2) | 75 ± 9 % |" in table
    assert table.splitlines()[2].startswith("| without SAM | 1.00 |")
    summary = format_summary({"one": timed, "two": timed[:2]}).splitlines()
    assert summary[2] == "| without SAM | 1.00 | 1.26: 61.0 % accuracy | 1.26: 61.0 % accuracy |"
    assert summary[3] == "| every 4th step | 1.25 | 1.26: 75 ± 9 % |  |"
    gained = "SAM gains 10.0 points for two passes per step"
    assert what_to_see(rows) == f"{gained}, and no way with fewer passes keeps 80 % of this."
    cheap = rows[2] | {"kept": 0.8, "passes": 1.2}
    assert what_to_see([*rows, cheap]) == (
        f"{gained}; the fewest passes that keep at least 80 % of this are 1.20: every 4th step keeps 80 ± 9 %."
    )


def test_a_radius_transfers_or_not(tmp_path, capsys, monkeypatch):
    """Each width's best rho has worse neighbours; regret is the loss, on other seeds, by the narrowest width's."""
    found = {"interval-4": Point(-1, 0), "momentum": Point(0, 1)}
    monkeypatch.setattr(frontier_transfer, "found_points", lambda setting, ways: {way: found[way] for way in ways})
    command = ["--ways", "interval-4", "momentum", "--epochs", "1", "--widths", "16", "8", "--seeds", "2"]
    command += ["--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "train", interrupted_after(9))
        assert frontier_transfer.main(command) == 130
    assert frontier_transfer.main(command) == 0
    printed, path = capsys.readouterr().out, tmp_path / "frontier_transfer_mnist1d-momentum.jsonl"
    runs = {Run(**{key: row[key] for key in Run._fields}): row["best"] for row in sweep_rows(path)}
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert len(rows) == 8 and {run.lr for run in runs} == {0.02, 0.04}
    for row in rows:
        mine = {
            r: a for r, a in runs.items() if (r.way, r.method, r.width) == (row["way"], row["method"], row["width"])
        }
        of = lambda rho, seeds: sum(a for r, a in mine.items() if r.rho == rho and r.seed in seeds)
        if row["width"] == 8:
            seeds = frontier.DECIDING
            near = {r.rho for r in mine if r.seed == seeds[-1]}
            assert len(near) == 5 and row["rho"] in near
        else:
            seeds = (0, 1)
            near = {r.rho for r in mine if math.isclose(abs(math.log2(r.rho / row["rho"])), 0.5, abs_tol=1e-3)}
            assert len(near) == 2
        assert all(of(rho, seeds) <= of(row["rho"], seeds) for rho in near)
        assert row["accuracy"] == pytest.approx(of(row["rho"], (2, 3)) / 2)
        narrow = next(r for r in rows if (r["way"], r["method"], r["width"]) == (row["way"], row["method"], 8))
        assert row["kept_rho"] == narrow["rho"]
        assert row["regret"] == pytest.approx((of(row["rho"], (2, 3)) - of(narrow["rho"], (2, 3))) / 2)
    assert "| every 4th step | muP² | 16 |" in printed and "± " in printed


def test_the_ways_begin_where_the_frontier_ended():
    """At the points of the committed frontier, whose learning rates stay."""
    args = frontier_transfer.parse_args([])
    points = frontier_transfer.found_points(args.setting, args.ways)
    rows = {row["way"]: row for row in json.loads((RESULTS / "frontier_mnist1d-momentum.json").read_text())["rows"]}
    search = frontier_transfer.AtWidth(args, "muP-global", 64)
    for way, point in points.items():
        run = search.run(way, point, 0)
        assert (run.lr, run.rho) == (rows[way]["lr"], rows[way]["rho"])
        assert (run.method, run.width, run.way) == ("muP-global", 64, way)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_in_each_setting(name, tmp_path):
    """Networks get the inputs that they take, and all of their weights are trained."""
    of = frontier.Frontier(name, frontier.parse_args(["--out", str(tmp_path)]))
    assert ("momentum" in of.ways) == (name not in ("mnist1d", "fashion"))
    train, _ = few_digits(of.setting.data, None, "cpu")
    _, training = sweep.trainings(of.run("interval-4-part-4", Point(0, 0), 0), train, of.place)
    before = [p.detach().clone() for p in training.model.parameters()]
    assert math.isfinite(training.train_epoch([tuple(t[:32] for t in train)]))
    assert not any(map(torch.equal, before, training.model.parameters()))


def test_the_committed_transfer_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "worker_processes", None)
    (path,) = RESULTS.glob("frontier_transfer_*.json")
    shutil.copy(path.with_suffix(".jsonl"), tmp_path)
    assert frontier_transfer.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_committed_frontiers_are_finished(tmp_path, monkeypatch, name):
    """Nothing is trained, and the tables are the committed ones."""
    monkeypatch.setattr(sweep, "worker_processes", None)
    path = RESULTS / f"frontier_{name}.json"
    for source in (path, path.with_suffix(".jsonl")):
        shutil.copy(source, tmp_path)
    (tmp_path / path.name).write_text(json.dumps({"times": json.loads(path.read_text())["times"]}))
    assert frontier.main(["--settings", name, "--out", str(tmp_path)]) == 0
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert all((tmp_path / p.name).read_bytes() == p.read_bytes() for p in (path.with_suffix(".jsonl"),))
