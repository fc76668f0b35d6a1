"""Sweeps: that they resume, report and draw; that the committed ones are finished; the demo's picture and sentence."""

import itertools
import json
import shutil

import pytest
import torch
from small_runs import ROOT, cifar_files, refusal, store, sweep_rows, without_processes

from experiments import demo, optima, sweep, transfer
from experiments.sweep import ALONE, METHODS, Run
from experiments.training import device_name

SMALL = ["--widths", "8", "16", "--lrs", "0.1", "0.2", "--rhos", "0.1", "0.3", "--seeds", "1", "--slice-seeds", "2"]
RESULTS = ROOT / "experiments" / "results"


def keyed(rows):
    return {tuple(row[k] for k in Run._fields): row["best"] for row in rows}


def interrupted_after(count):
    """sweep.train, with Ctrl-C after so many runs."""
    train, runs = sweep.train, iter(range(count))

    def train_some(*args):
        if next(runs, None) is None:
            raise KeyboardInterrupt
        return train(*args)

    return train_some


def test_a_sweep_resumes_and_reports(tmp_path, capsys, monkeypatch):
    """Interrupted by Ctrl-C, and once more in the middle of a line: what is missing is trained, nothing twice."""
    without_processes(monkeypatch)
    monkeypatch.setattr(sweep, "data_on", few_digits)
    command = ["--data", "noisy-digits", *SMALL, "--epochs", "1", "--out", str(tmp_path)]
    path = tmp_path / "transfer_noisy-digits.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "train", interrupted_after(2))
        assert transfer.main(command) == 130
    first = sweep_rows(path)
    assert len(first) == 2 and "interrupted; the same command goes on" in capsys.readouterr().err
    assert transfer.main(command) == 0
    printed = capsys.readouterr().out
    lines, rows = path.read_text().splitlines(), sweep_rows(path)
    assert rows[:2] == first
    ran = [tuple(row[k] for k in ("method", "width", "lr", "rho", "seed")) for row in rows]
    assert len(ran) == len(set(ran))
    grid = itertools.product(METHODS, (8, 16), (0.1, 0.2), (0.1, 0.3), (0,))
    assert {*grid, *itertools.product(ALONE.values(), (8, 16), (0.1, 0.2), (0.0,), (0,))} <= set(ran)
    for method, width in itertools.product(METHODS, (8, 16)):  # the slice: one lr, all seeds, finer steps
        cuts = [itertools.product([method], [width], [lr], (0.1, 0.1778, 0.3), (0, 1)) for lr in (0.1, 0.2)]
        assert any(set(cut) <= set(ran) for cut in cuts)
    assert all(method in printed for method in METHODS) and path.with_suffix(".png").exists()
    summary = json.loads(path.with_suffix(".json").read_text())
    assert [(r["method"], r["width"]) for r in summary["rows"]] == [*itertools.product(METHODS, (8, 16))]
    assert all(r["regret"] == 0 if r["width"] == 8 else r["regret"] >= 0 for r in summary["rows"])
    assert summary["device"] == [device_name("cpu")] and summary["date"] == sorted({row["date"] for row in rows})
    path.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:40])
    assert transfer.main(command) == 0
    assert capsys.readouterr().out == printed
    again = path.read_text().splitlines()
    assert again[:-3] == lines[:-3] and keyed(sweep_rows(path)) == keyed(rows), "a run is reproducible"


@pytest.mark.parametrize("damaged", [b'{"data": ', b"[1]", b"{}", b"\xff", b"", "row without an accuracy"])
def test_a_damaged_line_is_named_and_kept(tmp_path, capsys, monkeypatch, damaged):
    """Unlike a last line that was cut off, which an interruption explains."""
    monkeypatch.setattr(sweep, "worker_processes", None)
    whole = (RESULTS / "demo.jsonl").read_bytes().splitlines(True)
    if isinstance(damaged, str):
        damaged = whole[2].replace(b'"last"', b'"first"').strip()
    for main, name in ((demo.main, "demo"), (transfer.main, "transfer_mnist1d")):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(content := b"".join([*whole[:2], damaged + b"\n", *whole[3:], b'{"cut": "o']))
        said = refusal(capsys, main, "--out", str(tmp_path))
        assert said.startswith(f"error: cannot read line 3 of {path} (") and said.count("\n") == 1
        assert "remove this line" in said and path.read_bytes() == content
    path.write_bytes(b"".join([*whole, b'{"cut": "o']))
    assert len(sweep.read_runs(path)) == len(whole) and path.read_bytes() == b"".join(whole)


def test_the_committed_runs_are_finished(tmp_path, monkeypatch, capsys):
    """Nothing is trained, and the tables are the committed ones."""
    monkeypatch.setattr(sweep, "worker_processes", None)
    for path in (RESULTS / "demo.jsonl", *RESULTS.glob("transfer_*.jsonl")):
        shutil.copy(path, tmp_path)
    for network in ("mlp", "resnet", "vit"):
        name = "transfer_mnist1d" if network == "mlp" else f"transfer_{network}_noisy-digits"
        assert transfer.main(["--network", network, "--out", str(tmp_path)]) == 0
        fresh, committed = (json.loads((p / f"{name}.json").read_text()) for p in (tmp_path, RESULTS))
        assert fresh["rows"] == committed["rows"]
    assert demo.main(["--methods", "SP-naive", "muP-naive", "muP²", "--out", str(tmp_path)]) == 0
    assert "plain SAM moves by a factor of 3.2 (0.18 to 0.56)" in capsys.readouterr().out
    assert all(path.read_bytes() == (RESULTS / path.name).read_bytes() for path in tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    "network, widths", [("resnet", ["8", "16"]), ("vit", ["16", "32"]), ("mlp-adamw", ["32", "64"])]
)
def test_sweep_of_networks(tmp_path, capsys, monkeypatch, network, widths):
    """At the base width plain SAM and muP² are the same runs. Without a slice, the grid is all that is trained."""
    without_processes(monkeypatch)
    monkeypatch.setattr(sweep, "data_on", few_digits)
    command = ["--network", network, "--widths", *widths, "--lrs", "0.02", "--rhos", "0.1", "--epochs", "1"]
    assert transfer.main([*command, "--seeds", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"| muP² | {widths[1]} |" in printed and printed.count("(1) |") == 4
    rows = sweep_rows(tmp_path / f"transfer_{network}_noisy-digits.jsonl")
    assert {row["network"] for row in rows} == {network} and len(rows) == 2 * 4
    last = {(row["method"], row["width"]): row["last"] for row in rows}
    narrow, wide = map(int, widths)
    assert last["muP²", narrow] == last["SP-naive", narrow] != last["muP²", wide] != last["SP-naive", wide]
    assert last["muP²", wide] != last["muP-SGD", wide]


def few_digits(name, root, device):
    (x, y), test = sweep.data.load(name, root)
    return (x[:256], y[:256]), test


def test_sweep_on_cifar10_and_errors(tmp_path, capsys, monkeypatch):
    without_processes(monkeypatch)
    store(tmp_path, "cifar10", "python", cifar_files("cifar10", "python"))
    command = ["--data", "cifar10", "--out", str(tmp_path), "--epochs", "1", "--methods", "muP²", *SMALL]
    assert transfer.main([*command, "--root", str(tmp_path)]) == 0
    assert "| muP² | 16 |" in capsys.readouterr().out
    assert "error: no CIFAR-10 in" in refusal(capsys, transfer.main, *command, "--root", str(tmp_path / "nowhere"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU" in refusal(capsys, transfer.main, "--device", "cuda", "--out", str(tmp_path))
    assert "--graph takes --device cuda" in refusal(capsys, transfer.main, "--graph")
    assert "take images" in refusal(capsys, transfer.main, "--network", "vit", "--data", "mnist1d")


def test_optima_of_known_runs():
    """Which (lr, rho) is best, what the narrow one's costs, and which radius is the largest stable one."""
    flags = "--methods muP² --widths 8 16 --lrs 0.1 --rhos 0.1 0.3 1 --slice-seeds 0"
    accuracies = {8: {0.0: 60, 0.1: 70, 0.3: 65, 1.0: 20}, 16: {0.0: 62, 0.1: 71, 0.3: 75, 1.0: 58}}
    runs = {}
    for width, rho, seed in itertools.product(accuracies, accuracies[8], (0, 1)):
        run = Run("mnist1d", "muP²" if rho else "muP-SGD", width, 0.1, rho, seed, 60)
        runs[run] = {"best": accuracies[width][rho] + seed}
    narrow, wide = optima.Optima(runs, transfer.parse_args(flags.split())).table()
    assert (narrow["rho"], wide["rho"], wide["regret"], wide["gain"], wide["sgd"]) == (0.1, 0.3, 4.0, 13.0, 62.5)
    assert (narrow["largest_stable_rho"], wide["largest_stable_rho"]) == (0.3, 1.0)
    assert (narrow["rho_edge"], wide["rho_edge"], wide["seeds"]) == (False, True, 2)
    assert "| muP² | 16 | 0.1 | 0.3 | 75.5 ± 0.7 (2) | 62.5 ± 0.7 | +13.0 | 4.0 | ≥ 1 |" in optima.format_table([wide])
    said = optima.what_to_look_at([narrow, wide], "SGD")
    assert "(0.1, 0.1) at width 8 and (0.1, 0.3) at width 16, where the former costs 4.0 points" in said


def test_the_demo(tmp_path, capsys, monkeypatch):
    without_processes(monkeypatch)
    monkeypatch.setattr(sweep, "data_on", few_digits)
    command = ["--widths", "32", "64", "--rhos", "0.1", "0.3", "--seeds", "2", "--out", str(tmp_path)]
    assert demo.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("From width 32 to 64,") and printed.count("\n") == 2 and "demo.png" in printed
    rows = sweep_rows(tmp_path / "demo.jsonl")
    assert len(rows) == 2 * 2 * 2 * 2 and (tmp_path / "demo.png").exists()
    monkeypatch.setattr(sweep, "train", None)
    assert demo.main(command) == 0 and capsys.readouterr().out == printed  # no run is trained again


def test_the_demos_sentence():
    narrow = {0.1: [93.0, 94.0], 0.3: [90.0, 90.0]}
    plain = demo.Seen("plain SAM", {32: narrow, 512: {0.1: [85.0, 87.0], 0.3: [95.0, 95.0]}})
    mup2 = demo.Seen("muP²", {32: narrow, 512: {0.1: [97.0, 98.0], 0.3: [96.0, 96.0]}})
    assert demo.sentence(plain, mup2) == (
        "From width 32 to 512, at width 32's learning rate, the best rho of plain SAM moves by a factor of 3.0 (0.1 to "
        "0.3), and that of muP² stays at 0.1; at width 512, keeping width 32's best rho costs plain SAM 9.0 points of "
        "accuracy (it reaches 86.0 %) and muP² 0.0 points (97.5 %)."
    )
