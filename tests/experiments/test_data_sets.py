"""Data sets as shipped, damaged and missing ones, and their augmentations."""

import argparse
import gzip
import itertools
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import ROOT, cifar_files, cifar_parts, image_folder, refusal, store

from experiments import cifar, data, fashion_mnist
from experiments.cifar import CIFAR
from experiments.commands import DataError

NAMES = pytest.mark.parametrize("name", CIFAR)
VERSIONS = pytest.mark.parametrize("version", ["python", "binary"])


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


def test_names_of_data():
    (_, y), _ = data.load("noisy0-digits")
    assert torch.equal(y, data.load("digits")[0][1])
    assert torch.equal(data.load("noisy40-digits")[0][1], data.load("noisy-digits")[0][1])
    with pytest.raises(DataError, match="noisy101: not more than 100 %"):
        data.load("noisy101-digits")
    for name in ("mnist1d", "noisy-digits", "noisy30-fashion-mnist-5k", "cifar100"):
        assert data.loadable(name) == name
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
    assert (x.shape, x_test.shape) == ((40, 1, 28, 28), (20, 1, 28, 28)) and (x.dtype, y.dtype) == (
        torch.float32,
        torch.int64,
    )
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
@VERSIONS
@pytest.mark.parametrize("packed", [True, False])
def test_cifar(tmp_path, name, version, packed):
    parts = cifar_parts(name, scale=5 if name == "cifar100" else 1)
    where = store(tmp_path, name, version, cifar_files(name, version, parts), packed)
    (x, y), (x_test, y_test) = data.load(name, tmp_path)
    assert x.shape[1:] == x_test.shape[1:] == (3, 32, 32) and x.dtype == torch.float32
    assert y.tolist() == [*parts[0][1]] * (len(parts) - 1) and y_test.tolist() == [*parts[-1][1]]
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    images = data.images(name, tmp_path)
    assert images[2:] == ((3, 32, 32), CIFAR[name].classes) and images.train.x.dtype == torch.uint8
    for split, (pixels, _) in ((images.train, parts[0]), (images.test, parts[-1])):  # each where it belongs
        assert np.array_equal(split.x[: len(pixels)].numpy().reshape(len(pixels), -1), pixels)
    for i in (0, 19):  # with the same statistics, those of the training set
        torch.testing.assert_close(images.test[i][0], x_test[i])
        assert images.test[i][1] == y_test[i]
    if not packed:
        assert torch.equal(data.load(name, where)[0][0], x)  # the folder itself may be the root


@NAMES
def test_cifar_missing(tmp_path, name):
    kind = CIFAR[name]
    archives = kind.archive("python"), kind.archive("binary")
    with pytest.raises(DataError, match=rf"no {kind.title} in .*{archives[0]} or {archives[1]}"):
        data.load(name, tmp_path)
    with pytest.raises(DataError, match="pass --root"):
        data.load(name)
    store(tmp_path, name, "python", dict([*cifar_files(name, "python").items()][:-1]))
    with pytest.raises(DataError, match=f"is damaged or not the {kind.title} archive"):
        data.load(name, tmp_path)
    folder = store(tmp_path, name, "binary", dict([*cifar_files(name, "binary").items()][:-1]), packed=False)
    (tmp_path / archives[0]).unlink()
    with pytest.raises(DataError, match=f"cannot read {folder}.*{kind.files[-1]}.bin: No such file"):
        data.load(name, tmp_path)


@NAMES
@VERSIONS
def test_cifar_damaged(tmp_path, name, version):
    files, kind = cifar_files(name, version), CIFAR[name]
    first = next(iter(files))
    for content in (files[first][:-1], b"", b"not it"):
        store(tmp_path, name, version, files | {first: content})
        with pytest.raises(DataError, match=f"{first} of .*damaged"):
            data.images(name, tmp_path)
    path = store(tmp_path, name, version, files)
    content = path.read_bytes()
    for keep in (0, 10, len(content) // 2, int(0.99 * len(content))):
        path.write_bytes(content[:keep])
        with pytest.raises(DataError, match=f"cannot read {path} .* download it again"):
            data.load(name, tmp_path)
    parts = cifar_parts(name)
    parts[0] = (parts[0][0], parts[0][1] + kind.classes - 15)  # beyond the last class
    store(tmp_path, name, version, cifar_files(name, version, parts))
    with pytest.raises(DataError, match=f"{first} of .* labels 0 to {kind.classes - 1}"):
        data.load(name, tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("arbitrary code ran",)


@pytest.mark.parametrize("labels", [[1, 100], [-1, 0], [0.5, 1], ["a", "b"], [1], Evil()])
def test_impossible_labels_and_code_in_a_pickle(tmp_path, labels, capsys):
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": labels}
    store(tmp_path, "cifar100", "python", {"train": pickle.dumps(batch, protocol=2), "test": b""})
    with pytest.raises(DataError, match=r"train of .*damaged"):
        data.load("cifar100", tmp_path)
    assert "arbitrary" not in capsys.readouterr().out


def pickle_of_python2(x, labels, module=b"numpy.core", flags=0):
    """A batch of CIFAR-10 as Python 2 wrote it. flags: of the type of the array, where 1 means pointers to objects."""
    array = b"c%b.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x07(K\x01K%cM\x00\x0c\x86"
    array %= module, len(x)
    array += (
        b"cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\x09(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK%ctb" % flags
    )
    array += b"%cT%b%btb" % (0x88 if x.flags.f_contiguous else 0x89, struct.pack("<i", x.size), x.tobytes("A"))
    start = b"\x80\x02}q\x01(U\x0bbatch_labelU\x15training batch 1 of 5U\x06labels]q\x02("
    return start + b"".join(b"K%c" % y for y in labels) + b"eU\x04data%bU\x09filenames]U\x05a.pngau." % array


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_the_pickles_of_the_authors(order, module):
    (pixels, labels), kind = cifar_parts("cifar10")[0], CIFAR["cifar10"]
    content = pickle_of_python2(np.array(pixels, order=order), labels, module)
    x, y = cifar.parse_python(content, "file", kind)
    assert np.array_equal(x.reshape(pixels.shape), pixels) and [*y] == [*labels] and x.flags.c_contiguous
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], pixels)


def test_no_pickle_harms_the_interpreter():
    """One whose bytes are marked as pointers to objects; changed bytes and cut-off ends."""
    script = "import sys; from experiments.cifar import CIFAR, parse_python; "
    script += "parse_python(sys.stdin.buffer.read(), 'file', CIFAR['cifar10'])"
    pixels, labels = (part[:3] for part in cifar_parts("cifar10")[0])
    content = pickle_of_python2(pixels, labels, flags=1)
    ended = subprocess.run([sys.executable, "-c", script], input=content, capture_output=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    content = pickle_of_python2(pixels, labels)
    first = content.index(pixels.tobytes())
    places = [i for i in range(len(content)) if not first < i < first + pixels.size - 1]
    damaged = [content[:i] + bytes([content[i] ^ bits]) + content[i + 1 :] for i in places for bits in (1, 16, 255)]
    damaged += [content[:i] for i in (*places, first + 1000)]
    huge = b"\x80\x02]r\xff\xff\xff\xff."  # a place in the memo of which an array would take 32 GiB
    right = 0
    for wrong in (*damaged, huge):
        try:
            x, y = cifar.parse_python(wrong, "file", CIFAR["cifar10"])
        except DataError as error:
            assert "file" in str(error) and "download it again" in str(error)
        else:
            right += 1
            assert x.shape[1:] == (3, 32, 32) and x.dtype == np.uint8 and len(x) == len(y) and {*y} <= {*range(10)}
    assert 0 < right < len(damaged) / 2


def test_cifar10_is_cropped_and_flipped(tmp_path):
    """Every augmented image is one of the 9 x 9 x 2 possible ones, and not always the same."""
    store(tmp_path, "cifar10", "binary", cifar_files("cifar10", "binary", cifar_parts("cifar10", 2)))
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
    names = []
    for name in ("cifar10", "cifar100"):
        store(tmp_path, name, "binary", cifar_files(name, "binary"))
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
    whole = (broken.parent / "0.png").read_bytes()
    for i in range(len(whole)):  # Pillow answers with errors of many kinds
        broken.write_bytes(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :])
        try:
            assert data.rgb(str(broken)).mode == "RGB"
        except DataError as error:
            assert str(error).startswith(f"cannot read {broken} (")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=rf"cannot read {broken.parent / '0.png'} \(DecompressionBombError"):
        data.images("imagenet", tmp_path).test[3]
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cow")
    with pytest.raises(DataError, match="do not hold the same classes"):
        data.images("imagenet", tmp_path)
