"""Vision runs in processes of their own: killed at any moment and resumed bit for bit, and on two processes at once."""

import json
import random
import signal
import socket
import subprocess
import time

import pytest
import torch
from small_runs import ONE_THREAD, TINY_RESNET, checkpoint, equal, metrics, only_folder, result_of, start, wait_for

import mup2_fused as mup2
from experiments import data, vision
from experiments.presets import parse_args
from experiments.vision_run import build_model


def modified(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for_moment(moment, checkpoint, process, rng, epoch_seconds):
    """Until a random time within the next epochs, or in or just after the writing of the checkpoint after the next."""
    if moment == "any time":
        time.sleep(rng.uniform(0, 3 * epoch_seconds))
        return
    for path in (checkpoint, checkpoint.with_name("checkpoint.pt.tmp")):
        before = modified(path)  # an earlier life may have left the temporary file
        wait_for(lambda: modified(path) not in (0, before), process, pause=0)
    time.sleep(rng.uniform(0, 0.008))


def start_training(command, errors):
    with errors.open("w") as file:  # no pipe: a worker that is left behind would keep it open
        options = dict(stdout=subprocess.PIPE, stderr=file, start_new_session=True)
        process = start(["-m", "experiments.vision", *command], **options)
    process.stdout.readline()  # its settings: the last checkpoint is loaded, and training starts
    return process


@pytest.mark.parametrize(
    "backend, workers, kills",
    [
        ("compiled", 1, 1),
        pytest.param("compiled", 1, 20, marks=pytest.mark.slow),
        pytest.param("torch", 0, 20, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_and_resumed_bit_for_bit(tmp_path, capsys, backend, workers, kills):
    """With momentum and batch norm."""
    epochs, out, errors = 8 + 4 * kills, tmp_path / "killed", tmp_path / "errors"
    flags = ["--preset", "resnet18-digits", *TINY_RESNET, "--epochs", str(epochs), "--batch-size", "400"]
    flags += ["--lr", "0.01", "--workers", str(workers), "--device", "cpu", "--backend", backend, "--out"]
    began = time.monotonic()
    assert vision.main([*flags, str(tmp_path / "whole")]) == 0
    epoch_seconds, whole = (time.monotonic() - began) / epochs, only_folder(tmp_path / "whole")
    assert result_of(tmp_path / "whole")["fused"] == (backend == "compiled")
    rng = random.Random(seed := random.randrange(2**32))
    moments = (["writing", "any time"] * kills)[:kills]
    folder, history = out / whole.name, []
    for number, moment in enumerate(moments):
        process = start_training([*flags, out], errors)
        if number == 0:
            assert vision.main([*flags, str(out)]) == 2
            assert "another process is busy with" in capsys.readouterr().err
        wait_for_moment(moment, folder / "checkpoint.pt", process, rng, epoch_seconds)
        process.kill()
        process.stdout.close()
        assert process.wait(60) == -signal.SIGKILL, (seed, errors.read_text())
        rows = metrics(folder, ()) if (folder / "metrics.csv").exists() else []
        assert rows[: len(history)] == history, f"it started again (seed {seed})"
        history = rows
    assert vision.main([*flags, str(out)]) == 0
    assert metrics(folder, ())[: len(history)] == history and metrics(folder) == metrics(whole), seed
    assert equal(a := checkpoint(whole), checkpoint(folder)) and a["optimizer"]["state"][0]["momentum_buffer"].any()


SPY = """
import os, shlex, shutil, sys
from pathlib import Path
import torch
import mup2_fused as mup2
from experiments import vision
evaluate, rank = mup2.evaluate, os.environ["RANK"]
def spy(model, batches, autocast):
    torch.save(model.state_dict(), out / f"rank{rank}.pt")
    for path in out.glob("*/checkpoint.pt"):
        shutil.copy(path, out / f"before{rank}.pt")
    return evaluate(model, batches, autocast)
mup2.evaluate = spy
leave = torch.distributed.destroy_process_group
torch.distributed.destroy_process_group = lambda: None  # one group for all commands saves the time of another start
first = sys.argv[1]
for command in sys.argv[1:]:
    if command == "again":
        command = first
        torch.distributed.barrier()
        if rank == "0":
            (path,) = Path(shlex.split(command)[-1]).glob("*/checkpoint.pt")
            shutil.copy(path, path.with_name("whole.pt"))
            os.replace(path.parents[1] / "before0.pt", path)
            path.with_name("result.json").unlink()
        torch.distributed.barrier()
    out = Path(shlex.split(command)[-1])
    out.mkdir(exist_ok=True)
    assert (status := vision.main(shlex.split(command))) == 0, status
    vision.start_processes = lambda args: None
leave()
assert not any("gloo" in thread.read_text() for thread in Path("/proc/self/task").glob("*/comm"))  # they abort at exit
"""


def test_two_processes(tmp_path):
    resnet = f"--preset resnet18-digits {' '.join(TINY_RESNET)} --epochs 2 --batch-size 360 --device cpu"
    resnet += f" --out {tmp_path / 'resnet'}"
    vit = "--preset vit-mnist1d --depth 1 --epochs 1 --warmup-epochs 0 --batch-size 1000 --lr 0.01 --device cpu --out "
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = ONE_THREAD | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    pair = []
    for rank in ("0", "1"):  # as torchrun starts them, without the seconds that it takes itself
        env = environment | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        pair.append(start(["-c", SPY, resnet, vit + str(tmp_path / "vit"), "again"], stdout=subprocess.PIPE, env=env))
    try:
        (printed, errors), (other, more) = (process.communicate(timeout=120) for process in pair)
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0] and other == "", errors + more
    assert printed.count("best test accuracy") == 3  # rank 0 alone prints
    assert [printed.count(f"epoch {n}:") for n in (1, 2)] == [2, 2]  # the third run goes on after the first epoch
    folder = only_folder(tmp_path / "resnet")
    assert json.loads((folder / "config.json").read_text())["processes"] == 2
    weights = [torch.load(tmp_path / "resnet" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = torch.load(folder / "whole.pt", weights_only=True)
    assert equal(checkpoint(folder), whole)
    assert equal(weights[0], weights[1]) and equal(weights[0], whole["model"])
    # What was written is the evaluation of these weights on the whole test set, 359 images.
    images = data.images("digits")
    model, _ = build_model(parse_args(resnet.split()), images.shape, images.classes)
    model.load_state_dict(weights[0])
    loss, correct, samples = mup2.evaluate(model, [images.test.tensors]).tolist()
    row = metrics(folder)[-1]
    assert samples == 359 and row["test_accuracy"] == 100 * correct / samples
    assert row["test_loss"] == pytest.approx(loss / samples, rel=1e-5)
    # Without batch norm two processes do what one does: SAM of the whole batch, every sample once.
    assert vision.main([*vit.split(), str(tmp_path / "one")]) == 0
    for key, value in metrics(only_folder(tmp_path / "one"))[0].items():
        assert metrics(only_folder(tmp_path / "vit"))[0][key] == pytest.approx(value, rel=1e-3), key
