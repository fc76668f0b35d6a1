"""Times of training steps: that they are measured right, of the right training, and make the right tables."""

import json

import pytest
import torch
from small_runs import TINY_RESNET, refusal

import mup2_fused as mup2
import mup2_ref
from experiments import epoch_time, networks
from experiments.epoch_time_tables import WAYS, format_steps, format_table
from experiments.vision_run import is_compiled

FLAGS = ["--presets", "vit-mnist1d", "--width-multipliers", "0.0625", "--batch-size", "8", "--device", "cpu"]


def test_epoch_time_is_measured(tmp_path, capsys, monkeypatch):
    """On a clock that moves by 20 ms in a forward pass, by 5 ms in SAM's first call, and by 5 ms in torch's AdamW."""
    now, passes = [0.0], []

    def lasting(seconds, call):
        def slow(*args, **kwargs):
            now[0] += seconds
            if isinstance(args[0], networks.ViT):
                passes.append(tuple(args[1].shape))
            return call(*args, **kwargs)

        return slow

    monkeypatch.setattr(epoch_time.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(networks.ViT, "forward", lasting(0.02, networks.ViT.forward))
    for kind, name in ((mup2.SAM, "first_step"), (mup2_ref.SAM, "first_step"), (torch.optim.AdamW, "step")):
        monkeypatch.setattr(kind, name, lasting(0.005, getattr(kind, name)))
    path = tmp_path / "times.json"
    assert epoch_time.main([*FLAGS, "--steps", "3", "--out", str(path)]) == 0
    assert passes == [(8, 1, 1, 40)] * (1 + 2 + 2 + 2 + 2) * (epoch_time.WARMUP + 3)  # SAM's own part apart
    found = json.loads(path.read_text())
    (row,) = found["rows"]
    assert row["parameters"] > 1e4 and (row["batch_size"], row["steps_per_epoch"], row["width"]) == (8, 500, 24)
    assert found["data"] == "synthetic" and (row["steps"], row["amp"], row["torch"]) == (3, "none", torch.__version__)
    ways = row["ways"]
    assert [*ways] == ["base", "reference", "fused"]
    assert {name: (way["step"], way["share"]) for name, way in ways.items()} == {
        "base": (pytest.approx(0.025), None),
        "reference": (pytest.approx(0.05), pytest.approx(0.01 / 0.05)),
        "fused": (pytest.approx(0.045), pytest.approx(0.005 / 0.045)),  # its kernels take the step
    }
    assert all(way["memory"] is None for way in ways.values())
    printed = capsys.readouterr().out
    assert found["device"] in printed and "synthetic" in printed and "3 steps" in printed
    assert format_table([row]) in printed and format_steps([row]) in printed


def test_a_file_of_times_is_added_to(tmp_path, capsys):
    """Another precision is another row; the same again takes the place of the first one."""
    path = tmp_path / "times.json"
    for flags in (["--steps", "1"], ["--steps", "1", "--amp", "bf16"], ["--steps", "2"]):
        assert epoch_time.main([*FLAGS, *flags, "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["amp"], row["steps"]) for row in rows] == [("none", 2), ("bf16", 1)]
    # Files of another device, or of something else, stay as they are.
    whole = path.read_text()
    damaged = [whole[:-9], whole.replace('"device"', '"place"'), whole.replace('"ways"', '"way"'), "[1]", ""]
    for content in ('{"device": "x", "rows": []}', *damaged):
        message = (
            f"error: {path} has times of another device, x" if "x" in content[:14] else f"error: cannot read {path} ("
        )
        path.write_text(content)
        said = refusal(capsys, epoch_time.main, *FLAGS, "--out", str(path))
        assert said.startswith(message) and "name another file" in said and said.count("\n") == 1
        assert path.read_text() == content


@pytest.mark.parametrize("flags", [["resnet18-digits", *TINY_RESNET], ["mlp-cifar10", "--width-multiplier", "0.0625"]])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_timed_steps_are_the_same_training(flags, amp, monkeypatch):
    """Four steps in every way: the graph's (replayed without one) to the bit, the reference's up to rounding."""
    monkeypatch.setattr(mup2, "capture", lambda step, model, optimizer, *example: step)
    weights = {}
    for way in WAYS:
        where = ["--batch-size", "8", "--amp", amp, "--lr", "0.0625", "--device", "cpu"]
        optimizer, training, batch = epoch_time.build(way, ["--preset", *flags, *where])
        assert torch.isfinite(training.train_epoch([batch] * 4))
        assert is_compiled(optimizer) == (way in ("fused", "graph")) and bool(training.replay) == (way == "graph")
        assert isinstance(optimizer, mup2_ref.SAM) == (way == "reference")
        weights[way] = [t.detach().clone() for t in training.model.state_dict().values()]
    assert all(map(torch.equal, weights["graph"], weights["fused"]))
    for p, q in zip(weights["reference"], weights["fused"], strict=True):
        torch.testing.assert_close(p, q)
    assert not torch.equal(weights["base"][0], weights["fused"][0])


def test_steps_without_an_update_are_not_timed():
    flags = ["--preset", "mlp-cifar10", "--width-multiplier", "0.0625", "--batch-size", "8", "--device", "cpu"]
    row = epoch_time.measure([*flags, "--lr", "1e30"], 3)
    assert all("the loss is not finite" in way["error"] for way in row["ways"].values()) and len(row["ways"]) == 3


@pytest.mark.cuda
def test_timing_on_the_gpu():
    """All four ways; the clock does not make the host wait, but the reference does."""
    flags = ["--preset", "mlp-cifar10", "--batch-size", "8", "--device", "cuda"]
    row = epoch_time.measure(flags, 3)
    assert [*row["ways"]] == [*WAYS] and not any("error" in way for way in row["ways"].values())
    assert all(way["step"] > 0 and way["memory"] > 4 * row["parameters"] for way in row["ways"].values())
    assert all(0 < row["ways"][way]["share"] < 1 for way in ("reference", "fused"))
    for way in ("fused", "graph"):
        _, training, batch = epoch_time.build(way, flags)
        training.train_epoch([batch])
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.train_epoch([batch] * 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_epoch_time_extrapolates_the_median(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(epoch_time, "device_name", lambda device: "A Device (R) 9")
    monkeypatch.setattr(epoch_time, "possible_ways", lambda args: [*WAYS])
    times = {"base": [0.1, 0.5, 0.2], "reference": [0.7, 0.8, 9.0], "fused": [0.4, 9.0, 0.3], "graph": [0.25] * 3}

    def build(way, flags):
        if flags[3] == "4":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if way == "graph" and flags[1] == "vit-s16-imagenet":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return None, way, None

    monkeypatch.setattr(epoch_time, "build", build)
    monkeypatch.setattr(epoch_time, "step_times", lambda training, batch, steps: times[training])
    monkeypatch.setattr(epoch_time, "share_of_sam", lambda *args: 0.25)
    monkeypatch.setattr(epoch_time.gc, "collect", lambda: None)  # which takes seconds after other tests
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
    assert f"| 1024 | {0.2 * imagenet_steps:.0f} | {0.4 * imagenet_steps:.0f} | 2.00 |" in output.out
    assert "| resnet18-cifar10 | 4 | 179 M | 128 | out of memory | out of memory | - |" in printed
    start = "| resnet18-cifar10 | 64 | 128 | fp32 |"
    assert [line for line in printed if line.startswith(start)] == [
        f"{start} base optimizer | 200 | 5 | 1.00 | - | - |",
        f"{start} SAM, reference | 800 | 1.25 | 4.00 | 25 % | - |",
        f"{start} SAM, compiled | 400 | 2.5 | 2.00 | 25 % | - |",
        f"{start} SAM, compiled, CUDA graph | 250 | 4 | 1.25 | - | - |",
    ]
    assert "| vit-s16-imagenet | 384 | 1024 | fp32 | SAM, compiled, CUDA graph | failed | - | - | - | - |" in printed
    assert epoch_time.main([*flags[:2], *flags[3:], "--out"]) == 0
    rows = json.loads((tmp_path / "results" / "epoch_time_a-device-r-9.json").read_text())["rows"]
    fused = [{"step": 0.4, "share": 0.25, "memory": None}, {"error": "out of memory"}]
    assert [row["ways"]["fused"] for row in rows] == fused
