"""Data sets, damaged and missing ones too, and the sweep: that it resumes, reports and trains the real methods."""

import io
import itertools
import json
import pickle
import tarfile
import time
from unittest import mock

import numpy as np
import pytest
import torch
from test_graph import stand_in

import data
import mup2_fused
import mup2_ref
import transfer
import vision

# ------------------------------------------------------------------------------------------------ MNIST-1D


def test_mnist1d_as_shipped():
    (x, y), (x_test, y_test) = data.load("mnist1d")
    assert (x.shape, y.shape, x_test.shape, y_test.shape) == ((4000, 40), (4000,), (1000, 40), (1000,))
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.cat([y, y_test]).bincount().tolist() == [500] * 10
    assert torch.cat([x, x_test]).mean().abs() < 1e-6 and abs(torch.cat([x, x_test]).std() - 1) < 1e-4


def test_mnist1d_can_be_made_again():
    made = pytest.importorskip("mnist1d.data", reason="pip install mnist1d to make the data set again")
    fresh = made.make_dataset(made.get_dataset_args())
    (x, y), (x_test, y_test) = data.load("mnist1d")
    for mine, key in ((x, "x"), (y, "y"), (x_test, "x_test"), (y_test, "y_test")):
        assert np.array_equal(mine.numpy(), fresh[key].astype(mine.numpy().dtype)), key


# ------------------------------------------------------------------------------------------------ CIFAR-10

N = 20  # images per file; the real ones have 10,000


def batches():
    random = np.random.default_rng(0)
    return [(random.integers(0, 256, (N, 3072), dtype=np.uint8), np.arange(N) % 10) for _ in range(6)]


def python_files(content=None):
    for (x, y), name in zip(content or batches(), [*data.CIFAR10["python"][2], data.CIFAR10["python"][3]]):
        batch = {b"batch_label": b"1", b"labels": y.tolist(), b"data": x, b"filenames": [b"a.png"] * len(y)}
        yield name, pickle.dumps(batch, protocol=2)


def binary_files(content=None):
    for (x, y), name in zip(content or batches(), [*data.CIFAR10["binary"][2], data.CIFAR10["binary"][3]]):
        yield name, np.hstack([y[:, None].astype(np.uint8), x]).tobytes()


def archive(root, version, files):
    name, folder, *_ = data.CIFAR10[version]
    with tarfile.open(root / name, "w:gz") as tar:
        for file, content in files:
            info = tarfile.TarInfo(f"{folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return root / name


def unpacked(root, version, files):
    folder = root / data.CIFAR10[version][1]
    folder.mkdir()
    for file, content in files:
        (folder / file).write_bytes(content)
    return folder


FILES = {"python": python_files, "binary": binary_files}


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("packed", [True, False])
def test_cifar10(tmp_path, version, packed):
    where = (archive if packed else unpacked)(tmp_path, version, FILES[version]())
    (x, y), (x_test, _y_test) = data.load("cifar10", tmp_path)
    assert (x.shape, x_test.shape) == ((5 * N, 3, 32, 32), (N, 3, 32, 32)) and x.dtype == torch.float32
    assert y.tolist() == list(np.arange(N) % 10) * 5
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    raw = torch.from_numpy(batches()[5][0].reshape(N, 3, 32, 32)).float()
    correlation = torch.corrcoef(torch.stack([x_test[:, 1].flatten(), raw[:, 1].flatten()]))[0, 1]
    assert correlation > 0.99999  # channels and pixels are where they belong
    if not packed:
        assert torch.equal(data.load("cifar10", where)[0][0], x)  # the folder itself may be the root


class Evil:
    def __reduce__(self):
        return print, ("arbitrary code ran",)


def test_cifar10_never_runs_code(tmp_path, capsys):
    files = dict(python_files()) | {"data_batch_3": pickle.dumps({b"data": Evil(), b"labels": [1]})}
    archive(tmp_path, "python", files.items())
    with pytest.raises(data.DataError, match=r"data_batch_3 of .*damaged \(refused to load .*print"):
        data.load("cifar10", tmp_path)
    assert "arbitrary" not in capsys.readouterr().out


def test_cifar10_missing(tmp_path):
    with pytest.raises(data.DataError, match=r"no CIFAR-10 in .*cifar-10-python.tar.gz or cifar-10-binary.tar.gz"):
        data.load("cifar10", tmp_path)
    with pytest.raises(data.DataError, match="pass --root"):
        data.load("cifar10")
    archive(tmp_path, "python", list(python_files())[:-1])
    with pytest.raises(data.DataError, match="test_batch"):
        data.load("cifar10", tmp_path)
    folder = unpacked(tmp_path, "binary", list(binary_files())[:-1])
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(data.DataError, match=f"cannot read {folder}.*test_batch.bin: No such file"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_cifar10_cut_off(tmp_path, version, keep):
    path = archive(tmp_path, version, FILES[version]())
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(data.DataError, match=r"cifar-10-.*(damaged|is not the CIFAR-10 archive)"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("version", FILES)
def test_cifar10_damaged_content(tmp_path, version):
    wrong = batches()
    wrong[2] = (wrong[2][0], wrong[2][1] + 5)  # labels 10 to 14
    archive(tmp_path, version, FILES[version](wrong))
    with pytest.raises(data.DataError, match=r"data_batch_3.* labels 0 to 9"):
        data.load("cifar10", tmp_path)
    files = dict(FILES[version]())
    name = next(iter(files))
    for damage in (files[name][:-1], b"", b"not it"):
        archive(tmp_path, version, (files | {name: damage}).items())
        with pytest.raises(data.DataError, match="data_batch_1"):
            data.load("cifar10", tmp_path)


# --------------------------------------------------------------------------------------------------- the sweep

SMALL = ["--widths", "8", "16", "--lrs", "0.1", "0.2", "--rhos", "0.1", "0.3", "--seeds", "1", "--slice-seeds", "2"]


def test_sweep_resumes_and_reports(tmp_path, capsys):
    command = [*SMALL, "--epochs", "1", "--out", str(tmp_path)]
    assert transfer.main(command) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "transfer_mnist1d.jsonl"
    rows = path.read_text().splitlines()
    ran = [tuple(json.loads(row)[k] for k in ("method", "width", "lr", "rho", "seed")) for row in rows]
    assert len(ran) == len(set(ran))
    grid = itertools.product(transfer.METHODS, (8, 16), (0.1, 0.2), (0.1, 0.3), (0,))
    assert {*grid, *itertools.product(transfer.SGD.values(), (8, 16), (0.1, 0.2), (0.0,), (0,))} <= set(ran)
    for method, width in itertools.product(transfer.METHODS, (8, 16)):  # the slice: one lr, all seeds, finer steps
        cut = [lr for lr in (0.1, 0.2) if (method, width, lr, 0.1778, 1) in ran]
        assert cut and {(method, width, cut[0], rho, s) for rho in (0.1, 0.1778, 0.3) for s in (0, 1)} <= set(ran)
    assert all(method in printed for method in transfer.METHODS) and (tmp_path / "transfer_mnist1d.png").exists()
    table = json.loads((tmp_path / "transfer_mnist1d.json").read_text())["rows"]
    assert [(r["method"], r["width"]) for r in table] == [(m, w) for m in transfer.METHODS for w in (8, 16)]
    assert all(r["regret"] == 0 for r in table if r["width"] == 8) and all(r["regret"] >= 0 for r in table)
    # Interrupted in the middle of a line: that run and the missing ones are trained again, no other.
    path.write_text("\n".join(rows[:-3]) + "\n" + rows[-3][:40])
    assert transfer.main(command) == 0
    capsys.readouterr()
    again = path.read_text().splitlines()

    def keyed(lines):
        return {tuple(json.loads(x)[k] for k in transfer.Run._fields): json.loads(x)["best"] for x in lines}

    assert again[:-3] == rows[:-3] and keyed(again) == keyed(rows), "a run is reproducible"
    assert transfer.main(command) == 0
    assert capsys.readouterr().out == printed and path.read_text().splitlines() == again


def test_sweep_trains_what_it_says(tmp_path):
    """Two runs of one epoch against a loop written here."""
    (x, y), (x_test, y_test) = data.load("mnist1d")
    for method, rho_l in (("muP²", (16 * 0.1, 0.1, 0.1 / 16)), ("muP-global", (0.1 / 4,) * 3)):
        row = transfer.train(transfer.Run("mnist1d", method, 16, 0.2, 0.1, 3, 1), None, "cpu")
        torch.manual_seed(3)
        shapes = [torch.empty(16, 40), torch.empty(16, 16), torch.empty(10, 16)]
        for w in shapes:  # what nn.Linear draws and init_ replaces
            torch.nn.init.kaiming_uniform_(w, a=5**0.5)
        for w in (torch.empty(1, 40), torch.empty(1, 1), torch.empty(10, 1)):
            torch.nn.init.kaiming_uniform_(w, a=5**0.5)
        weights = [
            w.normal_(0, s).requires_grad_() for w, s in zip(shapes, ((2 / 40) ** 0.5, (2 / 16) ** 0.5, 2**0.5 / 16))
        ]
        scaling = (4.0, 0.25, 1 / 64) if method == "muP²" else (1.0, 1.0, 1.0)  # n^(-d_l)

        def gradients(x, y, weights):
            h = (x @ weights[0].T).relu()
            f = (h @ weights[1].T).relu() @ weights[2].T
            return f, torch.autograd.grad(torch.nn.functional.cross_entropy(f, y), weights) if y is not None else None

        order = torch.randperm(4000, generator=torch.Generator().manual_seed(3))
        for batch in order.split(64):
            _, g = gradients(x[batch], y[batch], weights)
            norm = sum((s * v.double().norm()) ** 2 for s, v in zip(scaling, g)) ** 0.5
            climbed = [(w + r * v / norm).detach().requires_grad_() for w, r, v in zip(weights, rho_l, g)]
            _, g = gradients(x[batch], y[batch], climbed)
            weights = [
                (w - lr * v).detach().requires_grad_() for w, lr, v in zip(weights, (16 * 0.2, 0.2, 0.2 / 16), g)
            ]
        f, _ = gradients(x_test, None, weights)
        accuracy = 100 * (f.argmax(1) == y_test).float().mean().item()
        assert row["best"] == row["last"] == pytest.approx(accuracy, abs=0.3)  # rounding may flip a sample or two


@pytest.mark.parametrize("network, widths", [("resnet", ["8", "16"]), ("vit", ["16", "32"])])
def test_sweep_of_networks(tmp_path, capsys, network, widths):
    command = ["--network", network, "--widths", *widths, "--lrs", "0.02", "--rhos", "0.1", "--epochs", "1"]
    assert transfer.main([*command, "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert f"| muP² | {widths[1]} |" in capsys.readouterr().out
    path = tmp_path / f"transfer_{network}_noisy-digits.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["network"] for row in rows} == {network}
    last = {(row["method"], row["width"]): row["last"] for row in rows}
    narrow, wide = map(int, widths)
    assert last["muP²", narrow] == last["SP-naive", narrow], "at the base width both are plain SAM"
    assert last["muP²", wide] != last["SP-naive", wide] and last["muP²", wide] != last["muP-SGD", wide]
    assert json.loads((tmp_path / f"transfer_{network}_noisy-digits.json").read_text())["args"]["network"] == network


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method, network", [("muP²", "mlp"), ("SP-LP", "mlp"), ("muP-SGD", "mlp"), ("muP²", "resnet")])
def test_a_captured_run_is_the_run(device, method, network, monkeypatch):
    """On a CPU with a stand-in. The last batch is smaller; ResNet-18 has batch norm, momentum and a schedule."""
    monkeypatch.setattr(mup2_fused, "capture", captured := mock.Mock(side_effect=stand_in))
    name, width = ("mnist1d", 32) if network == "mlp" else ("noisy-digits", 8)
    rho = 0.0 if method == "muP-SGD" else 0.1
    run = transfer.Run(name, method, width, 0.25, rho, 3, 2, network)
    rows = [transfer.train(run, None, device, graph) for graph in (False, True)]
    assert captured.call_count == (rho > 0)
    assert rows[0]["finished"] == rows[1]["finished"] == 2 and rows[0]["date"] == time.strftime("%Y-%m-%d")
    assert rows[0]["device"] == rows[1]["device"] == vision.device_name(device)
    for score in ("best", "last"):
        assert rows[0][score] == pytest.approx(rows[1][score], abs=0 if device == "cpu" else 5)


def test_graph_needs_a_gpu(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit:
        transfer.main(["--graph", "--out", str(tmp_path)])
    assert exit.value.code == 2 and "--graph takes --device cuda, and mup2_fused built" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert transfer.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_sweep_without_a_slice(tmp_path, capsys):
    """The grid is all that is trained, with its own seeds; table and figure are made of it."""
    options = ["--widths", "8", "16", "--lrs", "0.1", "0.2", "--epochs", "1", "--seeds", "2", "--slice-seeds", "0"]
    assert transfer.main([*options, "--rhos", "0.1", "0.3", "--out", str(tmp_path), "--name", "small"]) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "small.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2 * (len(transfer.METHODS) * 2 + len(transfer.SGD))
    assert (tmp_path / "small.png").exists() and printed.count("(2) |") == 2 * len(transfer.METHODS)
    summary = json.loads((tmp_path / "small.json").read_text())
    assert summary["device"] == [vision.device_name("cpu")] and summary["date"] == sorted({r["date"] for r in rows})


def test_label_noise_spares_the_test_set():
    (x, y), test = data.load("digits")
    (x_noisy, y_noisy), test_noisy = transfer._data("noisy-digits", None, "cpu")
    assert torch.equal(x, x_noisy) and all(map(torch.equal, test, test_noisy))
    assert (y != y_noisy).float().mean().item() == pytest.approx(0.4 * 0.9, abs=0.04)
    assert all(map(torch.equal, (x_noisy, y_noisy), transfer._data.__wrapped__("noisy-digits", None, "cpu")[0]))


def test_sweep_on_cifar10(tmp_path, capsys):
    archive(tmp_path, "python", python_files())
    command = ["--data", "cifar10", "--out", str(tmp_path), "--epochs", "1", "--methods", "muP²", *SMALL]
    assert transfer.main([*command, "--root", str(tmp_path)]) == 0
    assert "| muP² | 16 |" in capsys.readouterr().out
    assert transfer.main([*command, "--root", str(tmp_path / "nowhere")]) == 2
    assert "error: no CIFAR-10 in" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [torch.optim.SGD, mup2_ref.SAM])
def test_training_loop(kind):
    """Passes, modes, schedule and sums; that it learns what it says is test_sweep_trains_what_it_says."""
    seen = []

    class Spy(mup2_ref.MLP):
        def forward(self, x):
            seen.append((self.training, len(x), torch.is_grad_enabled()))
            return super().forward(x)

    model = Spy(4, 8, 2)
    split = torch.randn(10, 4), torch.randint(2, (10,))
    optimizer = kind(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(model(split[0]), split[1])
    seen.clear()
    loss = mup2_ref.train_epoch(model, optimizer, [split], scheduler=scheduler)
    assert torch.equal(loss, before) and optimizer.param_groups[0]["lr"] == 0.05
    passes = 2 if kind is mup2_ref.SAM else 1
    assert seen == [(True, 10, True)] * passes
    seen.clear()
    total, correct, samples = mup2_ref.evaluate(model, data.batches(split, 4, torch.Generator())).tolist()
    assert seen == [(False, 4, False), (False, 4, False), (False, 2, False)]
    f = model(split[0])
    assert (correct, samples) == ((f.argmax(1) == split[1]).sum().item(), 10)
    assert total == pytest.approx(torch.nn.functional.cross_entropy(f, split[1], reduction="sum").item(), rel=1e-5)


def test_training_loop_restores_when_the_second_pass_fails():
    class Fails(mup2_ref.MLP):
        passes = 0

        def forward(self, x):
            self.passes += 1
            if self.passes == 2:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Fails(4, 8, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        mup2_ref.train_epoch(model, mup2_ref.SAM(model.parameters()), [(torch.randn(3, 4), torch.tensor([0, 1, 0]))])
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before))


@pytest.mark.parametrize("graph", [False, True])
def test_a_diverging_run_is_recorded(graph, monkeypatch):
    monkeypatch.setattr(mup2_fused, "capture", stand_in)
    row = transfer.train(transfer.Run("mnist1d", "SP-naive", 64, 1e9, 0.1, 0, 3), None, "cpu", graph)
    assert row["finished"] < 3 and row["best"] <= 20
