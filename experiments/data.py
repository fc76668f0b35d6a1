"""Data sets: as tensors (load), and as images with the paper's augmentations (images).

MNIST-1D comes with this repository (data/NOTICE tells its source and licence), the digits with scikit-learn. CIFAR-10
and CIFAR-100 are read from the archives that their authors publish, in the python or the binary version, packed or
unpacked, ImageNet from a folder of images per class; nothing is ever downloaded.
"""

import io
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

Split = tuple[Tensor, Tensor]
MNIST1D = Path(__file__).parent / "data" / "mnist1d.npz"
CIFAR10 = {  # per version: archive, folder in it, file names
    "python": ("cifar-10-python.tar.gz", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
    "binary": (
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test_batch.bin",
    ),
}
CIFAR100 = {
    "python": ("cifar-100-python.tar.gz", "cifar-100-python", ["train"], "test"),
    "binary": ("cifar-100-binary.tar.gz", "cifar-100-binary", ["train.bin"], "test.bin"),
}


class Cifar(NamedTuple):
    """How one of the two is stored."""

    title: str
    versions: dict[str, tuple[str, str, list[str], str]]
    classes: int
    labels: bytes  # the key of the python version
    label_bytes: int  # of a record of the binary version, in front of the pixels; the last one is the label


CIFAR = {
    "cifar10": Cifar("CIFAR-10", CIFAR10, 10, b"labels", 1),
    "cifar100": Cifar("CIFAR-100", CIFAR100, 100, b"fine_labels", 2),
}


class Facts(NamedTuple):
    """Of a complete data set."""

    shape: tuple[int, int, int]  # (channels, height, width) of what a network gets
    classes: int
    train_samples: int


FACTS = {
    "mnist1d": Facts((1, 1, 40), 10, 4000),
    "digits": Facts((1, 8, 8), 10, 1438),
    "cifar10": Facts((3, 32, 32), 10, 50_000),
    "cifar100": Facts((3, 32, 32), 100, 50_000),
    "imagenet": Facts((3, 224, 224), 1000, 1_281_167),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the colours; the usual ones


class DataError(Exception):
    """A data file is missing or damaged; the message says which, and what to do."""


# ------------------------------------------------------------------------------------------------- as tensors


def load(name: str, root: str | Path | None = None) -> tuple[Split, Split]:
    """(train inputs, train labels), (test inputs, test labels); inputs are standardized, labels are 0, 1, ...

    name: "mnist1d" (inputs (N, 40)), "digits" (N, 1, 8, 8), "cifar10" or "cifar100" (N, 3, 32, 32); the last two per
    channel, and from root, the folder with the archive. Raises DataError.
    """
    if name == "mnist1d":
        return _mnist1d()
    if name == "digits":
        return _digits()
    if name not in CIFAR:
        raise DataError(f"unknown data set {name!r}; choose 'mnist1d', 'digits', 'cifar10' or 'cifar100'")
    splits, mean, std = _cifar(CIFAR[name], _folder(name, root))
    mean, std = mean[:, None, None], std[:, None, None]
    return tuple(
        (torch.from_numpy(((x / np.float32(255) - mean) / std).astype(np.float32)), torch.from_numpy(y))
        for x, y in splits
    )


def batches(split: Split, size: int, shuffle: torch.Generator) -> Iterator[Split]:
    """An epoch of a split that fits in memory, in random order; the last batch may be smaller."""
    x, y = split
    for batch in torch.randperm(len(x), generator=shuffle).to(x.device).split(size):
        yield x[batch], y[batch]


def _mnist1d() -> tuple[Split, Split]:
    with np.load(MNIST1D, allow_pickle=False) as file:
        x, y, x_test, y_test = (torch.from_numpy(file[key]) for key in ("x", "y", "x_test", "y_test"))
    return (x, y.long()), (x_test, y_test.long())


def _digits() -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits are part of scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
    order = np.random.RandomState(0).permutation(len(x))  # numpy promises that this stream stays what it is
    train, test = np.split(order, [len(x) - len(x) // 5])
    x = (x - x[train].mean()) / x[train].std()
    return (x[train], y[train].long()), (x[test], y[test].long())


# ------------------------------------------------------------------------------------------------- as images


class Images(NamedTuple):
    """Map-style data sets of (image, label), and the sizes that a network needs."""

    train: Dataset
    test: Dataset
    shape: tuple[int, int, int]  # of one image: (channels, height, width), float32
    classes: int


def images(name: str, root: str | Path | None = None) -> Images:
    """A data set for networks on images, augmented as in the paper; the random streams are torch's global ones.

    name: "cifar10": crop after padding by 4, and flip. "cifar100": the same, and AutoAugment, as for the paper's ViT.
    "imagenet": root/train/CLASS/* and root/val/CLASS/*; RandomResizedCrop(224) and flip, for testing the center of
    the image resized to 256. "digits" and "mnist1d" ((1, 1, 40), one row): not augmented. Raises DataError.
    """
    if name == "imagenet":
        return _imagenet(_folder(name, root))
    if name in CIFAR:
        splits, mean, std = _cifar(CIFAR[name], _folder(name, root))
        v2 = _v2()
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.tolist(), std.tolist())]
        augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        if name == "cifar100":
            augment.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))
        transforms = v2.Compose(augment + last), v2.Compose(last)
        train, test = (_Pixels(*map(torch.from_numpy, split), t) for split, t in zip(splits, transforms))
        return Images(train, test, *FACTS[name][:2])
    splits = load(name)
    train, test = (TensorDataset(x.reshape(-1, *FACTS[name].shape), y) for x, y in splits)
    return Images(train, test, *FACTS[name][:2])


def synthetic(like: str, count: int) -> TensorDataset:
    """count random images with random labels, in the shape of a data set: for timing; there is nothing to learn."""
    shape, classes, _ = FACTS[like]
    random = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, *shape, generator=random), torch.randint(classes, (count,), generator=random)
    )


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators do not fit torch (a build for CUDA beside a torch for the CPU).

    Importing it then fails, because it describes operators that were never loaded. They are for object detection, and
    nothing here calls them: declared by name they are enough for the import. Raises DataError if it is not installed.
    """
    try:
        import torchvision
    except ImportError as error:
        raise DataError("reading these images takes torchvision: pip install torchvision") from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for operator in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", signature)
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:  # imported by half
            del sys.modules[module]
        import torchvision
    return torchvision


def _v2() -> ModuleType:
    import_torchvision()
    from torchvision.transforms import v2

    return v2


class _Pixels(Dataset):
    """uint8 images (N, C, h, w) that go through a transform when they are read."""

    def __init__(self, x: Tensor, y: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.x, self.y, self.transform = x, y, transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.x[i]), self.y[i]


def _imagenet(root: Path) -> Images:
    v2 = _v2()
    from torchvision.datasets import ImageFolder

    last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    augment = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *last])
    center = v2.Compose([v2.Resize(256), v2.CenterCrop(224), *last])
    try:
        train, test = ImageFolder(root / "train", augment, loader=_rgb), ImageFolder(root / "val", center, loader=_rgb)
    except OSError as error:
        raise DataError(f"no ImageNet in {root}, which must hold train/CLASS/* and val/CLASS/*: {error}") from error
    if train.classes != test.classes:
        raise DataError(f"{root}: train and val do not hold the same classes")
    return Images(train, test, FACTS["imagenet"].shape, len(train.classes))


def _rgb(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"{path} is damaged: {error}") from error


# ------------------------------------------------------------------------------------------------- CIFAR's files


def _folder(name: str, root: str | Path | None) -> Path:
    if root is None:
        what = "train and val" if name == "imagenet" else "its archive"
        raise DataError(f"{name} is not part of this repository: pass --root, the folder with {what}")
    return Path(root)


def _cifar(kind: Cifar, root: Path) -> tuple[tuple[Any, Any], np.ndarray, np.ndarray]:
    """(train, test), each uint8 images (N, 3, 32, 32) and labels (N); mean, std (3) of train, pixels 0 to 1."""
    for version, (archive, folder, train_names, test_name) in kind.versions.items():
        if (root / folder).is_dir() or root.name == folder:
            source = root if root.name == folder else root / folder
            read = {name: _file_bytes(source / name) for name in (*train_names, test_name)}
        elif (root / archive).is_file():
            source = root / archive
            read = _tar_bytes(source, [f"{folder}/{name}" for name in (*train_names, test_name)], kind)
        else:
            continue
        parse = _parse_python if version == "python" else _parse_binary
        parts = [parse(content, f"{name} of {source}", kind) for name, content in read.items()]
        x, y = np.concatenate([x for x, _ in parts[:-1]]), np.concatenate([y for _, y in parts[:-1]])
        mean, std = x.mean((0, 2, 3)) / 255, x.std((0, 2, 3)) / 255
        if not std.all():
            raise DataError(f"{source}: a colour channel is constant; the archive is damaged, download it again")
        return ((x, y), parts[-1]), mean, std
    raise DataError(
        f"no {kind.title} in {root}: expected {' or '.join(v[0] for v in kind.versions.values())}, "
        f"or one of the folders {' or '.join(v[1] for v in kind.versions.values())} that they unpack to"
    )


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _tar_bytes(path: Path, names: list[str], kind: Cifar) -> dict[str, bytes]:
    try:
        with tarfile.open(path) as tar:
            return {name: tar.extractfile(name).read() for name in names}
    except KeyError as error:
        raise DataError(f"{path} is not the {kind.title} archive: {error.args[0]}") from error
    except Exception as error:  # tarfile, gzip and zlib each raise their own
        raise DataError(f"{path} is damaged ({error}); download it again") from error


def _parse_binary(content: bytes, where: str, kind: Cifar) -> tuple[np.ndarray, np.ndarray]:
    size = kind.label_bytes + 3072
    if not content or len(content) % size:
        raise DataError(f"{where} has {len(content)} bytes, not a multiple of {size}: damaged, download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return _checked(records[:, kind.label_bytes :], records[:, kind.label_bytes - 1], where, kind)


class _ArraysOnly(pickle.Unpickler):
    """Reads the dict of arrays that the python version holds, and refuses to call anything else."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return self.ALLOWED[module, name]


def _parse_python(content: bytes, where: str, kind: Cifar) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        x, y = np.asarray(batch[b"data"]), np.asarray(batch[kind.labels])
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{where} is damaged ({error}); download it again") from error
    return _checked(x, y, where, kind)


def _checked(x: np.ndarray, y: np.ndarray, where: str, kind: Cifar) -> tuple[np.ndarray, np.ndarray]:
    right = x.dtype == np.uint8 and x.ndim == 2 and x.shape[1] == 3072 and y.shape == x.shape[:1]
    if not (right and y.size and y.dtype.kind in "iu" and y.min() >= 0 and y.max() < kind.classes):
        raise DataError(
            f"{where} does not hold 32x32 colour images with labels 0 to {kind.classes - 1}: damaged, download it again"
        )
    return x.reshape(-1, 3, 32, 32).copy(), y.astype(np.int64)
