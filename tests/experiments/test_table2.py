"""Table 2 from result files that are written here."""

from small_runs import refusal

from experiments import table2
from experiments.commands import write_json
from experiments.presets import parse_args, run_folder, settings


def finished_run(out, accuracies, diverged=False, **changed):
    """Result files like those of experiments.vision, one per seed."""
    flags = [word for k, v in changed.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    for seed, accuracy in enumerate(accuracies):
        args = parse_args(["--preset", "resnet18-cifar10", *flags, "--seed", str(seed), "--out", str(out)])
        run_folder(args).mkdir(parents=True)
        result = {"settings": settings(args), "best_test_accuracy": accuracy, "diverged": diverged}
        write_json(run_folder(args) / "result.json", result)


def cells(printed, row):
    (line,) = (line for line in printed.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_table2(tmp_path, capsys):
    sp = dict(parameterization="sp")
    finished_run(tmp_path, [90.0, 91.0, 92.0], variant="none", **sp)
    finished_run(tmp_path, [92.0, 93.0], variant="sam", **sp)
    finished_run(tmp_path, [95.0, 95.5], variant="sam", rho=0.3, **sp)  # the better radius
    finished_run(tmp_path, [99.0], variant="layerwise", diverged=True, **sp)
    finished_run(tmp_path, [94.0], variant="layerwise", lr=0.025, **sp)
    finished_run(tmp_path, [91.0], variant="none")
    finished_run(tmp_path, [90.5, 91.0, 90.0], variant="sam-on")
    finished_run(tmp_path, [99.9], variant="sam", perturbation="global")  # not muP²
    finished_run(tmp_path, [80.0], variant="elementwise", width_multiplier=4)
    finished_run(tmp_path, [70.0], variant="none", base="adamw")
    assert table2.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    title = "resnet18 on cifar10, width multiplier 0.5, 200 ep"
    first = next(t for t in printed.split("### ") if t.startswith(title) and "| SGD |" in t)
    assert first.splitlines()[2] == "|  | SP | gain | lr, rho | muP² | gain | lr, rho |"
    nothing = ["-", "-", "-"]
    assert cells(first, "SGD") == ["91.00 ± 1.00 (3)", "-", "0.05", "91.00 (1)", "-", "0.0625"]
    assert cells(first, "SAM") == ["95.25 ± 0.35 (2)", "+4.25", "0.05, 0.3", *nothing]
    assert cells(first, "SAM-ON") == [*nothing, "90.50 ± 0.50 (3)", "-0.50", "0.0625, 0.0625"]
    assert cells(first, "elementwise ASAM") == [*nothing, *nothing]
    assert cells(first, "layerwise ASAM") == ["94.00 (1)", "+3.00", "0.025, 0.1", *nothing]
    assert printed.count("### ") == 3 and "width multiplier 4, 200 epochs" in printed
    assert "80.00 (1) | - | 0.0625, 0.0625" in printed  # no base optimizer to gain over
    assert cells(printed, "AdamW")[3] == "70.00 (1)"
    assert "selected by test accuracy, as in the paper" in printed
    assert printed.count("diverged: resnet18-cifar10-sp-naive-layerwise") == 1 and "1 runs with another" in printed
    assert "error: no finished runs" in refusal(capsys, table2.main, str(tmp_path / "nowhere"))
    path = next(tmp_path.glob("*/result.json"))
    whole = path.read_text()
    for content in (whole[:-9], "", "[]", whole.replace("best_test", "best"), whole.replace('"depth"', '"deep"')):
        path.write_text(content)
        said = refusal(capsys, table2.main, str(tmp_path))
        assert said.startswith(f"error: cannot read {path} (") and "remove this file" in said
        assert said.count("\n") == 1 and path.read_text() == content
