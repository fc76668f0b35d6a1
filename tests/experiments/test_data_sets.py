"""Data sets as shipped, damaged and missing ones, and their augmentations."""

import argparse
import gzip
import itertools
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import cifar_parts, image_folder, refusal, store_cifar

from experiments import data, fashion_mnist
from experiments.commands import DataError

NAMES = pytest.mark.parametrize("name", data.CIFAR)


def test_embedded_and_synthetic_data():
    for name in ("digits", "mnist1d", "fashion-mnist-5k", "fashion-mnist-1k"):
        images, facts = data.images(name), data.FACTS[name]
        x, y = images.train.tensors
        assert images[2:] == facts[:2] and x.shape == (facts.train_samples, *facts.shape)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64) and sorted(y.unique().tolist()) == list(range(10))
        assert x.mean().abs() < 1e-2 and abs(x.std() - 1) < 1e-2
        (same, _), (again, _) = data.load(name), data.load(name)
        assert torch.equal(same[0].reshape(x.shape), x) and torch.equal(same[0], again[0])
    (x, y), (x_test, y_test) = data.load("mnist1d")
    assert (x.shape, x_test.shape) == ((4000, 40), (1000, 40))
    assert torch.cat([y, y_test]).bincount().tolist() == [500] * 10
    assert torch.cat([x, x_test]).mean().abs() < 1e-6 and abs(torch.cat([x, x_test]).std() - 1) < 1e-4
    x, y = data.synthetic("cifar100", 50)
    assert x.shape == (50, 3, 32, 32) and y.shape == (50,) and 0 <= y.min() and 50 < y.max() < 100


def test_mnist1d_can_be_made_again():
    made = pytest.importorskip("mnist1d.data", reason="pip install mnist1d to make the data set again")
    fresh = made.make_dataset(made.get_dataset_args())
    (x, y), (x_test, y_test) = data.load("mnist1d")
    for mine, key in ((x, "x"), (y, "y"), (x_test, "x_test"), (y_test, "y_test")):
        assert np.array_equal(mine.numpy(), fresh[key].astype(mine.numpy().dtype)), key


def test_digits_are_split_without_loss(monkeypatch):
    from sklearn import datasets

    (x, _), (x_test, _) = data.load("digits")
    assert (len(x), len(x_test)) == (1438, 359)
    together, original = torch.cat([x, x_test]).flatten(1), torch.tensor(datasets.load_digits().data)
    scale = original.std() / together.std()
    recovered = (together.double() * scale - together.double().mean() * scale + original.mean()).round()
    assert sorted(map(tuple, recovered.tolist())) == sorted(map(tuple, original.tolist()))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        data.images("digits")


@pytest.mark.parametrize("name, noisy, share", [("digits", "noisy-", 0.4), ("fashion-mnist-5k", "noisy30-", 0.3)])
def test_label_noise_spares_the_test_set(name, noisy, share):
    (x, y), test = data.load(name)
    (x_noisy, y_noisy), test_noisy = data.load(noisy + name)
    assert torch.equal(x, x_noisy) and all(map(torch.equal, test, test_noisy))
    assert (y != y_noisy).float().mean().item() == pytest.approx(share * 0.9, abs=0.02)
    assert torch.equal(y_noisy, data.load(noisy + name)[0][1])
    images = data.images(noisy + name)
    assert torch.equal(images.train.tensors[1], y_noisy) and (images.shape, images.classes) == (x.shape[1:], 10)


def test_names_of_data():
    (_, y), _ = data.load("noisy0-digits")
    assert torch.equal(y, data.load("digits")[0][1])
    assert torch.equal(data.load("noisy40-digits")[0][1], data.load("noisy-digits")[0][1])
    with pytest.raises(DataError, match="noisy101: not more than 100 %"):
        data.load("noisy101-digits")
    for name in ("mnist1d", "noisy-digits", "noisy30-fashion-mnist-5k", "cifar100"):
        assert data.loadable(name) == name
    assert [data.title(name) for name in ("noisy-digits", "noisy30-fashion-mnist-5k", "cifar100")] == [
        "8 x 8 digits, 40 % random labels",
        "5,000 images of Fashion-MNIST, 30 % random labels",
        "CIFAR-100",
    ]
    for name in ("noisy30digits", "imagenet", "noisy-", "fashion-mnist-6k"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{name} is none of cifar10, .*, mnist1d"):
            data.loadable(name)


def fashion_files(count=20):
    """File name -> content, of a small Fashion-MNIST."""
    random, files = np.random.default_rng(0), {}
    for prefix, n in (("train", 2 * count), ("t10k", count)):
        pixels = random.integers(0, 256, n * 784, dtype=np.uint8).tobytes()
        files[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4I", 0x803, n, 28, 28) + pixels
        files[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, n) + bytes(i % 10 for i in range(n))
    return files


def store_fashion(folder, files, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(content, 1) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path, packed, below, capsys):
    files = fashion_files()
    store_fashion(tmp_path / below, files, packed)
    (x, y), (x_test, y_test) = data.load("fashion-mnist", tmp_path)
    assert (x.shape, x_test.shape) == ((40, 1, 28, 28), (20, 1, 28, 28))
    assert x.mean().abs() < 1e-5 and abs(x.std() - 1) < 1e-5
    assert y.tolist() == [*range(10)] * 4 and y_test.tolist() == [*range(10)] * 2
    for images, prefix in ((x, "train"), (x_test, "t10k")):  # each where it belongs, and in the order of the file
        pixels = np.frombuffer(files[f"{prefix}-images-idx3-ubyte"], np.uint8, offset=16)
        assert np.corrcoef(pixels, images.flatten())[0, 1] == pytest.approx(1)
    images = data.images("fashion-mnist", tmp_path)
    assert torch.equal(images.train.tensors[0], x) and images.shape == (1, 28, 28)
    said = refusal(capsys, fashion_mnist.main, "--root", str(tmp_path), "--out", str(tmp_path / "part.npz"))
    assert "a class has fewer than 500 images" in said and not (tmp_path / "part.npz").exists()


def test_the_part_of_fashion_mnist(tmp_path, monkeypatch):
    """It is balanced, without a picture twice, and small; and the command that made it takes what it says."""
    assert fashion_mnist.PART.stat().st_size < 3e6
    for (x, y), per_class in zip(fashion_mnist.part(), fashion_mnist.PER_CLASS):
        assert np.bincount(y).tolist() == [per_class] * 10 and len(np.unique(x, axis=0)) == len(x)
    store_fashion(tmp_path, fashion_files())
    monkeypatch.setattr(fashion_mnist, "PER_CLASS", (2, 1))
    paths = tmp_path / "one.npz", tmp_path / "two.npz"
    for path in paths:
        assert fashion_mnist.main(["--root", str(tmp_path), "--out", str(path)]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    monkeypatch.setattr(fashion_mnist, "PART", paths[0])
    (x, y), _ = fashion_mnist.part()
    (all_x, all_y), _ = fashion_mnist.read(tmp_path)
    rows = [[i for i in range(len(all_x)) if np.array_equal(all_x[i], image)] for image in x]
    assert all(len(row) == 1 for row in rows) and rows == sorted(rows)
    assert np.array_equal(all_y[np.ravel(rows)], y) and np.bincount(y).tolist() == [2] * 10
    paths[0].write_bytes(paths[1].read_bytes()[:-3000])
    with pytest.raises(DataError, match=f"cannot read {paths[0]} .* get it again"):
        data.load("fashion-mnist-5k")


def test_the_part_of_fashion_mnist_can_be_made_again():
    source = Path("/usr/share/datasets/fashion-mnist")
    if not source.exists():
        pytest.skip("install Debian's package dataset-fashion-mnist to make the part of Fashion-MNIST again")
    whole = fashion_mnist.read(source)
    for (x, y), split, per_class in zip(fashion_mnist.part(), whole, fashion_mnist.PER_CLASS):
        fresh_x, fresh_y = fashion_mnist.chosen(split, per_class)
        assert np.array_equal(x, fresh_x) and np.array_equal(y, fresh_y)


def test_fashion_mnist_missing(tmp_path):
    with pytest.raises(DataError, match=f"no Fashion-MNIST in {tmp_path}: expected train-images-idx3-ubyte"):
        data.load("fashion-mnist", tmp_path)
    with pytest.raises(DataError, match="pass --root, the folder with its files"):
        data.load("fashion-mnist")
    files = fashion_files()
    files.pop("t10k-labels-idx1-ubyte")
    store_fashion(tmp_path, files)
    with pytest.raises(DataError, match=f"no t10k-labels-idx1-ubyte in {tmp_path}, plain or .gz"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_fashion_mnist_damaged(tmp_path, packed, part):
    """Cut off, too long, of another type or shape, or announcing more than there is."""
    files, name = fashion_files(), f"t10k-{part}-ubyte"
    path, whole = tmp_path / (name + ".gz" * packed), files[name]
    places = range(16 if "images" in part else 8)
    changed = [whole[:i] + bytes([whole[i] ^ bits]) + whole[i + 1 :] for i in places for bits in (1, 128)]
    cut = [whole[:n] for n in (0, 3, 7, 8, 12, 16, len(whole) - 1)]
    for content in (*changed, *cut, whole + b"x", b"not it" * 9, struct.pack(">4I", 0x803, 0, 28, 28)):
        store_fashion(tmp_path, files | {name: content}, packed)
        with pytest.raises(DataError, match=f"cannot read {path} .*: it is damaged or not of Fashion-MNIST"):
            data.load("fashion-mnist", tmp_path)
    store_fashion(tmp_path, files | {"t10k-images-idx3-ubyte": fashion_files(10)["t10k-images-idx3-ubyte"]}, packed)
    with pytest.raises(DataError, match=r"has 10 images, .* 20 labels: replace both"):
        data.load("fashion-mnist", tmp_path)
    store_fashion(tmp_path, files | {"t10k-labels-idx1-ubyte": files["t10k-labels-idx1-ubyte"][:-1] + b"\x0a"}, packed)
    with pytest.raises(DataError, match="has a label 10, beyond 9"):
        data.load("fashion-mnist", tmp_path)
    black = files["train-images-idx3-ubyte"][:16] + bytes(40 * 784)
    store_fashion(tmp_path, files | {"train-images-idx3-ubyte": black}, packed)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.*: all pixels are the same"):
        data.load("fashion-mnist", tmp_path)


def test_damaged_gzip_and_one_that_unpacks_without_end(tmp_path, monkeypatch):
    store_fashion(tmp_path, files := fashion_files())
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[: len(whole) // 2], whole[:-4], whole[:-8] + bytes(8), b"x" + whole):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read {path} "):
            data.load("fashion-mnist", tmp_path)
    path.write_bytes(gzip.compress(files["train-images-idx3-ubyte"][:16] + bytes(2**20)))
    sizes, read = [], gzip.GzipFile.read

    def watched(file, size=-1):
        sizes.append(size)
        return read(file, size)

    monkeypatch.setattr(gzip.GzipFile, "read", watched)
    with pytest.raises(DataError, match=rf"40 x 28 x 28 bytes announced, {2**20} there"):
        data.load("fashion-mnist", tmp_path)
    assert sizes == [16 + 60_000 * 784 + 1]


@NAMES
@pytest.mark.parametrize("packed", [True, False])
def test_cifar(tmp_path, monkeypatch, name, packed):
    parts = cifar_parts(name)
    store_cifar(monkeypatch, tmp_path, name, packed=packed)
    (x, y), (x_test, y_test) = data.load(name, tmp_path)
    assert x.shape[1:] == x_test.shape[1:] == (3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert y.tolist() == [*parts[0][1]] * (len(parts) - 1) and y_test.tolist() == [*parts[-1][1]]
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    images = data.images(name, tmp_path)
    assert images[2:] == data.FACTS[name][:2] and images.train.x.dtype == torch.uint8
    for split, (pixels, _) in ((images.train, parts[0]), (images.test, parts[-1])):  # each where it belongs
        assert np.array_equal(split.x[: len(pixels)].numpy().reshape(len(pixels), -1), pixels)
    for i in (0, 19):  # with the same statistics, those of the training set
        torch.testing.assert_close(images.test[i][0], x_test[i])
        assert images.test[i][1] == y_test[i]


@NAMES
def test_cifar_missing_or_damaged(tmp_path, monkeypatch, name):
    """Nothing is downloaded, and no damaged file is unpacked or read: torchvision knows the checksum of each."""
    monkeypatch.setattr("urllib.request.urlopen", None)
    kind = getattr(data.import_torchvision().datasets, name.upper())
    expected = rf"no {name} in .* there must be {kind.filename}, or the folder {kind.base_folder}"
    with pytest.raises(DataError, match="pass --root"):
        data.load(name)
    with pytest.raises(DataError, match=expected):
        data.load(name, tmp_path)
    store_cifar(monkeypatch, tmp_path, name)
    archive = tmp_path / kind.filename
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=expected):
        data.images(name, tmp_path)
    archive.write_bytes(whole)
    data.load(name, tmp_path)
    file = tmp_path / kind.base_folder / kind.test_list[0][0]
    archive.unlink()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=expected):
        data.load(name, tmp_path)


def test_cifar10_is_cropped_and_flipped(tmp_path, monkeypatch):
    """Every augmented image is one of the 9 x 9 x 2 possible ones, and not always the same."""
    store_cifar(monkeypatch, tmp_path, "cifar10", 2)
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


def test_cifar100_is_augmented_like_cifar10_and_by_the_policy(tmp_path, monkeypatch):
    names = []
    for name in ("cifar10", "cifar100"):
        store_cifar(monkeypatch, tmp_path, name)
        names.append([type(t).__name__ for t in data.images(name, tmp_path).train.transform.transforms])
    assert names[0] == ["RandomCrop", "RandomHorizontalFlip", "ToDtype", "Normalize"]
    assert names[1] == [*names[0][:2], "AutoAugment", *names[0][2:]]


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


def test_imagenet_folder_with_faults(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no ImageNet in .*train/CLASS"):
        data.images("imagenet", tmp_path)
    with pytest.raises(DataError, match="pass --root, the folder with train and val"):
        data.images("imagenet")
    broken = image_folder(tmp_path) / "val" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=f"cannot read {broken} .*: replace or remove this image"):
        data.images("imagenet", tmp_path).test[4]
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=rf"cannot read {broken.parent / '0.png'} \(DecompressionBombError"):
        data.images("imagenet", tmp_path).test[3]
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cow")
    with pytest.raises(DataError, match="do not hold the same classes"):
        data.images("imagenet", tmp_path)
