"""What the README says is so: its code runs, its links point at what they name, its numbers are the committed ones."""

import ast
import json
import re

import pytest
import torch
from conftest import ROOT

import a10g
import epoch_time
import gpu
import step_time
import transfer

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"
TIMES = ROOT / "benchmarks" / "results"


def test_usage_runs():
    import mup2_fused
    import mup2_ref

    usage, fused = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    names = {
        "Model": lambda width: mup2_ref.MLP(5, width, 3),
        "loader": [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(2)],
        "loss_function": torch.nn.functional.cross_entropy,
    }
    exec(usage, names)
    assert isinstance(names["opt"].base_optimizer, torch.optim.SGD) and len(names["groups"]) == 3
    assert all("momentum_buffer" in state for state in names["opt"].state.values())
    exec(fused, names)
    assert isinstance(names["opt"], mup2_fused.SAM)
    names["opt"].step(names["closure"])


def test_recipe_for_mup_runs():
    import mup

    import mup2_ref

    class MuModel(mup2_ref.MLP):
        def __init__(self, width):
            super().__init__(5, width, 3)
            self.layers[-1] = mup.MuReadout(width, 3)

    (recipe,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import mup\n" in code)
    names = {"MuModel": MuModel, "mup2": mup2_ref, "torch": torch}
    exec(recipe, names)
    model, opt = names["model"], names["opt"]
    model(torch.randn(4, 5)).square().sum().backward()
    opt.first_step()
    opt.second_step()
    assert {g["lr"] for g in opt.param_groups if g["params"]} == {0.1, 0.8}


@pytest.mark.parametrize("kind", ["mup2_ref", "mup2_fused"])
def test_recipe_for_passes_runs(kind):
    import importlib

    import mup2_ref

    (recipe,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "accumulate(" in code)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    opt = importlib.import_module(kind).SAM(model.parameters(), same_randomness=True)
    micro_batches = [(torch.randn(4, 5), torch.randint(3, (4,))) for _ in range(3)]
    loss_function = torch.nn.functional.cross_entropy
    before = model[0].weight.detach().clone()
    names = dict(torch=torch, mup2=mup2_ref, opt=opt, model=model)
    exec(recipe, names | dict(micro_batches=micro_batches, loss_function=loss_function))
    assert not torch.equal(before, model[0].weight) and opt.skipped_steps == 0
    assert model[1].num_batches_tracked == 3 * 2 + 3  # both passes of the first step, one of the second


def test_links_point_at_what_they_name():
    tree = ast.parse((ROOT / "mup2_ref.py").read_text())
    lines = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    first = {n: min([node.lineno, *(d.lineno for d in node.decorator_list)]) for n, node in lines.items()}
    links = re.findall(r'\(mup2_ref\.py#L(\d+) "(\w+)"\)', README)
    assert len(links) >= 10
    assert [(int(line), name) for line, name in links] == [(first[name], name) for _, name in links]
    for path in re.findall(r"\]\(([\w/.-]+)(?:#L\d+)?[^)]*\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("word", ["make demo", "make test", "make bench", "make cuda", "make gpu", "make gpu-training"])
def test_commands_exist(word):
    assert word in README and f"\n{word.split()[1]}:" in (ROOT / "Makefile").read_text()


def test_stages_on_a_gpu_fit_into_their_time(monkeypatch):
    """And run scripts that exist, with options that they take."""
    monkeypatch.setattr(transfer, "has_fused", lambda device: True)
    plain, training = gpu.stages("9.0"), gpu.training_stages("9.0")
    assert sum(stage.seconds for stage in plain) < 480 and sum(stage.seconds for stage in training) < 580
    for stage in (*plain, *training):
        for word in stage.command[1:]:
            assert not word.endswith(".py") or (ROOT / word).exists()
    figure = transfer.parse_args(training[-1].command[2:])
    assert figure.graph and len(figure.methods) == 5 and (figure.widths, figure.slice_seeds) == ([256, 1024, 4096], 0)
    for stage in training[2:5]:
        parsed = epoch_time.parse_args(stage.command[2:])
        assert parsed.out is not None and parsed.device == "cuda"


TRANSFER = sorted(path.stem for path in RESULTS.glob("transfer_*.json"))


@pytest.mark.parametrize("name", TRANSFER)
def test_tables_are_the_committed_ones(name):
    summary = json.loads((RESULTS / f"{name}.json").read_text())
    assert transfer.format_table(summary["rows"], transfer.base_name(summary["args"]["network"])) in README
    assert f"experiments/results/{name}.png" in README


@pytest.mark.parametrize("path", sorted(set(TIMES.glob("*.json")) - {a10g.OUT}), ids=lambda p: p.stem)
def test_step_times_are_the_committed_ones(path):
    assert step_time.markdown_table(json.loads(path.read_text())) in README


@pytest.mark.parametrize("path", sorted(RESULTS.glob("epoch_time_*.json")), ids=lambda p: p.stem)
def test_epoch_times_are_the_committed_ones(path):
    rows = json.loads(path.read_text())["rows"]
    assert epoch_time.format_table(rows) in README and epoch_time.format_steps(rows) in README


def test_numbers_of_tensors_per_launch():
    import mup2_fused

    n = mup2_fused._C.tensors_per_launch
    both = min(n["norm"], n["perturb"])
    assert (
        f"(for up to {n['sgd']} tensors with SGD, {n['adam']} with AdamW; {both} for norm and perturbation)" in README
    )


def test_computed_times_are_the_committed_ones():
    result = json.loads(a10g.OUT.read_text())
    assert a10g.markdown_table(result) in README and f"nvcc {result['nvcc']}" in README
    assert result["floors"] == a10g.floors()


def test_exponents_are_the_committed_ones():
    result = json.loads((RESULTS / "exponents.json").read_text())
    assert f"{len(result['rows'])} rows" in README and f"{result['worst']:.3f}" in README
    assert result["worst"] <= 0.1


@pytest.mark.parametrize("name", TRANSFER)
def test_committed_tables_follow_from_the_committed_runs(name):
    """Nobody edits the summary by hand."""
    summary = json.loads((RESULTS / f"{name}.json").read_text())
    args = transfer.parse_args([])
    vars(args).update(summary["args"])
    rows = transfer.Results(transfer.read_runs(RESULTS / f"{name}.jsonl"), args).table()
    assert json.loads(json.dumps(rows)) == summary["rows"]
