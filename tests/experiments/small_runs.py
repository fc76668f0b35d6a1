"""What the tests of experiments share: small CIFAR archives, small runs, their files, and processes."""

import csv
import hashlib
import itertools
import json
import os
import pickle
import shutil
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

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process, so that bits can be compared
TINY_VIT = ["--preset", "vit-mnist1d", "--depth", "1", "--epochs", "1", "--warmup-epochs", "0"]
TINY_VIT += ["--width-multiplier", "0.0625", "--base-width-multiplier", "0.0625", "--heads", "2"]  # width 24
TINY_RESNET = ["--width-multiplier", "0.0625", "--base-width-multiplier", "0.03125"]  # 4 channels, base 2


def cifar_parts(name, images=20):
    """(pixels, labels) of each file of a small CIFAR; the last one is the test's."""
    random, classes, files = np.random.default_rng(0), data.FACTS[name].classes, 6 if name == "cifar10" else 2
    labels = np.arange(images) * (classes // 20 or 1) % classes
    return [(random.integers(0, 256, (images, 3072), dtype=np.uint8), labels) for _ in range(files)]


def store_cifar(monkeypatch, root, name, images=20, packed=True):
    """The archive or the unpacked folder of a small CIFAR, which torchvision takes for the whole one."""
    kind = getattr(data.import_torchvision().datasets, name.upper())
    names = [file for file, _ in kind.train_list + kind.test_list]
    key = "labels" if name == "cifar10" else "fine_labels"
    batches = [{"data": x, key: y.tolist()} for x, y in cifar_parts(name, images)]
    contents = dict(zip([*names, kind.meta["filename"]], map(pickle.dumps, [*batches, {kind.meta["key"]: []}])))
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in contents.items()}
    monkeypatch.setattr(kind, "train_list", [(file, md5[file]) for file, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [(file, md5[file]) for file, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5[kind.meta["filename"]]})
    folder = root / kind.base_folder
    folder.mkdir()
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    if packed:
        with tarfile.open(root / kind.filename, "w:gz") as tar:
            tar.add(folder, kind.base_folder)
        shutil.rmtree(folder)
        monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((root / kind.filename).read_bytes()).hexdigest())


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
