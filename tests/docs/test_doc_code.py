"""The Python code of README.md and docs/*.md runs, page by page, and does what the text beside it says."""

import copy
import re
from functools import partial

import pytest
import torch
from small_problems import ROOT, Tied, block, blocks, train_closure, weights
from torch import nn

import mup2_fused as mup2
from experiments.data import import_torchvision

DATA = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(2)]


def usage(width=64):
    """What the README's first block leaves behind, with a model of this width instead of 1024."""
    names = {"Model": lambda width: mup2.MLP(5, width, 3), "loader": DATA, "loss_function": nn.functional.cross_entropy}
    code = blocks("README.md")[0]
    assert "width=1024" in code
    exec(code.replace("width=1024", f"width={width}").replace("width=128", "width=16"), names)
    return names


def assert_changed(model, before):
    assert not any(map(torch.equal, weights(model), before))


def test_usage():
    names = usage()
    opt = names["opt"]
    assert isinstance(opt, mup2.SAM) and isinstance(opt.base_optimizer, torch.optim.SGD)
    assert [g["rho"] for g in names["groups"]] == pytest.approx([0.4, 0.1, 0.025])
    assert all("momentum_buffer" in state for state in opt.state.values()) and len(opt.state) == 3


# ------------------------------------------------------------------------------------------ docs/training.md

SINGLE = ("process_group=", "fully_shard(", "autocast(", "capture(")  # these have tests of their own


def test_training_page():
    """All simple blocks after one another, as a reader would."""
    names = usage()
    names["micro_batches"] = [(x[:4], y[:4]) for x, y in DATA]
    x, y = DATA[0]
    run = [code for code in blocks("docs/training.md") if not any(word in code for word in SINGLE)]
    assert len(run) == 8
    for code in run:
        names |= {"x": x, "y": y}
        before = weights(names["model"])
        exec(code, names)
        if re.search(r"^\s*opt\.(step|second_step)\(", code, re.MULTILINE):
            assert_changed(names["model"], before)
    assert all(g["rho"] == 0.1 and g["lr"] == 0.1 for g in names["tuned"].param_groups)
    assert isinstance(names["adam"].base_optimizer, torch.optim.AdamW) and names["sharpness"] > 0
    assert len(mup2.report(names["groups"]).splitlines()) == 4


def test_cheaper_steps():
    """Each block trains, with as many passes as the page says."""
    names, passes = usage(), []
    names["model"].register_forward_hook(lambda module, args, out: passes.append(len(out)))
    x, y = DATA[0]

    names["closure"] = lambda: train_closure(names["opt"], names["model"], x, y)()
    interval, loop, part, momentum, momentum_loop, *_ = blocks("docs/cheaper-sam.md")
    for code, expected in (
        (interval + loop, [8, 8, 8]),  # of the two steps, the first one is a SAM step
        ("opt = mup2.SAM(groups)\n" + part.replace("samples=16", "samples=2"), [2, 8, 2, 8]),
        (momentum, [8]),
        (momentum_loop, [8, 8]),
    ):
        before = weights(names["model"])
        exec(code, names)
        assert_changed(names["model"], before)
        assert passes == expected, code
        passes.clear()


@pytest.mark.parametrize("way", [dict(interval=4), dict(ascent="momentum")], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_cheaper_steps_written_out(base, way):
    """The two loops are the product's steps, in float64."""
    x, y = DATA[0]
    model, base_model = mup2.MLP(5, 64, 3).double(), mup2.MLP(5, 16, 3)
    other = copy.deepcopy(model)

    scaling = mup2.exponents(base_optimizer="sgd" if base is torch.optim.SGD else "adam")
    groups, same = (mup2.param_groups(m, base_model, scaling, lr=0.01, rho=0.1) for m in (model, other))
    kwargs = dict(momentum=0.9) if base is torch.optim.SGD else {}
    opt = mup2.SAM(groups, base, **way, **kwargs)
    names = {"torch": torch, "steps": 10, "base_optimizer": base(same, **kwargs)}
    names["closure"] = train_closure(names["base_optimizer"], other, x.double(), y)
    *_, functions, interval, momentum = blocks("docs/cheaper-sam.md")
    code = functions + (interval if "interval" in way else momentum)
    exec(code if base is torch.optim.SGD else code.replace("momentum_buffer", "exp_avg"), names)
    start = weights(model)
    for _ in range(10):
        opt.step(train_closure(opt, model, x.double(), y))
    assert_changed(model, start)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_table_of_scalings():
    """Every call of exponents() that docs/training.md names gives other factors, but for muP²'s own numbers."""
    calls = re.findall(r"`(exponents\(.*?\))`", (ROOT / "docs" / "training.md").read_text())
    model, base = mup2.MLP(5, 64, 3), mup2.MLP(5, 16, 3)
    found = {call: eval(call, {"exponents": mup2.exponents}) for call in calls}
    groups = {call: mup2.param_groups(model, base, e, lr=1.0, rho=1.0) for call, e in found.items()}
    kinds = {str([[g[k] for k in ("lr", "rho", "gradnorm_scaling", "variant")] for g in m]) for m in groups.values()}
    assert len(found) == 9 and len(kinds) == 8, "Definition 4's norm is muP²'s own exponents"
    assert found['exponents("mup", (-0.5, (-0.5, 0.5, 1.5)))'].dl == mup2.exponents().dl


@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_mixed_precision(scale):
    names = usage() | {"device": "cpu", "x": DATA[0][0], "y": DATA[0][1]}
    before = weights(names["model"])
    start, _, step = block("docs/training.md", "autocast(").partition("\n\n\n")
    exec(start, names)
    names["scaler"] = torch.amp.GradScaler("cpu", init_scale=scale)
    exec(step, names)
    overflows = scale > 2.0**20
    assert names["opt"].skipped_steps == overflows
    assert all(map(torch.equal, weights(names["model"]), before)) == overflows


ROUNDING = re.findall(
    r"^\| (float\w+|bfloat16) \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$",
    (ROOT / "docs" / "training.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize("kind, autocast, norm, cosine", ROUNDING)
def test_what_rounding_leaves_of_a_perturbation(kind, autocast, norm, cosine):
    """A part of the 11 million weights suffices: e has the same size for each weight."""
    n, share = 1_100_000, 10
    w = nn.Parameter((0.02 * torch.randn(n)).to(getattr(torch, kind)))
    w.grad = torch.randn_like(w)
    total, _ = mup2.seen_perturbation(mup2.SAM([w], lr=0.1, rho=0.05 / share**0.5), getattr(torch, autocast, None))
    assert (total.norm, total.cosine) == pytest.approx((float(norm), float(cosine)), abs=0.012)


def test_the_table_of_rounding_has_all_cases():
    assert len(ROUNDING) == 5


def test_one_process_of_several():
    """m-sharpness, FSDP2 and a checkpoint, in a group of one process."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        names = usage() | {"micro_batches": DATA}
        before = weights(names["model"])
        exec(block("docs/training.md", "process_group="), names)
        assert_changed(names["model"], before)
    finally:
        dist.destroy_process_group()


def test_captured_step(monkeypatch):
    """On a CPU the step itself stands in for the graph."""
    device = "cuda" if torch.cuda.is_available() and mup2.built_with_cuda else "cpu"
    if device == "cpu":
        monkeypatch.setattr(mup2, "capture", lambda step, model, opt, *inputs: step)
    names = usage() | {"device": device}
    names["model"].to(device)
    names["opt"].state.clear()
    before = weights(names["model"])
    exec(block("docs/training.md", "capture("), names)
    assert_changed(names["model"], before)


# ------------------------------------------------------------------------------------------ the other pages


def test_compiled_step(monkeypatch):
    """docs/kernels.md: no graph break, and the steps of SAM. The inductor would take half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names, expected = usage(), usage()
    expected["model"].load_state_dict(names["model"].state_dict())
    opt = mup2.SAM(mup2.param_groups(expected["model"], expected["base"], lr=0.1, rho=0.1), momentum=0.9)
    exec(block("docs/kernels.md", "fullgraph=True"), names)
    for x, y in DATA:
        opt.step(train_closure(opt, expected["model"], x, y))
    for p, q in zip(names["model"].parameters(), expected["model"].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_networks_page():
    """The first block; the others are in test_timm and in tests/product/test_models.py."""
    names = {"mup2": mup2, "tied": Tied(64), "tied_base": Tied(16)}
    exec(block("docs/networks.md", "tied_base"), names)
    assert [(g["role"], g["rho"]) for g in names["groups"]] == [("output", pytest.approx(0.025))]


def test_timm():
    """The recipe on smaller models, a step of it, and timm's own scaler, which makes a single pass."""
    import_torchvision()  # before timm, which imports it
    timm_utils = pytest.importorskip("timm.utils")
    code = block("docs/networks.md", "import timm").replace("(768)", "(128)").replace("(384)", "(64)")
    names = {"mup2": mup2, "torch": torch}
    exec(code.replace("// 64)", "// 64, depth=1, img_size=32)"), names)
    model, opt = names["model"], names["opt"]
    assert not model.head.weight.any() and isinstance(opt.base_optimizer, torch.optim.AdamW)
    assert {g["rho"] for g in names["groups"]} == {0.2, 0.1, 0.05}
    x, y, before = torch.randn(4, 3, 32, 32), torch.arange(4), model.head.weight.clone()
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        timm_utils.NativeScaler(device="cpu")(
            nn.functional.cross_entropy(model(x), y), opt, parameters=model.parameters()
        )
    assert torch.equal(model.head.weight, before)
    names["scheduler"].step(1)
    opt.step(train_closure(opt, model, x, y))
    assert not torch.equal(model.head.weight, before)
    assert max(g["lr"] for g in opt.param_groups) == pytest.approx(2e-4)  # the warm-up's first of five epochs


def test_hugging_face_trainer(tmp_path):
    """The three blocks of docs/frameworks.md on a small model, and the options in its table."""
    import_torchvision()  # before transformers, which imports it
    hf = pytest.importorskip("transformers")
    page = "docs/frameworks.md"
    small = {"1024": "128", "256": "64", "(hidden": "(vocab_size=50, num_hidden_layers=1, hidden"}
    small |= {
        "runs/": f"{tmp_path}/",
        ").train()": ")\ntrainer.train()",
        "SAMTrainer(model": "trainer = SAMTrainer(model",
    }
    small |= {"learning_rate": "use_cpu=True, report_to=[], learning_rate"}
    code = block(page, "TrainingArguments")
    for old, new in small.items():
        assert old in code
        code = code.replace(old, new)
    sentences = [torch.randint(50, (8,)) for _ in range(40)]
    names = {"mup2": mup2, "dataset": [dict(input_ids=s, labels=s) for s in sentences]}
    exec(code, names)
    sam, model = names["trainer"].sam, names["model"]
    assert len(sam.state) == len(list(model.parameters())) and isinstance(sam.base_optimizer, torch.optim.AdamW)
    assert {g["rho"] for g in sam.param_groups} == {0.2, 0.1, 0.05} and names["trainer"].state.global_step == 6
    before = weights(model)
    exec(block(page, "base=model"), names)
    assert_changed(model, before)
    exec(block(page, "FrozenTrainer"), names)
    names |= {"Seq2SeqTrainer": hf.Seq2SeqTrainer, "opt": sam}
    options = re.findall(r"\| `((?:class MyTrainer|SAMTrainer\().*?)` ?[|,]", (ROOT / page).read_text())
    for line in options:
        own = "train_dataset=dataset" + ("" if "optimizers" in line else ", base=config(64)")
        exec(line.replace("...", f"model, args, {own}").replace("SAMTrainer(m", "made = FrozenTrainer(m"), names)
        before = weights(model)
        names["made"].train()
        assert_changed(model, before)
    assert len(options) == 5 and issubclass(names["MyTrainer"], hf.Seq2SeqTrainer) and names["made"].sam is sam


def test_mup_package_page():
    mup = pytest.importorskip("mup", reason="pip install mup")

    class MuModel(mup2.MLP):
        def __init__(self, width):
            super().__init__(5, width // 8, 3)
            self.layers[-1] = mup.MuReadout(width // 8, 3)

    names = {"MuModel": MuModel, "mup2": mup2, "torch": torch}
    for code in blocks("docs/mup-package.md"):
        exec(code, names)
        model, opt = names["model"], names["opt"]
        before = weights(model)
        for number in (1, 2):
            model(DATA[0][0]).square().sum().backward()
            opt.first_step(zero_grad=True) if number == 1 else opt.second_step()
        assert_changed(model, before)
        assert {g["lr"] for g in opt.param_groups if g["params"]} == {0.1, 0.8}


def numbers_and_words(text):
    """The signed numbers with two digits, and the text without them and without repeated spaces."""
    pattern = r"[+-]\d\.\d\d"
    return [float(x) for x in re.findall(pattern, text)], re.sub(r"\s+", " ", re.sub(pattern, "", text)).strip()


def test_check_page():
    """Its example is judged as the page shows; numbers may differ a little from machine to machine."""
    names = {"mup2": mup2}
    for code in blocks("docs/check.md"):
        exec(code, names)
    assert names["report"].passed
    (shown,) = re.findall(r"```\n(powers of the width.*?)```", (ROOT / "docs/check.md").read_text(), re.DOTALL)
    report = names["check"](names["make_model"], [64, 128, 256, 512], groups=names["my_groups"])
    (expected, words), (found, said) = map(numbers_and_words, (shown, str(report)))
    assert said == words and found == pytest.approx(expected, abs=0.1) and len(found) == 26


def test_every_page_with_code_is_run():
    """A page that gets its first block, or another one, must get a test."""
    pages = {str(p.relative_to(ROOT)): len(blocks(p)) for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    assert {page: n for page, n in pages.items() if n} == {
        "README.md": 1,
        "docs/training.md": 12,
        "docs/cheaper-sam.md": 8,
        "docs/frameworks.md": 8,
        "docs/networks.md": 3,
        "docs/mup-package.md": 2,
        "docs/kernels.md": 1,
        "docs/check.md": 2,
    }
