"""Data sets as tensors: (train inputs, train labels), (test inputs, test labels).

MNIST-1D comes with this repository (data/NOTICE tells its source and licence). CIFAR-10 is read from the archive that
its authors publish, in the python or the binary version, packed or unpacked; nothing is ever downloaded.
"""

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

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


class DataError(Exception):
    """A data file is missing or damaged; the message says which, and what to do."""


def load(name: str, root: str | Path | None = None) -> tuple[Split, Split]:
    """name: "mnist1d" (inputs (N, 40)) or "cifar10" (inputs (N, 3, 32, 32), standardized per channel; needs root)."""
    if name == "mnist1d":
        return _mnist1d()
    if name != "cifar10":
        raise DataError(f"unknown data set {name!r}; choose 'mnist1d' or 'cifar10'")
    if root is None:
        raise DataError("cifar10 is not part of this repository: pass --root, the folder with its archive")
    return _cifar10(Path(root))


def batches(split: Split, size: int, shuffle: torch.Generator) -> Iterator[Split]:
    """An epoch of a split that fits in memory, in random order; the last batch may be smaller."""
    x, y = split
    for batch in torch.randperm(len(x), generator=shuffle).to(x.device).split(size):
        yield x[batch], y[batch]


def _mnist1d() -> tuple[Split, Split]:
    with np.load(MNIST1D, allow_pickle=False) as file:
        x, y, x_test, y_test = (torch.from_numpy(file[key]) for key in ("x", "y", "x_test", "y_test"))
    return (x, y.long()), (x_test, y_test.long())


def _cifar10(root: Path) -> tuple[Split, Split]:
    for version, (archive, folder, train_names, test_name) in CIFAR10.items():
        if (root / folder).is_dir() or root.name == folder:
            base = root if root.name == folder else root / folder
            read = {name: _file_bytes(base / name) for name in (*train_names, test_name)}
            source = base
        elif (root / archive).is_file():
            source = root / archive
            read = _tar_bytes(source, [f"{folder}/{name}" for name in (*train_names, test_name)])
        else:
            continue
        parse = _parse_python if version == "python" else _parse_binary
        parts = [parse(content, f"{name} of {source}") for name, content in read.items()]
        x, y = np.concatenate([x for x, _ in parts[:-1]]), np.concatenate([y for _, y in parts[:-1]])
        mean, std = x.mean((0, 2, 3), keepdims=True) / 255, x.std((0, 2, 3), keepdims=True) / 255
        if not std.all():
            raise DataError(f"{source}: a colour channel is constant; the archive is damaged, download it again")
        return tuple(
            (torch.from_numpy(((x / np.float32(255) - mean) / std).astype(np.float32)), torch.from_numpy(y))
            for x, y in ((x, y), parts[-1])
        )
    raise DataError(
        f"no CIFAR-10 in {root}: expected {' or '.join(v[0] for v in CIFAR10.values())}, "
        f"or one of the folders {' or '.join(v[1] for v in CIFAR10.values())} that they unpack to"
    )


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _tar_bytes(path: Path, names: list[str]) -> dict[str, bytes]:
    try:
        with tarfile.open(path) as tar:
            return {name: tar.extractfile(name).read() for name in names}
    except KeyError as error:
        raise DataError(f"{path} is not the CIFAR-10 archive: {error.args[0]}") from error
    except Exception as error:  # tarfile, gzip and zlib each raise their own
        raise DataError(f"{path} is damaged ({error}); download it again") from error


def _parse_binary(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % 3073:
        raise DataError(f"{where} has {len(content)} bytes, not a multiple of 3073: damaged, download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return _checked(records[:, 1:], records[:, 0], where)


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


def _parse_python(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        x, y = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{where} is damaged ({error}); download it again") from error
    return _checked(x, y, where)


def _checked(x: np.ndarray, y: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072 or y.shape != x.shape[:1] or y.min() < 0 or y.max() > 9:
        raise DataError(f"{where} does not hold 32x32 colour images with labels 0 to 9: damaged, download it again")
    return x.reshape(-1, 3, 32, 32), y.astype(np.int64)
