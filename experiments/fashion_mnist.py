"""Fashion-MNIST from the files that its authors publish, and the part of it that comes with this repository.

python -m experiments.fashion_mnist --root DIR        makes datasets/fashion_mnist.npz again
"""

import argparse
import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np

from experiments.commands import DataError, command, reading, start, write

Arrays = tuple[np.ndarray, np.ndarray]  # uint8 images (N, 28, 28), uint8 labels (N)
PART = Path(__file__).parent / "datasets" / "fashion_mnist.npz"
KEYS = ("x", "y", "x_test", "y_test")  # in this file
PER_CLASS = (500, 250)  # training and test images in it
CLASSES, SIDE = 10, 28
MOST_IMAGES = 60_000  # in a file; a file that unpacks to more is not read any further
PREFIXES = ("train", "t10k")
FOLDERS = (".", "FashionMNIST/raw")  # the authors' and Debian's layout; torchvision's
ADVICE = "it is damaged or not of Fashion-MNIST, replace it"


def read(root: Path) -> tuple[Arrays, Arrays]:
    """(train, test). root: the folder with the four files, plain or gzipped, or torchvision's root. DataError."""
    folders = [root / name for name in FOLDERS]
    found = [folder for folder in folders if any(folder.glob(f"{PREFIXES[0]}-images-idx3-ubyte*"))]
    if not found:
        raise DataError(
            f"no Fashion-MNIST in {root}: expected train-images-idx3-ubyte and the three other files of its authors, "
            f"plain or .gz, there or in {FOLDERS[1]}"
        )
    train, test = (pair(found[0], prefix) for prefix in PREFIXES)
    return train, test


def pair(folder: Path, prefix: str) -> Arrays:
    (x, where), (y, where_labels) = (idx(folder, f"{prefix}-{name}") for name in ("images-idx3", "labels-idx1"))
    if len(x) != len(y):
        raise DataError(f"{where} has {len(x)} images, {where_labels} {len(y)} labels: replace both files")
    if x.min() == x.max():
        raise DataError(f"{where}: all pixels are the same: {ADVICE}")
    if y.max() >= CLASSES:
        raise DataError(f"{where_labels} has a label {y.max()}, beyond {CLASSES - 1}: {ADVICE}")
    return x, y


def idx(folder: Path, name: str) -> tuple[np.ndarray, Path]:
    """The uint8 array of a file, and the file. name: ends in the number of its dimensions."""
    plain = folder / f"{name}-ubyte"
    path = plain if plain.exists() else plain.with_name(plain.name + ".gz")
    if not path.exists():
        raise DataError(f"no {name}-ubyte in {folder}, plain or .gz: all four files of Fashion-MNIST must be there")
    rest = (SIDE, SIDE) if name.endswith("3") else ()
    start, size = 8 + 4 * len(rest), int(np.prod(rest, dtype=int))
    with reading(path, ADVICE), (open if path == plain else gzip.open)(path, "rb") as file:
        content = file.read(start + MOST_IMAGES * size + 1)
        kind, count, *shape = struct.unpack_from(f">{2 + len(rest)}I", content)
        if kind != 0x800 + 1 + len(rest):  # 8 stands for uint8; then the number of dimensions
            raise ValueError(f"it starts with {kind:#010x}, not {0x801 + len(rest):#010x}")
        if tuple(shape) != rest or not 0 < count <= MOST_IMAGES or len(content) != start + count * size:
            raise ValueError(f"{' x '.join(map(str, (count, *shape)))} bytes announced, {len(content) - start} there")
        return np.frombuffer(content, np.uint8, offset=start).reshape(count, *rest), path


def part(per_class: int | None = None) -> tuple[Arrays, Arrays]:
    """(train, test) as they come with this repository: 5,000 and 2,500 images, as many of each class.

    per_class: so many training images of each class only.
    """
    with reading(PART, "get it again from the repository"), np.load(PART, allow_pickle=False) as file:
        x, y, x_test, y_test = (file[key] for key in KEYS)
    return chosen((x, y), per_class) if per_class else (x, y), (x_test, y_test)


def chosen(split: Arrays, per_class: int) -> Arrays:
    """So many images of each class, always the same ones, in the order of the file."""
    x, y = split
    order = np.random.RandomState(0).permutation(len(y))  # numpy promises that this stream never changes
    of_classes = [order[y[order] == label][:per_class] for label in range(CLASSES)]
    if min(map(len, of_classes)) < per_class:
        raise DataError(f"a class has fewer than {per_class} images: take the complete Fashion-MNIST")
    rows = np.sort(np.concatenate(of_classes))
    return x[rows], y[rows]


def packed(train: Arrays, test: Arrays) -> bytes:
    """An npz file. It is packed by LZMA, by which it is a seventh smaller than by numpy's own way."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        for key, array in zip(KEYS, (*train, *test)):
            with archive.open(f"{key}.npy", "w") as member:  # its date is always 1980
                np.lib.format.write_array(member, array, allow_pickle=False)
    return file.getvalue()


@command("start the command again")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the complete data set")
    parser.add_argument("--out", type=Path, default=PART)
    args = parser.parse_args(argv)
    train, test = (chosen(*pair) for pair in zip(read(args.root), PER_CLASS))
    write(args.out, lambda file: file.write(packed(train, test)))
    print(f"{args.out}: {len(train[1])} training and {len(test[1])} test images, {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    start(main)
