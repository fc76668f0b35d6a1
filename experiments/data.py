"""Data sets: as tensors (load), and as images with the paper's augmentations (images).

MNIST-1D and a part of Fashion-MNIST come with this repository (datasets/NOTICE tells their sources and licences), the
digits come with scikit-learn. All of Fashion-MNIST, CIFAR-10 and CIFAR-100 are read from the files that their authors
publish (CIFAR by torchvision), ImageNet from a folder of images per class. Nothing is ever downloaded.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from experiments import fashion_mnist
from experiments.commands import DataError, reading

Split = tuple[Tensor, Tensor]  # inputs, labels
MNIST1D = Path(__file__).parent / "datasets" / "mnist1d.npz"
CIFAR = ("cifar10", "cifar100")
NOISY = re.compile(r"noisy(\d{1,3})?-(.+)")  # percent of the training labels, and the name of the data without noise
LABEL_NOISE = 40  # percent, where the name has no number


class Facts(NamedTuple):
    """What is known of a complete data set without reading it."""

    shape: tuple[int, int, int]  # (channels, height, width) of what a network gets
    classes: int
    train_samples: int
    title: str


FACTS = {
    "mnist1d": Facts((1, 1, 40), 10, 4000, "MNIST-1D"),
    "digits": Facts((1, 8, 8), 10, 1438, "8 x 8 digits"),
    "fashion-mnist": Facts((1, 28, 28), 10, 60_000, "Fashion-MNIST"),
    "fashion-mnist-5k": Facts((1, 28, 28), 10, 5000, "5,000 images of Fashion-MNIST"),
    "fashion-mnist-1k": Facts((1, 28, 28), 10, 1000, "1,000 images of Fashion-MNIST"),
    "cifar10": Facts((3, 32, 32), 10, 50_000, "CIFAR-10"),
    "cifar100": Facts((3, 32, 32), 100, 50_000, "CIFAR-100"),
    "imagenet": Facts((3, 224, 224), 1000, 1_281_167, "ImageNet"),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the colours, as everybody uses them


def load(name: str, root: str | Path | None = None) -> tuple[Split, Split]:
    """(train inputs, train labels), (test inputs, test labels); inputs are standardized, labels are 0, 1, ...

    name: "mnist1d" (inputs (N, 40)), "digits" (N, 1, 8, 8), "fashion-mnist" or its parts "fashion-mnist-5k" and "-1k"
    (N, 1, 28, 28), "cifar10" or "cifar100" (N, 3, 32, 32; standardized per channel). CIFAR and the whole Fashion-MNIST
    come from root, the folder with their files. "noisy-" in front of a name makes 40 % of the training labels random,
    and "noisy30-" makes 30 %, so that there is something to overfit; test labels stay right. Raises DataError.
    """
    plain, percent = without_noise(name)
    if plain != name:
        (x, y), test = load(plain, root)
        return (x, with_noise(y, percent)), test
    if name in ("mnist1d", "digits"):
        return load_mnist1d() if name == "mnist1d" else load_digits()
    if name.startswith("fashion-mnist"):
        return load_fashion_mnist(name, root)
    splits = cifar(name, folder(name, root))
    mean, std = (s[:, None, None] for s in colours(splits[0][0]))
    scaled = lambda x: ((x / np.float32(255) - mean) / std).astype(np.float32)
    return tuple((torch.from_numpy(scaled(x)), torch.from_numpy(y)) for x, y in splits)


def without_noise(name: str) -> tuple[str, int]:
    """The name of the data without label noise, and how many percent of the labels are random."""
    noisy = NOISY.fullmatch(name)
    return (noisy[2], int(noisy[1] or LABEL_NOISE)) if noisy else (name, 0)


def title(name: str) -> str:
    """What figures call the data."""
    plain, percent = without_noise(name)
    return FACTS[plain].title + f", {percent} % random labels" * (percent > 0)


def loadable(text: str) -> str:
    """The type of a flag whose value is a name that load() knows."""
    names = sorted(FACTS.keys() - {"imagenet"})
    if without_noise(text)[0] not in names:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(names)}, after noisy- or noisy30- or not")
    return text


def batches(split: Split, size: int, shuffle: torch.Generator) -> Iterator[Split]:
    """One epoch of a split that fits in memory, in random order; the last batch may be smaller."""
    x, y = split
    for batch in torch.randperm(len(x), generator=shuffle).to(x.device).split(size):
        yield x[batch], y[batch]


def with_noise(y: Tensor, percent: int) -> Tensor:
    """The labels, with the same ones replaced by random labels in every call; some random labels are the right ones."""
    if percent > 100:
        raise DataError(f"noisy{percent}: not more than 100 % of the labels can be random")
    generator = torch.Generator().manual_seed(0)
    noisy = torch.rand(len(y), generator=generator) < percent / 100
    return torch.where(noisy, torch.randint(int(y.max()) + 1, y.shape, generator=generator), y)


def load_mnist1d() -> tuple[Split, Split]:
    with np.load(MNIST1D, allow_pickle=False) as file:
        x, y, x_test, y_test = (torch.from_numpy(file[key]) for key in ("x", "y", "x_test", "y_test"))
    return (x, y.long()), (x_test, y_test.long())


def load_fashion_mnist(name: str, root: str | Path | None) -> tuple[Split, Split]:
    small = {"fashion-mnist-5k": None, "fashion-mnist-1k": 100}  # training images of each class
    splits = fashion_mnist.part(small[name]) if name in small else fashion_mnist.read(folder(name, root))
    (x, y), (x_test, y_test) = (tuple(torch.tensor(array) for array in split) for split in splits)
    x, x_test = x.float().unsqueeze(1), x_test.float().unsqueeze(1)
    mean, std = x.mean(), x.std()
    return ((x - mean) / std, y.long()), ((x_test - mean) / std, y_test.long())


def cifar(name: str, root: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test): uint8 images (N, 3, 32, 32) and their labels (N). torchvision unpacks and checks the files."""
    torchvision = import_torchvision()
    kind = getattr(torchvision.datasets, name.upper())
    packed = torchvision.datasets.utils.check_integrity(root / kind.filename, kind.tgz_md5)
    try:  # with a whole archive, download only unpacks it
        splits = [kind(root, train, download=packed) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = f" ({error})" if isinstance(error, OSError) else ""
        raise DataError(
            f"no {name} in {root}, or it is damaged{reason}: there must be {kind.filename}, or the folder "
            f"{kind.base_folder} that it unpacks to"
        ) from error
    return [(split.data.transpose(0, 3, 1, 2).copy(), np.array(split.targets)) for split in splits]


def load_digits() -> tuple[Split, Split]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError("the digits are part of scikit-learn: pip install scikit-learn") from error
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
    order = np.random.RandomState(0).permutation(len(x))  # numpy promises that this stream never changes
    train, test = np.split(order, [len(x) - len(x) // 5])
    x = (x - x[train].mean()) / x[train].std()
    return (x[train], y[train].long()), (x[test], y[test].long())


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
    the image resized to 256. Fashion-MNIST, "digits" and "mnist1d" ((1, 1, 40), one row): not augmented. DataError.
    """
    if name == "imagenet":
        return imagenet(folder(name, root))
    if name in CIFAR:
        splits = cifar(name, folder(name, root))
        v2 = import_torchvision().transforms.v2
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*(s.tolist() for s in colours(splits[0][0])))]
        augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        if name == "cifar100":
            augment.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))
        transforms = v2.Compose(augment + last), v2.Compose(last)
        train, test = (Pixels(*map(torch.from_numpy, split), t) for split, t in zip(splits, transforms))
    else:
        splits = load(name, root)
        name, _ = without_noise(name)
        train, test = (TensorDataset(x.reshape(-1, *FACTS[name].shape), y) for x, y in splits)
    return Images(train, test, FACTS[name].shape, FACTS[name].classes)


def synthetic(like: str, count: int) -> Split:
    """count random images with random labels, in the shape of a data set: for timing; there is nothing to learn."""
    shape, classes = FACTS[like][:2]
    random = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=random), torch.randint(classes, (count,), generator=random)


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators do not fit torch (a build for CUDA beside a torch for the CPU).

    Importing torchvision then fails, because it describes operators that were never loaded. They serve object
    detection, which nothing here uses: it is enough to declare their names. DataError if torchvision is not installed.
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
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:  # what was imported so far
            del sys.modules[module]
    import torchvision.transforms.v2

    return torchvision


class Pixels(Dataset):
    """uint8 images (N, C, h, w) that go through a transform when they are read."""

    def __init__(self, x: Tensor, y: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.x, self.y, self.transform = x, y, transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.x[i]), self.y[i]


def imagenet(root: Path) -> Images:
    torchvision = import_torchvision()
    v2, folders = torchvision.transforms.v2, torchvision.datasets.ImageFolder
    last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    augment = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *last])
    center = v2.Compose([v2.Resize(256), v2.CenterCrop(224), *last])
    try:
        train = folders(root / "train", augment, loader=rgb)
        test = folders(root / "val", center, loader=rgb)
    except OSError as error:
        raise DataError(f"no ImageNet in {root}, which must hold train/CLASS/* and val/CLASS/*: {error}") from error
    if train.classes != test.classes:
        raise DataError(f"{root}: train and val do not hold the same classes")
    return Images(train, test, FACTS["imagenet"].shape, len(train.classes))


def rgb(path: str) -> Any:
    from PIL import Image

    with reading(path, "replace or remove this image"), Image.open(path) as image:
        return image.convert("RGB")


def folder(name: str, root: str | Path | None) -> Path:
    if root is None:
        what = "train and val" if name == "imagenet" else "its files"
        raise DataError(f"{name} is not part of this repository: pass --root, the folder with {what}")
    return Path(root)


def colours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (3) of the channels of uint8 images (N, 3, h, w), on a scale from 0 to 1."""
    return x.mean((0, 2, 3)) / 255, x.std((0, 2, 3)) / 255
