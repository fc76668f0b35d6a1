"""Vision experiments: data, presets, resuming, several processes; table, times and search made from their runs."""

import csv
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_graph import stand_in
from torch.utils.data import Subset

import data
import epoch_time
import mup2_fused
import mup2_ref
import networks
import search
import table2
import vision

EXPERIMENTS = Path(vision.__file__).parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process, so that bits can be compared
TINY_VIT = ["--preset", "vit-mnist1d", "--depth", "1", "--epochs", "1", "--warmup-epochs", "0"]
TINY_VIT += ["--width-multiplier", "0.0625", "--base-width-multiplier", "0.0625", "--heads", "2"]  # width 24
TINY_RESNET = ["--width-multiplier", "0.0625", "--base-width-multiplier", "0.03125"]  # 4 channels, base 2

# ------------------------------------------------------------------------------------------------- data


def cifar_files(name, version, images=20, scale=1):
    """File name -> content, of a small CIFAR with known pixels and labels."""
    random, kind = np.random.default_rng(0), data.CIFAR[name]
    *_, train, test = kind.versions[version]
    files = {}
    for file in [*train, test]:
        x = random.integers(0, 256, (images, 3072), dtype=np.uint8)
        y = np.arange(images) * scale % kind.classes
        if version == "binary":
            labels = [np.full(images, 7)] * (kind.label_bytes - 1) + [y]  # the coarse label is another one
            files[file] = np.hstack([np.stack(labels, 1).astype(np.uint8), x]).tobytes()
        else:
            batch = {b"data": x, kind.labels: y.tolist(), b"coarse_labels": [7] * images, b"filenames": [b"a"] * images}
            files[file] = pickle.dumps(batch, protocol=2)
    return files


def store(root, name, version, files, packed=True):
    archive, folder, *_ = data.CIFAR[name].versions[version]
    if not packed:
        (root / folder).mkdir()
        for file, content in files.items():
            (root / folder / file).write_bytes(content)
        return root / folder
    with tarfile.open(root / archive, "w:gz") as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return root / archive


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar100(tmp_path, version, packed):
    where = store(tmp_path, "cifar100", version, cifar_files("cifar100", version, scale=5), packed)
    (x, y), (x_test, y_test) = data.load("cifar100", tmp_path)
    assert x.shape == x_test.shape == (20, 3, 32, 32) and y.tolist() == y_test.tolist() == list(range(0, 100, 5))
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (20, 3072), dtype=np.uint8) for _ in range(2)]
    images = data.images("cifar100", tmp_path)
    assert images[2:] == ((3, 32, 32), 100) and len(images.train) == len(images.test) == 20
    assert np.array_equal(images.train.x.numpy().reshape(20, -1), pixels[0]) and images.train.x.dtype == torch.uint8
    for i in (0, 19):
        image, label = images.test[i]
        torch.testing.assert_close(image, x_test[i])  # the same statistics, those of the training set
        assert label == y_test[i]
    if not packed:
        assert torch.equal(data.load("cifar100", where)[0][0], x)


@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar100_damaged(tmp_path, version):
    files = cifar_files("cifar100", version)
    test_name = data.CIFAR100[version][3]
    with pytest.raises(data.DataError, match=r"no CIFAR-100 in .*cifar-100-python.tar.gz or cifar-100-binary.tar.gz"):
        data.images("cifar100", tmp_path)
    for content in (files[test_name][:-1], b"", b"not it"):
        store(tmp_path, "cifar100", version, files | {test_name: content})
        with pytest.raises(data.DataError, match=f"{test_name} of .*damaged"):
            data.images("cifar100", tmp_path)
    path = store(tmp_path, "cifar100", version, {"train" + ".bin" * (version == "binary"): b""})
    with pytest.raises(data.DataError, match="is not the CIFAR-100 archive"):
        data.load("cifar100", tmp_path)
    store(tmp_path, "cifar100", version, files)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(data.DataError, match=rf"{path.name} (is damaged|is not the CIFAR-100 archive)"):
        data.load("cifar100", tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("arbitrary code ran",)


@pytest.mark.parametrize("labels", [[1, 100], [-1, 0], [0.5, 1], ["a", "b"], [1], Evil()])
def test_cifar100_with_impossible_labels(tmp_path, labels, capsys):
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": labels}
    files = {"train": pickle.dumps(batch, protocol=2), "test": b""}
    store(tmp_path, "cifar100", "python", files)
    with pytest.raises(data.DataError, match=r"train of .*(labels 0 to 99|refused to load .*print)"):
        data.load("cifar100", tmp_path)
    assert "arbitrary" not in capsys.readouterr().out


def test_cifar10_is_cropped_and_flipped(tmp_path):
    """Every augmented image is one of the 9 x 9 x 2 possible ones, and not always the same."""
    store(tmp_path, "cifar10", "binary", cifar_files("cifar10", "binary", 2))
    images = data.images("cifar10", tmp_path)
    (x, _), _ = data.load("cifar10", tmp_path)
    pixels = images.train.x.double() / 255
    black = -pixels.mean((0, 2, 3)) / pixels.std((0, 2, 3), correction=0)
    padded = black.float()[:, None, None].expand(3, 40, 40).clone()
    padded[:, 4:36, 4:36] = x[3]
    possible = {}
    for dy, dx in itertools.product(range(9), range(9)):
        possible[dy, dx, False] = padded[:, dy : dy + 32, dx : dx + 32]
        possible[dy, dx, True] = possible[dy, dx, False].flip(2)
    drawn = [images.train[3][0] for _ in range(12)]
    found = [[key for key, x in possible.items() if torch.allclose(image, x, atol=1e-4)] for image in drawn]
    assert all(len(keys) == 1 for keys in found)
    assert all(len({keys[0][i] for keys in found}) > 1 for i in range(3))  # rows, columns and flips all vary


def test_cifar100_is_augmented_like_cifar10_and_by_the_policy(tmp_path):
    store(tmp_path, "cifar100", "binary", cifar_files("cifar100", "binary"))
    store(tmp_path, "cifar10", "binary", cifar_files("cifar10", "binary"))
    names = [
        [type(t).__name__ for t in data.images(name, tmp_path).train.transform.transforms]
        for name in ("cifar10", "cifar100")
    ]
    assert names[0] == ["RandomCrop", "RandomHorizontalFlip", "ToDtype", "Normalize"]
    assert names[1] == [*names[0][:2], "AutoAugment", *names[0][2:]]


def image_folder(root, classes=("ant", "bee"), count=3, size=(300, 260)):
    from PIL import Image

    for split, (k, name) in itertools.product(("train", "val"), enumerate(classes)):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (60 * k, 100, 200)).save(root / split / name / f"{i}.png")
    return root


def test_imagenet_folder(tmp_path):
    images = data.images("imagenet", image_folder(tmp_path))
    assert images[2:] == ((3, 224, 224), 2) and (len(images.train), len(images.test)) == (6, 6)
    mean, std = torch.tensor(data.IMAGENET_MEAN), torch.tensor(data.IMAGENET_STD)
    for split, i in itertools.product((images.train, images.test), (0, 5)):
        image, label = split[i]
        colour = torch.tensor([60.0 * (i == 5), 100, 200]) / 255
        torch.testing.assert_close(image, ((colour - mean) / std)[:, None, None].expand(3, 224, 224))
        assert label == (i == 5)
    names = [[type(t).__name__ for t in split.transform.transforms] for split in (images.train, images.test)]
    assert names[0][:2] == ["RandomResizedCrop", "RandomHorizontalFlip"] and names[1][:2] == ["Resize", "CenterCrop"]


def test_imagenet_folder_with_faults(tmp_path):
    with pytest.raises(data.DataError, match=r"no ImageNet in .*train/CLASS"):
        data.images("imagenet", tmp_path)
    with pytest.raises(data.DataError, match="pass --root, the folder with train and val"):
        data.images("imagenet")
    broken = image_folder(tmp_path) / "val" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(data.DataError, match=rf"{broken} is damaged"):
        data.images("imagenet", tmp_path).test[4]
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cow")
    with pytest.raises(data.DataError, match="do not hold the same classes"):
        data.images("imagenet", tmp_path)


def test_embedded_images():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    for name in ("digits", "mnist1d"):
        images = data.images(name)
        facts = data.FACTS[name]
        x, y = images.train.tensors
        assert images[2:] == facts[:2] and x.shape == (facts.train_samples, *facts.shape)
        assert x.mean().abs() < 1e-2 and abs(x.std() - 1) < 1e-2 and sorted(y.unique().tolist()) == list(range(10))
    (x, _), (x_test, _) = data.load("digits")
    assert (len(x), len(x_test)) == (1438, 359)
    together = torch.cat([x, x_test]).flatten(1)
    from sklearn.datasets import load_digits

    original = torch.tensor(load_digits().data)
    scale = original.std() / together.std()
    recovered = (together.double() * scale - together.double().mean() * scale + original.mean()).round()
    assert sorted(map(tuple, recovered.tolist())) == sorted(map(tuple, original.tolist()))  # nothing lost or twice
    assert torch.equal(data.load("digits")[1][0], x_test)
    (x, _), _ = data.load("mnist1d")
    assert torch.equal(data.images("mnist1d").train.tensors[0][:, 0, 0], x)


def test_digits_without_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataError, match="pip install scikit-learn"):
        data.images("digits")


def test_synthetic_data():
    x, y = data.synthetic("cifar100", 50).tensors
    assert x.shape == (50, 3, 32, 32) and y.shape == (50,) and 0 <= y.min() and 50 < y.max() < 100


def test_torchvision_can_be_imported():
    """In a process of its own: whether it fits torch or not, what the experiments need of it works."""
    code = (
        "import data; tv = data.import_torchvision(); assert tv is data.import_torchvision();"
        "import torchvision.models, torchvision.datasets; from torchvision.transforms import v2;"
        "import torch; x = torch.zeros(3, 8, 8, dtype=torch.uint8);"
        "assert v2.RandomCrop(4)(x).shape == (3, 4, 4) and torchvision.models.resnet18 and tv.datasets.ImageFolder"
    )
    subprocess.run([sys.executable, "-c", code], cwd=EXPERIMENTS, env=ONE_THREAD, check=True)


# ------------------------------------------------------------------------------------------------- settings


def settings(*flags):
    args = vision.parse_args([str(flag) for flag in flags])
    return vars(args)


def test_presets_hold_the_papers_numbers():
    resnet = settings("--preset", "resnet18-cifar10")
    assert resnet | dict(batch_size=128, epochs=200, label_smoothing=0.1, schedule="cosine", momentum=0.9) == resnet
    assert resnet | dict(weight_decay=5e-4, width_multiplier=0.5, base_width_multiplier=0.5) == resnet
    assert resnet | dict(base="sgd", data="cifar10", lr=0.0625, rho=0.0625, warmup_epochs=0) == resnet
    sp = settings("--preset", "resnet18-cifar10", "--parameterization", "sp")
    assert sp | dict(lr=0.05, rho=0.1, perturbation="naive") == sp and resnet["perturbation"] == "effective"
    vit = settings("--preset", "vit-s4-cifar100")
    assert vit | dict(depth=12, heads=12, patch=[4, 4], base="adamw", data="cifar100", schedule="cosine") == vit
    assert vit["warmup_epochs"] > 0 and vit["momentum"] is None
    imagenet = settings("--preset", "vit-s16-imagenet")
    assert imagenet | dict(depth=6, heads=12, patch=[16, 16], base="adamw", data="imagenet", epochs=100) == imagenet
    assert imagenet["warmup_epochs"] > 0
    for preset, base in (("resnet18-cifar10", 32), ("vit-s4-cifar100", 384), ("vit-s16-imagenet", 384)):
        args = vision.parse_args(["--preset", preset])
        assert vision.width(args, args.base_width_multiplier) == base
    facts = data.FACTS
    assert [facts[n][:2] for n in ("cifar10", "cifar100", "imagenet")] == [
        ((3, 32, 32), 10),
        ((3, 32, 32), 100),
        ((3, 224, 224), 1000),
    ]


def test_flags_override_and_make_the_name():
    plain = vision.run_folder(vision.parse_args([]))
    flags = "--lr .1|--rho .2|--momentum .5|--weight-decay 0|--label-smoothing 0|--epochs 3|--warmup-epochs 1|--seed 1"
    flags += "|--batch-size 32|--schedule constant|--amp bf16|--workers 1|--width-multiplier 1|--reference"
    flags += "|--base-width-multiplier 1|--parameterization sp|--perturbation global|--variant sam-on|--base adamw"
    folders = [vision.run_folder(vision.parse_args(flag.split())) for flag in flags.split("|")]
    assert len({plain, *folders}) == 1 + len(folders) and {f.parent for f in folders} == {Path("runs")}
    for flag in ("--device cpu", "--root x"):  # where, not what
        assert vision.run_folder(vision.parse_args(flag.split())) == plain
    alone = settings("--variant", "none", "--rho", "0.3")
    assert alone["rho"] is None and alone["perturbation"] is None


def test_learning_rate_schedule():
    args = vision.parse_args([*TINY_VIT[:2], "--epochs", "10", "--warmup-epochs", "2"])
    factor = vision.lr_factor(args, 5)
    expected = [(step + 1) / 11 for step in range(10)]
    expected += [0.5 + 0.5 * math.cos(math.pi * step / 40) for step in range(40)]
    assert [factor(step) for step in range(50)] == pytest.approx(expected)
    args.schedule = "constant"
    assert {vision.lr_factor(args, 5)(step) for step in range(10, 50)} == {1.0}


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
        args = vision.parse_args(["--preset", preset, "--parameterization", parameterization, *flags])
        if args.depth:
            args.depth = 1
        torch.manual_seed(0)
        model, base = vision.build_model(args, (3, 32, 32), 100)
        optimizer = vision.build_optimizer(args, model, base)
        built[parameterization, multiplier] = model, factors(optimizer), optimizer
    (sp, sp_factors, optimizer), (mup, mup_factors, _) = built["sp", "0.25"], built["mup", "0.25"]
    assert sp_factors == mup_factors and len(set(sp_factors.values())) == 1
    wd = vision.PRESETS[preset]["weight_decay"]
    assert next(iter(sp_factors.values())) == (0.1, 0.2, wd, 1.0, True)
    assert type(optimizer) is mup2_fused.SAM
    kind = torch.optim.SGD if preset.startswith("resnet") else torch.optim.AdamW
    assert type(optimizer.base_optimizer) is kind
    if kind is torch.optim.SGD:
        assert optimizer.param_groups[0]["momentum"] == 0.9
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


def test_variants_are_what_they_are_called():
    found = {}
    for variant in vision.VARIANTS:
        args = vision.parse_args([*TINY_VIT, "--variant", variant])
        optimizer = vision.build_optimizer(args, *vision.build_model(args, (1, 1, 40), 10))
        perturbed = {n for g in optimizer.param_groups if g["perturb"] for n in g["names"]}
        found[variant] = type(optimizer), getattr(optimizer, "variant", None), perturbed
    everything = {name for name, _ in vision.build_model(args, (1, 1, 40), 10)[0].named_parameters()}
    norms = {n for n in everything if "norm" in n}
    assert found == {
        "none": (torch.optim.AdamW, None, everything),
        "sam": (mup2_fused.SAM, "sam", everything),
        "sam-on": (mup2_fused.SAM, "sam", norms),
        "elementwise": (mup2_fused.SAM, "elementwise", everything),
        "layerwise": (mup2_fused.SAM, "layerwise", everything),
    }
    args = vision.parse_args([*TINY_VIT, "--reference"])
    assert type(vision.build_optimizer(args, *vision.build_model(args, (1, 1, 40), 10))) is mup2_ref.SAM


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--preset resnet18-cifar10", "cifar10 is not part of this repository: pass --root"),
        ("--preset resnet18-cifar10 --root {tmp}/nowhere", "no CIFAR-10 in"),
        ("--preset vit-s16-imagenet --root {tmp}", "no ImageNet in"),
        ("--preset vit-mnist1d --patch 1 3", "cannot be cut into patches of 1 x 3"),
        ("--out {tmp}/file", "cannot write"),
        ("--device cuda", "sees no GPU"),
    ],
)
def test_errors(tmp_path, capsys, flags, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    assert vision.main(["--out", str(tmp_path), *flags.format(tmp=tmp_path).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model vit", "takes --depth, --heads and --patch"),
        ("--width-multiplier 0.126", "width of 8.064"),
        ("--preset vit-mnist1d --heads 5", "width of 48, not a multiple of 5"),
        ("--warmup-epochs 10", "must be fewer than --epochs 10"),
        ("--lr -1", "not a number from 0 on"),
        ("--epochs 0", "not a number from 1 on"),
    ],
)
def test_flags_that_do_not_fit(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        vision.main(flags.split())
    assert exit.value.code == 2 and message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- runs


def only_folder(out):
    (config,) = out.glob("*/config.json")
    return config.parent


def result_of(out):
    return json.loads((only_folder(out) / "result.json").read_text())


def metrics(folder, leave_out=("seconds",)):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if k not in leave_out} for row in csv.DictReader(file)]


def equal(a, b):
    """Of checkpoints, bit for bit, without the seconds in their rows."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(key == "seconds" or equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture
def few(monkeypatch):
    """Only 96 training and 40 test samples of every data set."""
    load = data.images

    def images(name, root=None):
        found = load(name, root)
        return found._replace(train=Subset(found.train, range(96)), test=Subset(found.test, range(40)))

    monkeypatch.setattr(data, "images", images)


@pytest.mark.parametrize("preset", vision.PRESETS)
def test_every_preset_trains(tmp_path, preset, capsys):
    flags = ["--preset", preset, "--epochs", "1", "--warmup-epochs", "0", "--workers", "0"]
    if preset == "resnet18-cifar10":
        store(tmp_path, "cifar10", "python", cifar_files("cifar10", "python", 10))
        flags += [*TINY_RESNET, "--batch-size", "25"]
    elif preset == "mlp-cifar10":
        store(tmp_path, "cifar10", "python", cifar_files("cifar10", "python", 10))
        flags += ["--width-multiplier", "0.0625", "--batch-size", "25"]
    elif preset == "vit-s4-cifar100":
        store(tmp_path, "cifar100", "python", cifar_files("cifar100", "python"))
        flags += ["--depth", "1", "--width-multiplier", "0.0625", "--batch-size", "10"]
    elif preset == "vit-s16-imagenet":
        image_folder(tmp_path)
        flags += ["--depth", "1", "--width-multiplier", "0.0625", "--batch-size", "3"]
    out = tmp_path / "runs"
    assert vision.main([*flags, "--root", str(tmp_path), "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    folder, result = only_folder(out), result_of(out)
    (row,) = metrics(folder)
    assert row["train_loss"] > 0 and 0 <= row["test_accuracy"] <= 100 and row["skipped_steps"] == 0
    assert result["best_test_accuracy"] == result["last_test_accuracy"] == row["test_accuracy"]
    assert result["fused"] and not result["diverged"] and result["epochs"] == 1
    assert result["settings"] == json.loads((folder / "config.json").read_text())
    assert printed.startswith(f"{result['settings']['model']} on {result['settings']['data']}, width")
    assert f"best test accuracy {row['test_accuracy']:.2f} %" in printed and str(folder) in printed
    if preset in ("resnet18-digits", "vit-mnist1d"):
        assert row["test_accuracy"] > 12  # an epoch of the whole data set teaches something


def test_every_variant_trains(tmp_path, few):
    for variant, parameterization in itertools.product(vision.VARIANTS, ("sp", "mup")):
        flags = ["--variant", variant, "--parameterization", parameterization, "--rho", "0.1"]
        assert vision.main([*TINY_VIT, "--epochs", "3", "--lr", "0.01", *flags, "--out", str(tmp_path)]) == 0
    losses = [[row["train_loss"] for row in metrics(path.parent)] for path in tmp_path.glob("*/result.json")]
    assert all(last < first for first, _, last in losses)
    assert len({last for *_, last in losses}) == len(losses) == 10


def test_training_is_the_loop_of_the_reference(tmp_path, few):
    """Two epochs against the reference's steps, written out here: order, schedule, loss, weights and groups."""
    flags = ["--preset", "vit-mnist1d", "--depth", "1", "--epochs", "2", "--warmup-epochs", "0", "--batch-size", "40"]
    flags += ["--base", "sgd", "--lr", "0.1", "--rho", "0.05", "--label-smoothing", "0.1", "--width-multiplier", "0.25"]
    flags += ["--out", str(tmp_path)]
    assert vision.main([*flags, "--momentum", "0.9", "--weight-decay", "0.01"]) == 0
    args = vision.parse_args(flags)
    images = data.images("mnist1d")
    torch.manual_seed(vision.stream(0))
    model, base = (networks.ViT(w, 1, 4, (1, 40), (1, 4), 10, 1, base_head_dim=12) for w in (96, 48))
    torch.manual_seed(vision.stream(0))
    model = networks.ViT(96, 1, 4, (1, 40), (1, 4), 10, 1, base_head_dim=12)
    mup2_ref.init_(model, base, zero_output=True, gain=1.0)
    networks.zero_queries_(model)
    groups = mup2_ref.param_groups(model, base, lr=0.1, rho=0.05, weight_decay=0.01)
    optimizer = mup2_ref.SAM(groups, torch.optim.SGD, momentum=0.9)
    peak = [g["lr"] for g in optimizer.param_groups]
    x, y = (torch.stack([torch.as_tensor(sample[i]) for sample in images.train]) for i in (0, 1))
    step = 0
    for epoch in range(2):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(vision.stream(args.seed) + epoch))
        losses = []
        for batch in order.split(40):
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / 6))

            def closure():
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            step += 1
        assert metrics(only_folder(tmp_path))[epoch]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    trained = checkpoint(only_folder(tmp_path))["model"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name], p.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(tmp_path, few, amp):
    flags = [*TINY_VIT, "--epochs", "2", "--lr", "0.01"]
    for kind in ("none", amp):
        assert vision.main([*flags, "--amp", kind, "--out", str(tmp_path / kind)]) == 0
    full, half = (metrics(only_folder(tmp_path / kind))[-1]["train_loss"] for kind in ("none", amp))
    assert full != half and half == pytest.approx(full, rel=0.03)
    assert bool(checkpoint(only_folder(tmp_path / amp))["scaler"]) == (amp == "fp16")


def test_a_finished_run_prints_its_result_and_does_nothing(tmp_path, few, capsys, monkeypatch):
    command = [*TINY_VIT, "--out", str(tmp_path)]
    assert vision.main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(vision, "train", None)
    monkeypatch.setattr(data, "images", None)
    assert vision.main(command) == 0
    assert capsys.readouterr().out == last + "\n"


def test_interrupted_and_resumed_in_every_file(tmp_path, capsys, monkeypatch):
    """Ctrl-C in the third epoch; augmentation in this process, warmup, and fp16, for the scaler."""
    store(tmp_path, "cifar100", "python", cifar_files("cifar100", "python"))
    flags = ["--preset", "vit-s4-cifar100", "--depth", "1", "--width-multiplier", "0.0625", "--amp", "fp16"]
    flags += ["--epochs", "4", "--warmup-epochs", "1", "--lr", "0.01", "--workers", "0", "--batch-size", "10"]
    flags += ["--device", "cpu", "--root", str(tmp_path), "--out"]
    assert vision.main([*flags, str(tmp_path / "whole")]) == 0
    out, before = tmp_path / "parts", tmp_path / "before.pt"
    train_epoch, epochs = mup2_ref.train_epoch, iter(range(4))

    def interrupted(*args, **kwargs):
        if (epoch := next(epochs)) == 1:
            shutil.copy(only_folder(out) / "checkpoint.pt", before)
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(mup2_ref, "train_epoch", interrupted)
        assert vision.main([*flags, str(out)]) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    folder = only_folder(out)
    assert len(metrics(folder)) == 2 and not (folder / "result.json").exists()
    os.replace(before, folder / "checkpoint.pt")  # as if the second epoch's had not been written, but its metrics had
    assert vision.main([*flags, str(out)]) == 0
    assert "epoch 2:" in (printed := capsys.readouterr().out) and "epoch 1:" not in printed
    whole = only_folder(tmp_path / "whole")
    assert equal(checkpoint(whole), checkpoint(folder)) and metrics(whole) == metrics(folder)
    assert result_of(tmp_path / "whole")["best_test_accuracy"] == max(r["test_accuracy"] for r in metrics(folder))
    loaded = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard")
    events = loaded.EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [
        (row["epoch"], pytest.approx(row["train_loss"])) for row in metrics(folder)
    ]


def test_without_tensorboard(tmp_path, few, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert vision.main([*TINY_VIT, "--out", str(tmp_path)]) == 0
    assert "no events for TensorBoard" in capsys.readouterr().out
    assert not list(tmp_path.glob("*/events*"))


def test_a_diverged_run_stops_and_counts_as_finished(tmp_path, few, capsys):
    flags = [*TINY_VIT, "--epochs", "5", "--base", "sgd", "--variant", "none", "--lr", "1e9", "--out", str(tmp_path)]
    assert vision.main(flags) == 0
    result, rows = result_of(tmp_path), metrics(only_folder(tmp_path))
    assert result["diverged"] and result["epochs"] == len(rows) < 5 and math.isnan(rows[-1]["train_loss"])
    assert "diverged in epoch" in capsys.readouterr().out
    before = (only_folder(tmp_path) / "checkpoint.pt").stat().st_mtime_ns
    for name in ("metrics.csv", "result.json"):  # as if it had been killed just before
        (only_folder(tmp_path) / name).unlink()
    assert vision.main(flags) == 0
    assert result_of(tmp_path) == result and len(metrics(only_folder(tmp_path))) == len(rows)
    assert (only_folder(tmp_path) / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_folder_of_other_settings_is_refused(tmp_path, few, capsys):
    command = [*TINY_VIT, "--out", str(tmp_path)]
    assert vision.main(command) == 0
    folder = only_folder(tmp_path)
    (folder / "result.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lr": 1.0, "seed": 5}))
    assert vision.main(command) == 2
    assert "other settings (lr, seed)" in capsys.readouterr().err


def start(command, **options):
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ONE_THREAD, text=True) | options
    return subprocess.Popen([sys.executable, *map(str, command)], **options)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


KILLS = int(os.environ.get("MUP2_KILLS", "2"))


def modified(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for_moment(moment, checkpoint, process, rng, epoch_seconds):
    """Until a random time within the next epochs, or in or just after the writing of the checkpoint after the next."""
    if moment == "any time":
        time.sleep(rng.uniform(0, 3 * epoch_seconds))
        return
    written, temporary = modified(checkpoint), checkpoint.with_name("checkpoint.pt.tmp")
    wait_for(lambda: process.poll() is not None or modified(checkpoint) > written, process)
    end, before = time.monotonic() + 60, modified(temporary)
    while process.poll() is None and modified(temporary) == before:  # the one of an earlier life may lie there
        assert time.monotonic() < end, "no checkpoint"
    time.sleep(rng.uniform(0, 0.008))


@pytest.mark.parametrize("kind, workers", [("fused", 1), ("reference", 0)])
def test_killed_at_random_moments_and_resumed_bit_for_bit(tmp_path, capsys, kind, workers):
    """With augmentation, momentum and batch norm; once by Ctrl-C. MUP2_KILLS=20 kills so often."""
    store(tmp_path, "cifar10", "binary", cifar_files("cifar10", "binary", 4))
    moments = (["writing", "any time"] * KILLS)[:KILLS]
    flags = ["--preset", "resnet18-cifar10", *TINY_RESNET, "--epochs", str(8 + 3 * KILLS), "--batch-size", "5"]
    flags += ["--workers", str(workers), "--root", str(tmp_path), "--device", "cpu", "--lr", "0.01"]
    flags += ["--reference"] * (kind == "reference") + ["--out"]
    start_of_whole = time.monotonic()
    assert vision.main([*flags, str(tmp_path / "whole")]) == 0
    epoch_seconds = (time.monotonic() - start_of_whole) / (8 + 3 * KILLS)
    whole = only_folder(tmp_path / "whole")
    assert result_of(tmp_path / "whole")["fused"] == (kind == "fused")

    seed = random.randrange(2**32)
    rng = random.Random(seed)
    ctrl_c = rng.randrange(KILLS + 1)
    moments.insert(ctrl_c, "any time")
    out, history, found = tmp_path / "killed", [], []
    folder = out / whole.name
    lives, too_fast = list(enumerate(moments)), 0
    while lives:
        life, moment = lives.pop(0)
        with (tmp_path / "errors").open("w") as errors:  # no pipe, which a worker that is left behind would keep open
            options = dict(stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
            options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
            process = start([EXPERIMENTS / "vision.py", *flags, out], **options)
        with process.stdout:
            began = time.time_ns()
            process.stdout.readline()  # its settings: the last checkpoint is loaded, and it starts
            if life == 0:
                assert vision.main([*flags, str(out)]) == 2  # the lock
                assert "another process is busy with" in capsys.readouterr().err
            wait_for_moment(moment, folder / "checkpoint.pt", process, rng, epoch_seconds)
            if process.poll() is None and life == ctrl_c:
                os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
            elif process.poll() is None:
                process.send_signal(signal.SIGKILL)
            status, printed = process.wait(60), (tmp_path / "errors").read_text()
        if status == 0:  # faster than the clock that chose the moment: that life is lived again, from the start
            too_fast += 1
            assert too_fast <= KILLS, "it was too fast for this test"
            shutil.rmtree(out)
            history, lives = [], [*lives, (life, moment)]
            continue
        assert status == (130 if life == ctrl_c else -signal.SIGKILL), (seed, printed)
        assert life != ctrl_c or "interrupted; the same command goes on" in printed
        rows = metrics(folder, ()) if (folder / "metrics.csv").exists() else []
        assert rows[: len(history)] == history, f"it started again (seed {seed})"
        found.append((len(rows), "writing" if modified(folder / "checkpoint.pt.tmp") > began else "between"))
        history = rows
    assert len(found) == KILLS + 1
    with capsys.disabled():
        print(f"\n{kind}, seed {seed}, ended after so many epochs: {found}")

    assert vision.main([*flags, str(out)]) == 0
    assert metrics(folder, ())[: len(history)] == history and metrics(folder) == metrics(whole), seed
    a, b = checkpoint(whole), checkpoint(folder)
    assert a["optimizer"]["state"][0]["momentum_buffer"].any() and equal(a, b), seed


# One command per argument, on every rank: keeps the checkpoint before, and each rank's weights in, every evaluation.
SPY = """
import os, shlex, shutil, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import vision
import mup2_ref
evaluate, rank = mup2_ref.evaluate, os.environ["RANK"]
def spy(model, batches, autocast):
    torch.save(model.state_dict(), out / f"rank{rank}.pt")
    for path in out.glob("*/checkpoint.pt"):
        shutil.copy(path, out / f"before{rank}.pt")
    return evaluate(model, batches, autocast)
mup2_ref.evaluate = spy
leave = torch.distributed.destroy_process_group
torch.distributed.destroy_process_group = lambda: None  # one group for all commands saves the time of another start
for command in sys.argv[2:]:
    out = Path(shlex.split(command)[-1])
    out.mkdir(exist_ok=True)
    assert (status := vision.main(shlex.split(command))) == 0, status
    vision.start_processes = lambda args: None
leave()
assert not any("gloo" in thread.read_text() for thread in Path("/proc/self/task").glob("*/comm"))  # they abort at exit
"""


def two_processes(tmp_path, *commands):
    (tmp_path / "spy.py").write_text(SPY)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "spy.py", EXPERIMENTS]
    process = start([*run, *commands], stdout=subprocess.PIPE)
    try:
        printed, errors = process.communicate(timeout=120)
    finally:
        process.terminate()  # which ends both, if they hang
    assert process.returncode == 0, errors
    return printed


def test_two_processes(tmp_path):
    resnet = f"--preset resnet18-digits {' '.join(TINY_RESNET)} --epochs 2 --batch-size 128 --device cpu"
    resnet += f" --out {tmp_path / 'resnet'}"
    vit = "--preset vit-mnist1d --depth 1 --epochs 1 --warmup-epochs 0 --batch-size 500 --lr 0.01 --device cpu --out "
    printed = two_processes(tmp_path, resnet, vit + str(tmp_path / "vit"))
    assert printed.count("best test accuracy") == 2 and printed.count("epoch 1:") == 2  # rank 0 alone prints
    folder = only_folder(tmp_path / "resnet")
    assert json.loads((folder / "config.json").read_text())["processes"] == 2
    weights = [torch.load(tmp_path / "resnet" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = checkpoint(folder)
    assert equal(weights[0], weights[1]) and equal(weights[0], whole["model"])
    # What was written is the evaluation of these weights on the whole test set, 359 images.
    args = vision.parse_args(resnet.split())
    images = data.images("digits")
    model, _ = vision.build_model(args, images.shape, images.classes)
    model.load_state_dict(weights[0])
    loss, correct, samples = mup2_ref.evaluate(model, [images.test.tensors]).tolist()
    rows = metrics(folder)
    assert samples == 359 and rows[-1]["test_accuracy"] == 100 * correct / samples
    assert rows[-1]["test_loss"] == pytest.approx(loss / samples, rel=1e-5)
    # Without batch norm two processes do what one does: SAM of the whole batch, every sample once.
    assert vision.main([*vit.split(), str(tmp_path / "one")]) == 0
    for key, value in metrics(only_folder(tmp_path / "one"))[0].items():
        assert metrics(only_folder(tmp_path / "vit"))[0][key] == pytest.approx(value, rel=1e-3), key
    # Resumed from the checkpoint of the first epoch.
    os.replace(tmp_path / "resnet" / "before0.pt", folder / "checkpoint.pt")
    (folder / "result.json").unlink()
    printed = two_processes(tmp_path, resnet)
    assert "epoch 2:" in printed and "epoch 1:" not in printed
    assert equal(checkpoint(folder), whole) and metrics(folder) == rows


# ------------------------------------------------------------------------------------------------- table 2


def finished_run(out, accuracies, diverged=False, **changed):
    """Result files like vision.py's, one per seed."""
    flags = [word for k, v in changed.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    for seed, accuracy in enumerate(accuracies):
        args = vision.parse_args(["--preset", "resnet18-cifar10", *flags, "--seed", str(seed), "--out", str(out)])
        result = {"settings": vision.settings(args), "best_test_accuracy": accuracy, "diverged": diverged}
        vision.run_folder(args).mkdir(parents=True)
        vision.write_json(vision.run_folder(args) / "result.json", result)


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
    assert table2.main([str(tmp_path), "--markdown"]) == 0
    printed = capsys.readouterr().out
    first = next(
        t
        for t in printed.split("### ")
        if t.startswith("resnet18 on cifar10, width multiplier 0.5, 200 ep") and "| SGD |" in t
    )
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
    assert table2.main([str(tmp_path)]) == 0
    plain = capsys.readouterr().out
    assert "|" not in plain and "95.25 ± 0.35 (2)" in plain
    assert table2.main([str(tmp_path / "nowhere")]) == 2
    assert "error: no finished runs" in capsys.readouterr().err


def test_table2_reads_real_runs(tmp_path, few, capsys):
    for variant in ("none", "sam"):
        assert vision.main([*TINY_VIT, "--variant", variant, "--out", str(tmp_path)]) == 0
    assert table2.main([str(tmp_path), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "vit on mnist1d, 1 layers, 2 heads, patches of 1 x 4, width multiplier 0.0625, 1 epochs" in printed
    accuracies = {
        r["settings"]["variant"]: r["best_test_accuracy"]
        for r in map(json.loads, (p.read_text() for p in tmp_path.glob("*/result.json")))
    }
    assert cells(printed, "AdamW")[3] == f"{accuracies['none']:.2f} (1)"
    assert cells(printed, "SAM")[3:5] == [
        f"{accuracies['sam']:.2f} (1)",
        f"{accuracies['sam'] - accuracies['none']:+.2f}",
    ]


# ------------------------------------------------------------------------------------------------- time per epoch


def test_epoch_time_is_measured(tmp_path, capsys, monkeypatch):
    """A forward pass is made to last 20 ms: SAM's step is two of them, the base optimizer's one."""
    forward, passes = networks.ViT.forward, []

    def slow(self, x):
        passes.append(tuple(x.shape))
        time.sleep(0.02)
        return forward(self, x)

    monkeypatch.setattr(networks.ViT, "forward", slow)
    path = tmp_path / "times.json"
    flags = ["--presets", "vit-mnist1d", "--width-multipliers", "0.0625", "--batch-size", "8", "--device", "cpu"]
    assert epoch_time.main([*flags, "--steps", "5", "--out", str(path)]) == 0
    assert passes == [(8, 1, 1, 40)] * (1 + 2 + 2 + 2 + 2) * (epoch_time.WARMUP + 5)  # SAM's own part apart
    found = json.loads(path.read_text())
    (row,) = found["rows"]
    assert row["parameters"] > 1e4 and (row["batch_size"], row["steps_per_epoch"], row["width"]) == (8, 500, 24)
    assert found["data"] == "synthetic" and (row["steps"], row["amp"], row["torch"]) == (5, "none", torch.__version__)
    ways = row["ways"]
    assert [*ways] == ["base", "reference", "fused"]
    assert 0.02 < ways["base"]["step"] < 0.06 and all(0.04 < ways[w]["step"] < 0.12 for w in ("reference", "fused"))
    assert ways["base"]["share"] is None and all(0 < ways[w]["share"] < 0.5 for w in ("reference", "fused"))
    assert all(way["memory"] is None for way in ways.values())
    printed = capsys.readouterr().out
    assert found["device"] in printed and "synthetic" in printed and "5 steps" in printed
    assert epoch_time.format_table([row]) in printed and epoch_time.format_steps([row]) in printed
    # Another precision is another row; the same again takes the place of the first one.
    assert epoch_time.main([*flags, "--steps", "1", "--amp", "bf16", "--out", str(path)]) == 0
    assert epoch_time.main([*flags, "--steps", "2", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["amp"], row["steps"]) for row in rows] == [("none", 2), ("bf16", 1)]


@pytest.mark.parametrize("flags", [["resnet18-digits", *TINY_RESNET], ["mlp-cifar10", "--width-multiplier", "0.0625"]])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_timed_steps_are_the_same_training(flags, amp, monkeypatch):
    """Four steps in every way: the graph's (with a stand-in) to the bit, the reference's up to rounding."""
    monkeypatch.setattr(mup2_fused, "capture", stand_in)
    weights = {}
    for way, (variant, _) in epoch_time.WAYS.items():
        where = ["--batch-size", "8", "--amp", amp, "--lr", "0.0625", "--device", "cpu"]
        args = vision.parse_args(["--preset", *flags, *where, *variant])
        model, optimizer, train, batch = epoch_time.build(way, args)
        assert torch.isfinite(train([batch] * 4))
        assert vision.is_fused(optimizer) == (way in ("fused", "graph"))
        assert isinstance(optimizer, mup2_ref.SAM) == (way != "base")
        weights[way] = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    assert all(map(torch.equal, weights["graph"], weights["fused"]))
    for p, q in zip(weights["reference"], weights["fused"], strict=True):
        torch.testing.assert_close(p, q)
    assert not any(map(torch.equal, weights["base"], weights["fused"][: len(list(model.parameters()))]))


def test_steps_without_an_update_are_not_timed():
    row = epoch_time.measure(["--preset", "mlp-cifar10", "--batch-size", "8", "--device", "cpu", "--lr", "1e30"], 3)
    assert all("the loss is not finite" in way["error"] for way in row["ways"].values()) and len(row["ways"]) == 3


@pytest.mark.cuda
def test_timing_on_the_gpu(capsys):
    """All four ways; the clock does not make the host wait, but the reference does."""
    flags = ["--preset", "mlp-cifar10", "--batch-size", "8", "--device", "cuda"]
    row = epoch_time.measure(flags, 3)
    assert [*row["ways"]] == [*epoch_time.WAYS] and not any("error" in way for way in row["ways"].values())
    assert all(way["step"] > 0 and way["memory"] > 4 * row["parameters"] for way in row["ways"].values())
    assert all(0 < row["ways"][way]["share"] < 1 for way in ("reference", "fused"))
    for way in ("fused", "graph"):
        _, _, train, batch = epoch_time.build(way, vision.parse_args([*flags, "--variant", "sam"]))
        train([batch])
        torch.cuda.set_sync_debug_mode("error")
        try:
            train([batch] * 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_epoch_time_extrapolates_the_median(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(epoch_time.vision, "device_name", lambda device: "A Device (R) 9")
    monkeypatch.setattr(epoch_time, "possible_ways", lambda args: [*epoch_time.WAYS])
    times = {"base": [0.1, 0.5, 0.2], "reference": [0.7, 0.8, 9.0], "fused": [0.4, 9.0, 0.3], "graph": [0.25] * 3}
    seen = []

    def build(way, args):
        seen.append((args.preset, args.width_multiplier, args.batch_size, args.variant, args.reference))
        if args.width_multiplier == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if way == "graph" and args.preset == "vit-s16-imagenet":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return None, None, way, None

    monkeypatch.setattr(epoch_time, "build", build)
    monkeypatch.setattr(epoch_time, "step_times", lambda train, batch, steps: times[train])
    monkeypatch.setattr(epoch_time, "share_of_sam", lambda optimizer, train, batch, steps: 0.25)
    monkeypatch.setattr(epoch_time, "__file__", str(tmp_path / "epoch_time.py"))
    (tmp_path / "results").mkdir()
    flags = ["--presets", "resnet18-cifar10", "vit-s16-imagenet", "--width-multipliers", "1", "4", "--device", "cpu"]
    assert epoch_time.main([*flags, "--steps", "3"]) == 1
    assert not list((tmp_path / "results").iterdir())  # only when asked
    output = capsys.readouterr()
    assert "RuntimeError: operation not permitted" in output.err
    printed = output.out.splitlines()
    steps, imagenet_steps = 391, 1252  # of 50,000 by 128, of 1,281,167 by 1024
    assert f"| resnet18-cifar10 | 1 | 11.2 M | 128 | {0.2 * steps:.3g} | {0.4 * steps:.0f} | 2.00 |" in printed
    epochs = f"{0.2 * imagenet_steps:.0f} | {0.4 * imagenet_steps:.0f}"
    assert f"| vit-s16-imagenet | 1 | 11.4 M | 1024 | {epochs} | 2.00 |" in printed
    assert "| resnet18-cifar10 | 4 | 179 M | 128 | out of memory | out of memory | - |" in printed
    start = "| resnet18-cifar10 | 64 | 128 | fp32 |"
    assert [line for line in printed if line.startswith(start)] == [
        f"{start} base optimizer | 200 | 5 | 1.00 | - | - |",
        f"{start} SAM, reference | 800 | 1.25 | 4.00 | 25 % | - |",
        f"{start} SAM, fused | 400 | 2.5 | 2.00 | 25 % | - |",
        f"{start} SAM, fused, CUDA graph | 250 | 4 | 1.25 | - | - |",
    ]
    assert "| vit-s16-imagenet | 384 | 1024 | fp32 | SAM, fused, CUDA graph | failed | - | - | - | - |" in printed
    first = ("resnet18-cifar10", 1.0, 128)
    assert seen[:4] == [(*first, "none", False), (*first, "sam", True), *[(*first, "sam", False)] * 2]
    assert epoch_time.main([*flags[:2], *flags[3:], "--out"]) == 0
    rows = json.loads((tmp_path / "results" / "epoch_time_a-device-r-9.json").read_text())["rows"]
    assert [row["ways"]["fused"] for row in rows] == [
        {"step": 0.4, "share": 0.25, "memory": None},
        {"error": "out of memory"},
    ]


# ------------------------------------------------------------------------------------------------- search

optuna = search.optuna
needs_optuna = pytest.mark.skipif(optuna is None, reason="the search takes Optuna")


def trials_of(out, name="small"):
    journal = optuna.storages.journal.JournalFileBackend(str(out / f"{name}.journal"))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(journal)).trials


@needs_optuna
def test_search(tmp_path, few, capsys, monkeypatch):
    """Interrupted in its second trial, which goes on with the same lr and rho; then finished, then extended."""
    trained, train = [], vision.train

    def counted(args, data, quiet):
        trained.append((args.lr, args.rho))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(args, data, quiet)

    monkeypatch.setattr(vision, "train", counted)
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
    assert f"experiments/vision.py {' '.join(TINY_VIT)} --width-multiplier 0.25 {flags}\n" in printed
    assert search.main([*command, "3"]) == 0 and len(trained) == 4  # nothing is missing
    assert search.main([*command, "4"]) == 0 and len(trained) == 5
    assert search.main([*command, "4", "--seed", "1"]) == 2
    assert "study 'small' searches with other settings (seed)" in capsys.readouterr().err
    # The same command elsewhere tries the same points.
    assert search.main([*command[:-2], str(tmp_path / "again"), "--trials", "2"]) == 0
    assert trained[-2:] == [trained[0], trained[1]]


@needs_optuna
def test_search_shared_by_processes(tmp_path):
    """Two commands, one of them with two jobs: enough trials, none twice; what is under way at the end is finished."""
    command = [
        EXPERIMENTS / "search.py",
        "--preset",
        "resnet18-digits",
        *TINY_RESNET,
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    command += ["--batch-size", "359", "--study", "small", "--trials", "5", "--out", tmp_path]
    both = [start(command), start([*command, "--jobs", "2"])]
    for process in both:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
    trials = trials_of(tmp_path)
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    assert 5 <= len(complete) <= 7 and {t.state.name for t in trials} <= {"COMPLETE", "PRUNED"}
    assert len({tuple(t.params.values()) for t in complete}) == len(list(tmp_path.glob("*/result.json")))


@needs_optuna
def test_search_ranges_and_divergence(tmp_path, few, monkeypatch):
    monkeypatch.setattr(vision, "train", lambda *args, quiet: {"diverged": True, "best_test_accuracy": 42.0})
    flags = [*TINY_VIT, "--variant", "none", "--lr-range", "1e8", "1e9", "--study", "small", "--out", str(tmp_path)]
    assert search.main([*flags, "--trials", "1"]) == 0
    (trial,) = trials_of(tmp_path)
    assert trial.params.keys() == {"lr"} and 1e8 <= trial.params["lr"] <= 1e9
    assert trial.value == 10.0  # chance


@pytest.mark.parametrize(
    "flags, message",
    [("--lr 0.1", "--lr: that is what is searched"), ("--rho-range 1 0.1", "must be positive and grow")],
)
def test_search_flags_that_do_not_fit(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        search.main(flags.split())
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_search_errors(tmp_path, capsys, monkeypatch):
    command = ["--preset", "resnet18-cifar10", "--root", str(tmp_path), "--out", str(tmp_path)]
    if search.optuna:
        assert search.main(command) == 2
        assert "error: no CIFAR-10 in" in capsys.readouterr().err
    monkeypatch.setattr(search, "optuna", None)
    assert search.main(command) == 2
    assert "pip install optuna" in capsys.readouterr().err
