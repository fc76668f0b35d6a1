"""Sweeps: that they resume, report and draw; that the committed ones are finished; the demo's picture and sentence."""

import itertools
import json
import shutil

import pytest
import torch
from small_runs import ROOT, refusal, store_cifar, sweep_rows, without_processes

from experiments import demo, sweep, transfer
from experiments.sweep import Place, Run
from experiments.training import device_name

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


def test_a_sweep_resumes(tmp_path, monkeypatch):
    """Interrupted by Ctrl-C, and once more in the middle of a line: what is missing is trained, nothing twice."""
    without_processes(monkeypatch)
    monkeypatch.setattr(sweep, "data_on", few_digits)
    points = itertools.product(("SP-naive", "muP²"), (8, 16), (0.1,), (0.1, 0.3), (0, 1))
    runs = [Run("noisy-digits", *point, 1) for point in points]
    path = tmp_path / "runs.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "train", interrupted_after(2))
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(runs, path, Place(), "interrupted")
    first = sweep_rows(path)
    assert len(first) == 2
    found = sweep.sweep(runs, path, Place(), "resumed")
    lines, rows = path.read_text().splitlines(), sweep_rows(path)
    assert rows[:2] == first and len(rows) == len(runs) and {*found} == {*runs}
    assert {row["device"] for row in rows} == {device_name("cpu")}
    path.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:40])
    assert sweep.sweep(runs, path, Place(), "resumed").keys() == found.keys()
    again = path.read_text().splitlines()
    assert again[:-3] == lines[:-3] and keyed(sweep_rows(path)) == keyed(rows), "a run is reproducible"


def test_only_the_epoch_that_counts_is_tested(monkeypatch):
    """The accuracy is that of the last epoch, also in a network of whose epochs the best one would be another."""
    monkeypatch.setattr(sweep, "data_on", few_digits)
    run = Run("noisy-digits", "SP-SGD", 32, 1.0, 0.0, 0, 3)
    all_tested = sweep.train(run, Place())
    monkeypatch.setitem(sweep.NETWORKS, "mlp", sweep.NETWORKS["mlp"]._replace(score="last"))
    evaluated, evaluate = [], sweep.Training.evaluate
    monkeypatch.setattr(sweep.Training, "evaluate", lambda *args: evaluated.append(1) or evaluate(*args))
    last_tested = sweep.train(run, Place())
    assert len(evaluated) == 1 and all_tested["finished"] == last_tested["finished"] == 3
    assert last_tested["last"] == last_tested["best"] == all_tested["last"] < all_tested["best"]


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
    for name in transfer.SETTINGS:  # a file of another name has other settings
        path = RESULTS / f"transfer_{name}.json"
        committed = json.loads(path.read_text())
        widths, seeds = committed["setting"]["widths"], len(committed["rows"][0]["accuracies"])
        flags = ["--widths", *map(str, widths), "--seeds", f"{seeds}", "--out", str(tmp_path)]
        assert transfer.main(["--settings", name, *flags]) == 0
        assert json.loads((tmp_path / path.name).read_text()) == committed
    assert demo.main(["--methods", "SP-naive", "muP-naive", "muP²", "--out", str(tmp_path)]) == 0
    assert "plain SAM moves by a factor of 3.2 (0.1 to 0.32)" in capsys.readouterr().out
    assert all(path.read_bytes() == (RESULTS / path.name).read_bytes() for path in tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("network, narrow", [("resnet", 8), ("vit", 16), ("mlp-adamw", 64)])
def test_sweep_of_networks(tmp_path, monkeypatch, network, narrow):
    """At the base width plain SAM and muP² are the same. What counts is the last epoch's accuracy."""
    without_processes(monkeypatch)
    monkeypatch.setattr(sweep, "data_on", few_digits)
    points = [*itertools.product(("SP-naive", "muP²"), (narrow, 2 * narrow), (0.02,), (0.1,), (0,))]
    points += [("muP-SGD", 2 * narrow, 0.02, 0.0, 0)]
    sweep.sweep([Run("noisy-digits", *point, 3, network) for point in points], tmp_path / "runs.jsonl", Place(), "")
    last = {(row["method"], row["width"]): row["last"] for row in sweep_rows(tmp_path / "runs.jsonl")}
    wide = 2 * narrow
    assert last["muP²", narrow] == last["SP-naive", narrow] != last["muP²", wide] != last["SP-naive", wide]
    assert last["muP²", wide] != last["muP-SGD", wide]


def few_digits(name, root, device):
    (x, y), test = sweep.data.load(name, root)
    return (x[:256], y[:256]), test


def test_transfer_on_cifar10_and_errors(tmp_path, capsys, monkeypatch):
    without_processes(monkeypatch)
    store_cifar(monkeypatch, tmp_path, "cifar10")
    command = ["--data", "cifar10", "--out", str(tmp_path), "--epochs", "1", "--methods", "muP²"]
    monkeypatch.setattr(sweep, "train", interrupted_after(2))
    assert transfer.main([*command, "--widths", "8", "--root", str(tmp_path)]) == 130
    rows = sweep_rows(tmp_path / "transfer_mnist1d_cifar10.jsonl")
    assert [(row["data"], row["width"], row["finished"]) for row in rows] == [("cifar10", 8, 1)] * 2
    assert "error: no cifar10 in" in refusal(capsys, transfer.main, *command, "--root", str(tmp_path / "nowhere"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU" in refusal(capsys, transfer.main, "--device", "cuda", "--out", str(tmp_path))
    assert "--graph takes --device cuda" in refusal(capsys, transfer.main, "--graph")
    assert "argument --seeds" in refusal(capsys, transfer.main, "--seeds", "1")
    assert "one setting" in refusal(capsys, transfer.main, "--settings", "fashion", "vit", "--name", "x")


def test_the_demo(tmp_path, capsys, monkeypatch):
    without_processes(monkeypatch)
    monkeypatch.setattr(sweep, "data_on", few_digits)
    command = ["--widths", "64", "128", "--rhos", "0.1", "0.3", "--seeds", "2", "--out", str(tmp_path)]
    assert demo.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("From width 64 to 128,") and printed.count("\n") == 2 and "demo.png" in printed
    rows = sweep_rows(tmp_path / "demo.jsonl")
    assert len(rows) == 2 * 2 * 2 * 2 and (tmp_path / "demo.png").exists()


def test_the_demos_sentence():
    narrow = {0.1: [93.0, 94.0], 0.3: [90.0, 90.0]}
    plain = demo.Seen("plain SAM", {32: narrow, 512: {0.1: [85.0, 87.0], 0.3: [95.0, 95.0]}})
    mup2 = demo.Seen("muP²", {32: narrow, 512: {0.1: [97.0, 98.0], 0.3: [96.0, 96.0]}})
    assert demo.sentence(plain, mup2) == (
        "From width 32 to 512, at width 32's learning rate, the best rho of plain SAM moves by a factor of 3.0 (0.1 to "
        "0.3), and that of muP² stays at 0.1; at width 512, keeping width 32's best rho costs plain SAM 9.0 points of "
        "accuracy (it reaches 86.0 %) and muP² 0.0 points (97.5 %)."
    )
