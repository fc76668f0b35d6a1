"""CIFAR-10 and CIFAR-100 from the files that their authors publish: python or binary version, packed or unpacked."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]  # uint8 images (N, 3, 32, 32), int64 labels (N)


class DataError(Exception):
    """A data file is missing or damaged. The message says which one, and what to do."""


class Version(NamedTuple):
    """One way in which a data set is published."""

    archive: str
    folder: str  # inside the archive
    train: list[str]  # file names
    test: str


class Cifar(NamedTuple):
    """How one of the two data sets is stored."""

    title: str
    python: Version
    binary: Version
    classes: int
    labels: bytes  # the key of the labels in the python version
    label_bytes: int  # in front of the pixels of a record in the binary version; the last of them is the label


CIFAR = {
    "cifar10": Cifar(
        "CIFAR-10",
        Version(
            "cifar-10-python.tar.gz", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"
        ),
        Version(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            [f"data_batch_{i}.bin" for i in range(1, 6)],
            "test_batch.bin",
        ),
        10,
        b"labels",
        1,
    ),
    "cifar100": Cifar(
        "CIFAR-100",
        Version("cifar-100-python.tar.gz", "cifar-100-python", ["train"], "test"),
        Version("cifar-100-binary.tar.gz", "cifar-100-binary", ["train.bin"], "test.bin"),
        100,
        b"fine_labels",
        2,
    ),
}


def read(kind: Cifar, root: Path) -> tuple[Arrays, Arrays]:
    """(train, test). root: the unpacked folder, or a folder that holds it or the archive. Raises DataError."""
    for version in (kind.python, kind.binary):
        names = [*version.train, version.test]
        if (root / version.folder).is_dir() or root.name == version.folder:
            source = root if root.name == version.folder else root / version.folder
            contents = [file_bytes(source / name) for name in names]
        elif (root / version.archive).is_file():
            source = root / version.archive
            contents = tar_bytes(source, [f"{version.folder}/{name}" for name in names], kind)
        else:
            continue
        parse = parse_python if version is kind.python else parse_binary
        parts = [parse(content, f"{name} of {source}", kind) for name, content in zip(names, contents)]
        x, y = np.concatenate([x for x, _ in parts[:-1]]), np.concatenate([y for _, y in parts[:-1]])
        if not x.std((0, 2, 3)).all():
            raise DataError(f"{source}: a colour channel is constant; the archive is damaged, download it again")
        return (x, y), parts[-1]
    raise DataError(
        f"no {kind.title} in {root}: expected {kind.python.archive} or {kind.binary.archive}, "
        f"or one of the folders {kind.python.folder} or {kind.binary.folder} that they unpack to"
    )


def file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def tar_bytes(path: Path, names: list[str], kind: Cifar) -> list[bytes]:
    try:
        with tarfile.open(path) as tar:
            return [tar.extractfile(name).read() for name in names]
    except KeyError as error:
        raise DataError(f"{path} is not the {kind.title} archive: {error.args[0]}") from error
    except Exception as error:  # tarfile, gzip and zlib have exceptions of their own
        raise DataError(f"{path} is damaged ({error}); download it again") from error


def parse_binary(content: bytes, where: str, kind: Cifar) -> Arrays:
    size = kind.label_bytes + 3072
    if not content or len(content) % size:
        raise DataError(f"{where} has {len(content)} bytes, not a multiple of {size}: damaged, download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return checked(records[:, kind.label_bytes :], records[:, kind.label_bytes - 1], where, kind)


class ArraysOnly(pickle.Unpickler):
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


def parse_python(content: bytes, where: str, kind: Cifar) -> Arrays:
    try:
        batch = ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        x, y = np.asarray(batch[b"data"]), np.asarray(batch[kind.labels])
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{where} is damaged ({error}); download it again") from error
    return checked(x, y, where, kind)


def checked(x: np.ndarray, y: np.ndarray, where: str, kind: Cifar) -> Arrays:
    right = x.dtype == np.uint8 and x.ndim == 2 and x.shape[1] == 3072 and y.shape == x.shape[:1]
    if not (right and y.size and y.dtype.kind in "iu" and y.min() >= 0 and y.max() < kind.classes):
        raise DataError(
            f"{where} does not hold 32x32 colour images with labels 0 to {kind.classes - 1}: damaged, download it again"
        )
    return x.reshape(-1, 3, 32, 32).copy(), y.astype(np.int64)
