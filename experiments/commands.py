"""What the commands of this folder share: how they end, their worker processes, and the files that they write and read.

A command ends with status 0; with 1 if what it measured is not as it should be; with 2 and one line where its user has
to do something; with 130 after Ctrl-C or SIGTERM.
"""

import argparse
import errno
import fcntl
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

RANK = int(os.environ.get("RANK", "0"))  # of this process among those of torchrun
SECONDS_TO_END = 5  # for a worker that writes down that its work was interrupted


class DataError(Exception):
    """A file is missing or damaged. The message says which one, and what to do."""


class SettingsError(Exception):
    """The command asks for something that cannot be done. The message says why."""


class BusyError(SettingsError):
    """Another process is doing the same."""


def command(advice: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorates main(), whose exit statuses are those above. advice: how to go on after an interruption."""

    def decorated(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def ended(argv: list[str] | None = None) -> int:
            try:
                return main(argv)
            except (DataError, SettingsError) as error:
                # An error in a worker of a DataLoader arrives with that worker's traceback in front of its message.
                message = str(error).rpartition("DataError: ")[2].strip()
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                message = f"{error}".splitlines()[0] + f" Perhaps memory was short; {advice}"  # the worker was killed
            except KeyboardInterrupt:
                if RANK == 0:
                    print(f"\ninterrupted; {advice}", file=sys.stderr)
                return 130
            print(f"error in process {RANK}: {message}" if RANK else f"error: {message}", file=sys.stderr)
            return 2

        return ended

    return decorated


def start(main: Callable[[], int]) -> None:
    """For a file that is run as a command: SIGTERM, with which schedulers end a job, does the same as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())


@contextmanager
def worker_processes(jobs: int, threads: int = 1) -> Iterator[ProcessPoolExecutor]:
    """New processes with so many threads of torch each. They end at once when an exception ends the block.

    A worker gets SIGTERM then, and SIGKILL if it goes on for 5 seconds. SettingsError if a worker was killed.
    """
    others = {*multiprocessing.active_children()}
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (threads,))
    try:
        yield pool
    except BaseException as error:
        workers = {*multiprocessing.active_children()} - others
        for worker in workers:
            worker.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        last = time.monotonic() + SECONDS_TO_END
        for worker in workers:
            worker.join(max(0, last - time.monotonic()))
            worker.kill()
        if isinstance(error, BrokenProcessPool):
            advice = "start the same command again, or with fewer --jobs"
            raise SettingsError(f"a worker process was killed, perhaps for lack of memory: {advice}") from error
        raise
    pool.shutdown()


def start_worker(threads: int) -> None:
    """In a worker: Ctrl-C, which a terminal sends to all processes, is for the parent; the worker ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def at_least(low: float, kind: type) -> Callable[[str], Any]:
    """The type of a flag whose values are finite numbers from low on."""

    def number(text: str) -> Any:
        if not low <= (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return value

    return number


def markdown(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows))


def write(path: Path, save: Callable[[BinaryIO], Any]) -> None:
    """The file is there as a whole or as it was before, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """With a line for each row of a result."""
    write(path, lambda file: file.write((json.dumps(content).replace("}, {", "},\n{") + "\n").encode()))


@contextmanager
def reading(where: str | Path, advice: str) -> Iterator[None]:
    """Whatever goes wrong when a file is read in this block becomes a DataError that says where, and what to do."""
    try:
        yield
    except (DataError, SettingsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # json, zipfile, torch, Pillow and Optuna have exceptions of their own
        if getattr(error, "errno", None) in (errno.EACCES, errno.EMFILE, errno.ENFILE):  # the file may be good
            raise DataError(f"cannot read {where}: {error.strerror}") from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"cannot read {where} ({reason}): {advice}") from error


def read_json(path: Path, keys: tuple[str, ...], advice: str) -> dict[str, Any]:
    """An object with these keys, and perhaps others. DataError with the advice if the file is damaged."""
    with reading(path, advice):
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not found.keys() >= {*keys}:
            raise ValueError(f"not an object with {', '.join(keys) or 'settings'}")
        return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """For one process at a time; the lock ends with the process. Raises BusyError if another one has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another process is busy with {path.parent}") from None
        yield
