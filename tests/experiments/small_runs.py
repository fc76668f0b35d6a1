"""What the tests of experiments share: small CIFAR archives, small runs, their files, and processes."""

import csv
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from experiments import commands, data, sweep
from experiments.cifar import CIFAR

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process, so that bits can be compared
TINY_VIT = ["--preset", "vit-mnist1d", "--depth", "1", "--epochs", "1", "--warmup-epochs", "0"]
TINY_VIT += ["--width-multiplier", "0.0625", "--base-width-multiplier", "0.0625", "--heads", "2"]  # width 24
TINY_RESNET = ["--width-multiplier", "0.0625", "--base-width-multiplier", "0.03125"]  # 4 channels, base 2


def cifar_parts(name, images=20, scale=1):
    """(pixels, labels) of each file of a small CIFAR; the last one is the test's."""
    random, classes = np.random.default_rng(0), CIFAR[name].classes
    labels = np.arange(images) * scale % classes
    return [(random.integers(0, 256, (images, 3072), dtype=np.uint8), labels) for _ in CIFAR[name].files]


def cifar_files(name, version, parts=None):
    """File name -> content."""
    kind, ending = CIFAR[name], ".bin" if version == "binary" else ""
    parts = parts or cifar_parts(name)
    return {file + ending: file_of(kind, version, x, y) for file, (x, y) in zip(kind.files, parts)}


def file_of(kind, version, x, y):
    if version == "binary":
        coarse = [np.full(len(y), 7)] * (kind.label_bytes - 1)  # the labels of the 20 classes of CIFAR-100
        return np.hstack([np.stack([*coarse, y], 1).astype(np.uint8), x]).tobytes()
    batch = {
        b"data": x,
        kind.labels.encode(): y.tolist(),
        b"coarse_labels": [7] * len(y),
        b"filenames": [b"a.png"] * len(y),
    }
    return pickle.dumps(batch, protocol=2)


def store(root, name, version, files, packed=True):
    """The archive or the unpacked folder."""
    archive, folder = CIFAR[name].archive(version), CIFAR[name].folders[version]
    if not packed:
        (root / folder).mkdir()
        for file, content in files.items():
            (root / folder / file).write_bytes(content)
        return root / folder
    with tarfile.open(root / archive, "w:gz") as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return root / archive


def image_folder(root):
    """An ImageNet of two classes with three single-coloured images each."""
    from PIL import Image

    for split, (k, name) in itertools.product(("train", "val"), enumerate(("ant", "bee"))):
        (root / split / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (300, 260), (60 * k, 100, 200)).save(root / split / name / f"{i}.png")
    return root


def use_few_samples(monkeypatch):
    """Of every data set, only 96 training and 40 test images."""
    load = data.images

    def images(name, root=None):
        found = load(name, root)
        return found._replace(train=Subset(found.train, range(96)), test=Subset(found.test, range(40)))

    monkeypatch.setattr(data, "images", images)


def only_folder(out):
    (config,) = out.glob("*/config.json")
    return config.parent


def result_of(out):
    return json.loads((only_folder(out) / "result.json").read_text())


def metrics(folder, leave_out=("seconds",)):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if k not in leave_out} for row in csv.DictReader(file)]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def equal(a, b):
    """Of checkpoints, bit for bit, without the seconds in their rows."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(key == "seconds" or equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def sweep_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(capsys, main, *flags):
    """What a command says that ends with status 2."""
    capsys.readouterr()
    try:
        status = main([*flags])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    return capsys.readouterr().err


def start(command, **options):
    """python COMMAND in the repository's root."""
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ONE_THREAD, text=True, cwd=ROOT) | options
    return subprocess.Popen([sys.executable, *map(str, command)], **options)


def wait_for(condition, process, pause=0.01, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(pause)


class InThisProcess(Executor):
    """In place of a ProcessPoolExecutor, whose processes take seconds to start."""

    def __init__(self, *args):
        pass

    def submit(self, call, *args):
        future = Future()
        try:
            future.set_result(call(*args))
        except KeyboardInterrupt as interrupt:
            future.set_exception(interrupt)
        return future


def without_processes(monkeypatch):
    monkeypatch.setattr(commands, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(sweep, "as_completed", list)
