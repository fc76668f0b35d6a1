"""CIFAR-10 and CIFAR-100 from the files that their authors publish: python or binary version, packed or unpacked."""

import functools
import io
import operator
import pickle
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.commands import DataError, reading

Arrays = tuple[np.ndarray, np.ndarray]  # uint8 images (N, 3, 32, 32), int64 labels (N)
RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")


class Cifar(NamedTuple):
    """How one of the two data sets is stored, in each of its versions."""

    title: str
    folders: dict[str, str]  # version -> the folder inside its archive
    files: list[str]  # of the python version; those of the binary one end in .bin. The last file has the test images
    classes: int
    labels: str  # the key of the labels in the python version
    label_bytes: int  # in front of the pixels of a record in the binary version; the last of them is the label

    def archive(self, version: str) -> str:
        return f"{self.title.lower()}-{version}.tar.gz"


CIFAR = {
    "cifar10": Cifar(
        title="CIFAR-10",
        folders={"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"},
        files=[*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
        classes=10,
        labels="labels",
        label_bytes=1,
    ),
    "cifar100": Cifar(
        title="CIFAR-100",
        folders={"python": "cifar-100-python", "binary": "cifar-100-binary"},
        files=["train", "test"],
        classes=100,
        labels="fine_labels",
        label_bytes=2,
    ),
}


def read(kind: Cifar, root: Path) -> tuple[Arrays, Arrays]:
    """(train, test). root: the unpacked folder, or a folder that holds it or the archive. Raises DataError."""
    for version, folder in kind.folders.items():
        names = [name + ".bin" * (version == "binary") for name in kind.files]
        source = root if root.name == folder else root / folder
        if source.is_dir() or source == root:
            contents = [file_bytes(source / name) for name in names]
        elif (source := root / kind.archive(version)).is_file():
            contents = tar_bytes(source, [f"{folder}/{name}" for name in names], kind)
        else:
            continue
        parse = parse_python if version == "python" else parse_binary
        parts = [parse(content, f"{name} of {source}", kind) for name, content in zip(names, contents)]
        x, y = (np.concatenate(arrays) for arrays in zip(*parts[:-1]))
        if not x.std((0, 2, 3)).all():
            raise DataError(f"{source}: a colour channel is constant; the archive is damaged, download it again")
        return (x, y), parts[-1]
    raise DataError(
        f"no {kind.title} in {root}: expected {' or '.join(map(kind.archive, kind.folders))}, "
        f"or one of the folders {' or '.join(kind.folders.values())} that they unpack to"
    )


def file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def tar_bytes(path: Path, names: list[str], kind: Cifar) -> list[bytes]:
    with reading(path, f"it is damaged or not the {kind.title} archive, download it again"), tarfile.open(path) as tar:
        return [tar.extractfile(name).read() for name in names]


def parse_binary(content: bytes, where: str, kind: Cifar) -> Arrays:
    size = kind.label_bytes + 3072
    if not content or len(content) % size:
        raise DataError(f"{where} has {len(content)} bytes, not a multiple of {size}: damaged, download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return checked(records[:, kind.label_bytes :], records[:, kind.label_bytes - 1], where, kind)


class Call:
    """A call that a pickle asks for. Nobody makes it."""

    state: Any = None  # what the pickle wants to set in the result

    def __init__(self, function: str, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Recorder(pickle._Unpickler):  # not the one in C, which allocates as much memory as a damaged file asks for
    """Reads lists, dicts and text. A Call stands for every object."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text
        return functools.partial(Call, f"{module} {name}")


def parse_python(content: bytes, where: str, kind: Cifar) -> Arrays:
    with reading(where, "it is damaged, download it again"):
        batch = Recorder(io.BytesIO(content), encoding="latin-1").load()
        batch = {key if isinstance(key, str) else key.decode("latin-1"): value for key, value in batch.items()}
        array, labels = batch["data"], batch[kind.labels]
        _, (count, size), dtype, by_columns, pixels = array.state
        if array.function not in RECONSTRUCT or (dtype.function, dtype.arguments[0]) != ("numpy dtype", "u1"):
            raise ValueError("the images are not an array of bytes")
        pixels = pixels.encode("latin-1") if isinstance(pixels, str) else pixels  # python 2 wrote text
        x = np.frombuffer(pixels, np.uint8).reshape(count, size, order="F" if by_columns else "C")
        y = np.array([*map(operator.index, labels)])
        return checked(x, y, where, kind)


def checked(x: np.ndarray, y: np.ndarray, where: str, kind: Cifar) -> Arrays:
    right = x.dtype == np.uint8 and x.ndim == 2 and x.shape[1] == 3072 and y.shape == x.shape[:1]
    if not (right and y.size and y.dtype.kind in "iu" and y.min() >= 0 and y.max() < kind.classes):
        raise DataError(
            f"{where} does not hold 32x32 colour images with labels 0 to {kind.classes - 1}: damaged, download it again"
        )
    return x.reshape(-1, 3, 32, 32).copy(), y.astype(np.int64)
