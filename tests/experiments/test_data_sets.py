"""Data sets as shipped, damaged and missing ones, and their augmentations."""

import itertools
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_runs import ROOT, cifar_files, cifar_parts, image_folder, store

from experiments import cifar, data
from experiments.cifar import CIFAR
from experiments.commands import DataError

NAMES = pytest.mark.parametrize("name", CIFAR)
VERSIONS = pytest.mark.parametrize("version", ["python", "binary"])


def test_embedded_and_synthetic_data():
    for name in ("digits", "mnist1d"):
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


def test_label_noise_spares_the_test_set():
    (x, y), test = data.load("digits")
    (x_noisy, y_noisy), test_noisy = data.load("noisy-digits")
    assert torch.equal(x, x_noisy) and all(map(torch.equal, test, test_noisy))
    assert (y != y_noisy).float().mean().item() == pytest.approx(0.4 * 0.9, abs=0.04)
    assert torch.equal(y_noisy, data.load("noisy-digits")[0][1])


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
