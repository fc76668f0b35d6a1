"""The files of a run: written as a whole or not at all, and locked for one process at a time."""

import contextlib
import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from experiments.training import SettingsError


def write(path: Path, save: Callable[[BinaryIO], Any]) -> None:
    """The file is there as a whole or as it was before, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, lambda file: file.write(text.getvalue().encode()))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """For one process at a time; the lock ends with the process. Raises SettingsError if another one has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"another process is busy with {path.parent}") from None
        yield


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Write the settings of a run, or raise SettingsError if the folder has those of another one.

    The folder's name has a hash of the settings: this finds folders that were renamed, and files that were changed.
    """
    if path.exists() and (found := json.loads(path.read_text())) != config:
        names = sorted(k for k in found.keys() | config.keys() if found.get(k) != config.get(k))
        raise SettingsError(f"{path} belongs to a run with other settings ({', '.join(names)}): remove its folder")
    write_json(path, config)


def tensorboard(folder: Path, epochs: int, quiet: bool) -> Any:
    """A SummaryWriter that goes on after so many epochs; None, and a note, if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if not quiet:
            print("no events for TensorBoard, which is not installed (pip install tensorboard)")
        return None
    return SummaryWriter(folder, purge_step=epochs + 1)
