"""Flags and presets of the vision experiments, the models and optimizers that are made from them, and their errors."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from small_runs import TINY_VIT, refusal

import mup2_fused as mup2
import mup2_ref
from experiments import data, vision
from experiments.presets import PRESETS, VARIANTS, parse_args, run_folder, width
from experiments.vision_run import build_model, build_optimizer, is_compiled, lr_factor


def settings(*flags):
    return vars(parse_args([*flags]))


def test_presets_hold_the_papers_numbers():
    names = "resnet18-cifar10", "vit-s4-cifar100", "vit-s16-imagenet"
    resnet, vit, imagenet = (settings("--preset", name) for name in names)
    assert resnet | dict(batch_size=128, epochs=200, label_smoothing=0.1, schedule="cosine", momentum=0.9) == resnet
    assert resnet | dict(weight_decay=5e-4, width_multiplier=0.5, base_width_multiplier=0.5) == resnet
    assert resnet | dict(base="sgd", data="cifar10", lr=0.0625, rho=0.0625, warmup_epochs=0) == resnet
    sp = settings("--preset", names[0], "--parameterization", "sp")
    assert sp | dict(lr=0.05, rho=0.1, perturbation="naive") == sp and resnet["perturbation"] == "effective"
    assert vit | dict(depth=12, heads=12, patch=[4, 4], base="adamw", data="cifar100", schedule="cosine") == vit
    assert imagenet | dict(depth=6, heads=12, patch=[16, 16], base="adamw", data="imagenet", epochs=100) == imagenet
    assert vit["warmup_epochs"] > 0 and vit["momentum"] is None and imagenet["warmup_epochs"] > 0
    for name, base, *facts in zip(names, (32, 384, 384), [(3, 32, 32)] * 2 + [(3, 224, 224)], (10, 100, 1000)):
        args = parse_args(["--preset", name])
        assert width(args, args.base_width_multiplier) == base and [*data.FACTS[args.data][:2]] == facts


def test_flags_override_and_make_the_name():
    plain = run_folder(parse_args([]))
    flags = "--lr .1|--rho .2|--momentum .5|--weight-decay 0|--label-smoothing 0|--epochs 3|--warmup-epochs 1|--seed 1"
    flags += "|--batch-size 32|--schedule constant|--amp bf16|--workers 1|--width-multiplier 1|--backend torch"
    flags += "|--base-width-multiplier 1|--parameterization sp|--perturbation global|--variant sam-on|--base adamw"
    folders = [run_folder(parse_args(flag.split())) for flag in flags.split("|")]
    assert len({plain, *folders}) == 1 + len(folders) and {f.parent for f in folders} == {Path("runs")}
    for flag in ("--device cpu", "--root x", "--backend compiled"):  # where, not what
        assert run_folder(parse_args(flag.split())) == plain
    alone = settings("--variant", "none", "--rho", "0.3")
    assert alone["rho"] is None and alone["perturbation"] is None


def test_learning_rate_schedule():
    args = parse_args([*TINY_VIT[:2], "--epochs", "10", "--warmup-epochs", "2"])
    expected = [(step + 1) / 11 for step in range(10)]
    expected += [0.5 + 0.5 * math.cos(math.pi * step / 40) for step in range(40)]
    assert [lr_factor(args, 5)(step) for step in range(50)] == pytest.approx(expected)
    args.schedule = "constant"
    assert {lr_factor(args, 5)(step) for step in range(10, 50)} == {1.0}


def factors(optimizer):
    return {
        name: tuple(g[k] for k in ("lr", "rho", "weight_decay", "gradnorm_scaling", "perturb"))
        for g in optimizer.param_groups
        for name in g["names"]
    }


@pytest.mark.parametrize("preset", ["resnet18-cifar10", "vit-s4-cifar100"])
def test_mup_at_the_base_width_is_plain_sam(preset):
    built = {}
    for parameterization, multiplier in itertools.product(("sp", "mup"), ("0.25", "0.5")):
        flags = ["--width-multiplier", multiplier, "--base-width-multiplier", "0.25", "--lr", "0.1", "--rho", "0.2"]
        args = parse_args(["--preset", preset, "--parameterization", parameterization, *flags])
        args.depth = args.depth and 1
        torch.manual_seed(0)
        model, base = build_model(args, (3, 32, 32), 100)
        optimizer = build_optimizer(args, model, base)
        built[parameterization, multiplier] = model, factors(optimizer), optimizer
    (sp, sp_factors, optimizer), (mup, mup_factors, _) = built["sp", "0.25"], built["mup", "0.25"]
    assert sp_factors == mup_factors and len(set(sp_factors.values())) == 1
    wd = PRESETS[preset]["weight_decay"]
    assert next(iter(sp_factors.values())) == (0.1, 0.2, wd, 1.0, True)
    kind = torch.optim.SGD if preset.startswith("resnet") else torch.optim.AdamW
    assert type(optimizer) is mup2.SAM and type(optimizer.base_optimizer) is kind
    assert kind is torch.optim.AdamW or optimizer.param_groups[0]["momentum"] == 0.9
    zero = [name for name, p in mup.named_parameters() if p.ndim > 1 and not p.any() and name != "token"]
    assert zero == ["layers.0.attention.query.weight"] * (args.depth is not None) + ["head.weight"]
    for (name, p), q in zip(mup.named_parameters(), sp.parameters()):
        assert name in zero or p.ndim == 1 or p.std().item() == pytest.approx(q.std().item(), rel=0.2)
    # Twice as wide: SP stays, muP does not.
    assert len(set(built["sp", "0.5"][1].values())) == 1
    head, first = (
        built["mup", "0.5"][1][n] for n in ("head.weight", "patches.weight" if args.depth else "stem.weight")
    )
    assert head[:4] == pytest.approx((0.05, 0.1, 2 * wd, 0.5**0.5))
    assert first[:4] == pytest.approx((0.1 * (1 if args.depth else 2), 0.4, wd * (1 if args.depth else 0.5), 2**0.5))
    if args.depth:  # 12 heads of 8 at the base width, of 16 here
        scales = {key: model.layers[0].attention.scale for key, (model, *_) in built.items()}
        assert scales == pytest.approx(
            {("sp", "0.25"): 8**-0.5, ("mup", "0.25"): 8**-0.5, ("sp", "0.5"): 16**-0.5, ("mup", "0.5"): 8**0.5 / 16}
        )


def test_variants_and_backends_are_what_they_are_called():
    def built(*flags, **options):
        args = parse_args([*TINY_VIT, *flags])
        return build_optimizer(args, *build_model(args, (1, 1, 40), 10), **options)

    found = {}
    for variant in VARIANTS:
        optimizer = built("--variant", variant)
        perturbed = {n for g in optimizer.param_groups if g["perturb"] for n in g["names"]}
        found[variant] = type(optimizer), getattr(optimizer, "variant", None), perturbed
    everything = {name for group in optimizer.param_groups for name in group["names"]}
    norms = {n for n in everything if "norm" in n}
    assert found == {
        "none": (torch.optim.AdamW, None, everything),
        "sam": (mup2.SAM, "sam", everything),
        "sam-on": (mup2.SAM, "sam", norms),
        "elementwise": (mup2.SAM, "elementwise", everything),
        "layerwise": (mup2.SAM, "layerwise", everything),
    }
    assert is_compiled(built("--backend", "compiled")) and not is_compiled(built("--backend", "torch"))
    assert type(built(kind=mup2_ref.SAM)) is mup2_ref.SAM


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--preset resnet18-cifar10", "error: cifar10 is not part of this repository: pass --root"),
        ("--preset resnet18-cifar10 --root {tmp}/nowhere", "error: no cifar10 in"),
        ("--preset vit-s16-imagenet --root {tmp}", "error: no ImageNet in"),
        ("--preset vit-mnist1d --patch 1 3", "error: an image of 1 x 40 pixels cannot be cut into patches of 1 x 3"),
        ("--out {tmp}/file", "error: cannot write"),
        ("--device cuda", "sees no GPU"),
        ("--model vit", "takes --depth, --heads and --patch"),
        ("--width-multiplier 0.126", "width of 8.064"),
        ("--preset vit-mnist1d --heads 5", "width of 48, not a multiple of 5"),
        ("--warmup-epochs 10", "must be fewer than --epochs 10"),
        ("--lr -1", "not a number from 0 on"),
        ("--epochs 0", "not a number from 1 on"),
    ],
)
def test_errors(tmp_path, capsys, flags, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    flags = ["--out", str(tmp_path), *flags.format(tmp=tmp_path).split()]
    assert message in refusal(capsys, vision.main, *flags).splitlines()[-1]
