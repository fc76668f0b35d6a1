"""The search for learning rate and radius: interrupted, extended, shared by processes."""

import json

import pytest
from small_runs import TINY_RESNET, TINY_VIT, only_folder, refusal, start, use_few_samples, without_processes

from experiments import search

optuna = search.optuna
needs_optuna = pytest.mark.skipif(optuna is None, reason="the search takes Optuna")


def trials_of(out, name="small"):
    journal = optuna.storages.journal.JournalFileBackend(str(out / f"{name}.journal"))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(journal)).trials


@needs_optuna
def test_search(tmp_path, capsys, monkeypatch):
    """Interrupted in its second trial, which goes on with the same lr and rho; then finished, then extended."""
    use_few_samples(monkeypatch)
    trained, train = [], search.train

    def counted(args, images, quiet):
        trained.append((args.lr, args.rho))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(args, images, quiet)

    monkeypatch.setattr(search, "train", counted)
    command = [*TINY_VIT, "--study", "small", "--out", str(tmp_path), "--trials"]
    assert search.main([*command, "3"]) == 130
    assert search.main([*command, "3"]) == 0
    printed = capsys.readouterr().out
    assert len(trained) == 4 and trained[1] == trained[2] and len(set(trained)) == 3
    assert all(2**-10 <= value <= 4 for point in trained for value in point)
    trials = trials_of(tmp_path)
    assert sorted(t.state.name for t in trials) == ["COMPLETE"] * 3 + ["FAIL"]
    trials = [t for t in trials if t.value is not None]
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")]
    by_point = {(r["settings"]["lr"], r["settings"]["rho"]): r["best_test_accuracy"] for r in results}
    assert {(t.params["lr"], t.params["rho"]): t.value for t in trials} == by_point
    best = max(trials, key=lambda t: t.value)
    flags = f"--lr {best.params['lr']:.4g} --rho {best.params['rho']:.4g}"
    assert f"best of 3 trials: {flags}, test accuracy {best.value:.2f} %" in printed
    assert f"python -m experiments.vision {' '.join(TINY_VIT)} --width-multiplier 0.25 {flags}\n" in printed
    assert search.main([*command, "3"]) == 0 and len(trained) == 4  # nothing is missing
    assert search.main([*command, "4"]) == 0 and len(trained) == 5
    refused = refusal(capsys, search.main, *command, "4", "--seed", "1")
    assert "study 'small' searches with other settings (seed)" in refused
    # The same command elsewhere tries the same points.
    assert search.main([*command[:-2], str(tmp_path / "again"), "--trials", "2"]) == 0
    assert trained[-2:] == [trained[0], trained[1]]


@needs_optuna
def test_search_with_two_jobs(tmp_path, monkeypatch, capsys):
    """In place of processes, two workers one after the other."""
    without_processes(monkeypatch)
    use_few_samples(monkeypatch)
    command = [*TINY_VIT, "--study", "small", "--out", str(tmp_path), "--jobs", "2", "--trials"]
    assert search.main([*command, "2"]) == 0
    assert len(trials_of(tmp_path)) == 2 and "best of 2 trials" in capsys.readouterr().out


@needs_optuna
def test_damaged_files_of_a_search(tmp_path, monkeypatch, capsys):
    """The journal of the study, and files of the trial that was interrupted."""
    use_few_samples(monkeypatch)
    command = [*TINY_VIT, "--study", "small", "--out", str(tmp_path), "--trials", "1"]
    assert search.main(command) == 0
    path = tmp_path / "small.journal"
    first, second, *others = (whole := path.read_bytes()).splitlines(True)
    for number, content in {
        2: first + second[:9] + b"\n" + b"".join(others),
        len(others) + 2: whole[:-1],  # the next line would be joined to this one
        "": first + b"{}\n",
    }.items():
        path.write_bytes(content)
        said = refusal(capsys, search.main, *command)
        assert said.startswith(f"error: cannot read {f'line {number} of ' if number else ''}{path} (")
        assert "choose another name" in said and said.count("\n") == 1 and path.read_bytes() == content
    path.unlink()
    result = only_folder(tmp_path) / "result.json"  # the same point is drawn again
    result.write_text("{")
    said = refusal(capsys, search.main, *command)
    assert said.startswith(f"error: cannot read {result} (") and "remove this file" in said
    result.unlink()
    assert search.main(command) == 0 and sorted(t.state.name for t in trials_of(tmp_path)) == ["COMPLETE", "FAIL"]


@needs_optuna
@pytest.mark.slow
def test_search_shared_by_two_commands(tmp_path):
    """One of them has two jobs. Enough trials, none twice; what is under way at the end is finished."""
    command = ["-m", "experiments.search", *TINY_RESNET, "--epochs", "1", "--device", "cpu", "--batch-size", "359"]
    command += ["--study", "small", "--trials", "5", "--out", tmp_path]
    for process in [start(command), start([*command, "--jobs", "2"])]:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
    trials = trials_of(tmp_path)
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    assert 5 <= len(complete) < 5 + 3 and {t.state.name for t in trials} <= {"COMPLETE", "PRUNED"}
    assert len({tuple(t.params.values()) for t in complete}) == len(list(tmp_path.glob("*/result.json")))


@needs_optuna
def test_search_ranges_and_divergence(tmp_path, monkeypatch):
    use_few_samples(monkeypatch)
    monkeypatch.setattr(search, "train", lambda *args, quiet: {"diverged": True, "best_test_accuracy": 42.0})
    flags = [*TINY_VIT, "--variant", "none", "--lr-range", "1e8", "1e9", "--study", "small", "--out", str(tmp_path)]
    assert search.main([*flags, "--trials", "1"]) == 0
    (trial,) = trials_of(tmp_path)
    assert trial.params.keys() == {"lr"} and 1e8 <= trial.params["lr"] <= 1e9
    assert trial.value == 10.0  # chance


def test_search_errors(tmp_path, capsys, monkeypatch):
    assert "--lr: that is what is searched" in refusal(capsys, search.main, "--lr", "0.1")
    assert "must be positive and grow" in refusal(capsys, search.main, "--rho-range", "1", "0.1")
    command = ["--preset", "resnet18-cifar10", "--root", str(tmp_path), "--out", str(tmp_path)]
    if search.optuna:
        assert "error: no cifar10 in" in refusal(capsys, search.main, *command)
    monkeypatch.setattr(search, "optuna", None)
    assert "pip install optuna" in refusal(capsys, search.main, *command)
