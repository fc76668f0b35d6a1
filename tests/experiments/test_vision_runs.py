"""Runs of the vision experiments, from start to end: that they train what they say, stop, go on, and finish."""

import json
import math
import os
import shutil
import sys

import pytest
import torch
from small_problems import closure_of
from small_runs import (
    TINY_RESNET,
    TINY_VIT,
    checkpoint,
    equal,
    image_folder,
    metrics,
    only_folder,
    refusal,
    result_of,
    store_cifar,
    use_few_samples,
)

import mup2_fused as mup2
from experiments import data, networks, vision
from experiments.presets import PRESETS
from experiments.vision_run import stream


def small(preset, root, monkeypatch):
    """Flags, and data where they are not part of the repository, for an epoch of seconds."""
    flags = ["--preset", preset, "--epochs", "1", "--warmup-epochs", "0", "--workers", "0", "--width-multiplier"]
    name = PRESETS[preset]["data"]
    if name in data.CIFAR:
        store_cifar(monkeypatch, root, name, 10)
    if name == "imagenet":
        image_folder(root)
    return flags + {
        "resnet18-cifar10": [*TINY_RESNET[1:], "--batch-size", "25"],
        "mlp-cifar10": ["0.0625", "--batch-size", "25"],
        "vit-s4-cifar100": ["0.0625", "--depth", "1", "--batch-size", "10"],
        "vit-s16-imagenet": ["0.0625", "--depth", "1", "--batch-size", "3"],
        "vit-mnist1d": ["0.125", "--depth", "1"],
    }.get(preset, ["0.125"])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_to_its_end(tmp_path, preset, capsys, monkeypatch):
    out = tmp_path / "runs"
    flags = [*small(preset, tmp_path, monkeypatch), "--root", str(tmp_path), "--out", str(out), "--device", "cpu"]
    assert vision.main(flags) == 0
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


@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_training_is_a_plain_loop(tmp_path, monkeypatch, backend):
    """Two epochs against steps written out here: order, schedule, loss, weights and groups."""
    use_few_samples(monkeypatch)
    flags = "--preset vit-mnist1d --depth 1 --epochs 2 --warmup-epochs 0 --batch-size 40 --width-multiplier 0.25 "
    flags += "--base sgd --lr 0.1 --rho 0.05 --label-smoothing 0.1 --momentum 0.9 --weight-decay 0.01 --backend "
    assert vision.main([*flags.split(), backend, "--out", str(tmp_path)]) == 0
    torch.manual_seed(stream(0))
    sizes = (1, 4, (1, 40), (1, 4), 10, 1)
    model = networks.ViT(96, *sizes, base_head_dim=12)
    with torch.device("meta"):
        base = networks.ViT(48, *sizes, base_head_dim=12)
    mup2.init_(model, base, zero_output=True, gain=1.0)
    networks.zero_queries_(model)
    groups = mup2.param_groups(model, base, lr=0.1, rho=0.05, weight_decay=0.01)
    optimizer = mup2.SAM(groups, torch.optim.SGD, momentum=0.9, backend="torch")
    peak = [g["lr"] for g in optimizer.param_groups]
    images = data.images("mnist1d")
    x, y = (torch.stack([torch.as_tensor(sample[i]) for sample in images.train]) for i in (0, 1))
    step = 0
    for epoch in range(2):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(stream(0) + epoch))
        losses = []
        for batch in order.split(40):
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / 6))
            loss = lambda _: torch.nn.functional.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1)
            losses.append(optimizer.step(closure_of(optimizer, None, loss)).item())
            step += 1
        assert metrics(only_folder(tmp_path))[epoch]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    trained = checkpoint(only_folder(tmp_path))["model"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name], p.detach(), rtol=1e-4, atol=1e-6)


def test_mixed_precision(tmp_path, monkeypatch):
    use_few_samples(monkeypatch)
    losses = {}
    for amp in ("none", "bf16", "fp16"):
        flags = [*TINY_VIT, "--epochs", "2", "--lr", "0.01", "--amp", amp, "--out", str(tmp_path / amp)]
        assert vision.main(flags) == 0
        losses[amp] = metrics(only_folder(tmp_path / amp))[-1]["train_loss"]
        assert bool(checkpoint(only_folder(tmp_path / amp))["scaler"]) == (amp == "fp16")
    assert len({*losses.values()}) == 3 and [*losses.values()] == pytest.approx([losses["none"]] * 3, rel=0.03)


def test_a_finished_run_prints_its_result_and_does_nothing(tmp_path, capsys, monkeypatch):
    """Without TensorBoard, it says so and trains all the same. Another process's or another run's folder is refused."""
    use_few_samples(monkeypatch)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    command = [*TINY_VIT, "--out", str(tmp_path)]
    assert vision.main(command) == 0
    printed = capsys.readouterr().out
    assert "no events for TensorBoard" in printed and not list(tmp_path.glob("*/events*"))
    with monkeypatch.context() as patch:
        patch.setattr(vision, "train", None)
        patch.setattr(data, "images", None)
        assert vision.main(command) == 0
    assert capsys.readouterr().out == printed.splitlines()[-1] + "\n"
    folder = only_folder(tmp_path)
    (folder / "result.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lr": 1.0, "seed": 5}))
    assert vision.main(command) == 2
    assert "other settings (lr, seed)" in capsys.readouterr().err


def test_interrupted_and_resumed_in_every_file(tmp_path, capsys, monkeypatch):
    """Ctrl-C in the third epoch; augmentation in this process, warmup, and fp16, for the scaler."""
    store_cifar(monkeypatch, tmp_path, "cifar100")
    flags = ["--preset", "vit-s4-cifar100", "--depth", "1", "--width-multiplier", "0.0625", "--amp", "fp16"]
    flags += ["--epochs", "4", "--warmup-epochs", "1", "--lr", "0.01", "--workers", "0", "--batch-size", "10"]
    flags += ["--device", "cpu", "--root", str(tmp_path), "--out"]
    assert vision.main([*flags, str(tmp_path / "whole")]) == 0
    out, before = tmp_path / "parts", tmp_path / "before.pt"
    train_epoch, epochs = mup2.train_epoch, iter(range(4))

    def interrupted(*args, **kwargs):
        if (epoch := next(epochs)) == 1:
            shutil.copy(only_folder(out) / "checkpoint.pt", before)
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(mup2, "train_epoch", interrupted)
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


def test_damaged_files_of_a_run(tmp_path, capsys, monkeypatch):
    use_few_samples(monkeypatch)
    command = [*TINY_VIT, "--out", str(tmp_path)]
    assert vision.main(command) == 0
    whole = {path: path.read_bytes() for path in only_folder(tmp_path).iterdir()}
    for name in ("result.json", "config.json", "checkpoint.pt"):
        path = only_folder(tmp_path) / name
        for content in (whole[path][:-9], whole[path][: len(whole[path]) // 2], b"", b"[1]"):
            path.write_bytes(content)
            said = refusal(capsys, vision.main, *command)
            assert said.startswith(f"error: cannot read {path} (") and "remove this file" in said
            assert said.count("\n") == 1 and path.read_bytes() == content
        path.write_bytes(whole[path])
        (only_folder(tmp_path) / "result.json").unlink(missing_ok=True)
    assert vision.main(command) == 0 and result_of(tmp_path) == json.loads(whole[only_folder(tmp_path) / "result.json"])


def test_a_damaged_image_ends_the_run_with_its_name(tmp_path, capsys, monkeypatch):
    """In a process that reads data, too, whose errors arrive with a traceback."""
    broken = image_folder(tmp_path) / "val" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for workers in ("0", "1"):
        flags = [*small("vit-s16-imagenet", tmp_path / workers, monkeypatch), "--workers", workers, "--device", "cpu"]
        said = refusal(capsys, vision.main, *flags, "--root", str(tmp_path), "--out", str(tmp_path / "runs"))
        assert said.splitlines()[-1].startswith(f"error: cannot read {broken} (") and "Traceback" not in said


def test_skipped_steps_are_counted_from_the_start(tmp_path, monkeypatch):
    """A gradient is not finite in the first of two epochs. The count is in the checkpoint, and goes on from there."""
    use_few_samples(monkeypatch)
    command = [*TINY_VIT, "--epochs", "2", "--out", str(tmp_path)]
    train_epoch, epochs = mup2.train_epoch, iter(range(3))

    def interrupted(model, optimizer, batches, **options):
        if (epoch := next(epochs)) == 1:
            raise KeyboardInterrupt
        nan = [(x * (math.nan if epoch == 0 and i == 1 else 1), y) for i, (x, y) in enumerate(batches)]
        return train_epoch(model, optimizer, nan, **options).nan_to_num(1.0)

    monkeypatch.setattr(mup2, "train_epoch", interrupted)
    assert vision.main(command) == 130
    assert vision.main(command) == 0
    assert [row["skipped_steps"] for row in metrics(only_folder(tmp_path))] == [1, 1]


def test_a_diverged_run_stops_and_counts_as_finished(tmp_path, capsys, monkeypatch):
    use_few_samples(monkeypatch)
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
