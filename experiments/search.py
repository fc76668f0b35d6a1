"""Joint search of learning rate and radius for a small model with Optuna; muP² then takes both to a wide one.

    python -m experiments.search --preset resnet18-digits --trials 20 --study digits --out runs/search --jobs 2

All other flags are those of experiments.vision. Every trial is one of its runs, and counts with its best test accuracy
(chance, if it diverged). The study is a file in OUT that any number of processes may share: --jobs of one command, or
the command started several times. A trial that Ctrl-C ended is the first of the next start, and goes on from its
checkpoint; with --trials finished ones, the command only prints the best.
"""

import argparse
import json
import multiprocessing
import shlex
import signal
from concurrent.futures import as_completed
from pathlib import Path

import torch

from experiments import data
from experiments.commands import BusyError, SettingsError, at_least, command, locked, reading, start, worker_processes
from experiments.presets import parse_args as parse_run
from experiments.presets import run_folder, settings
from experiments.vision_run import finished, stream, train

try:
    import optuna
except ImportError:
    optuna = None

PAPER_RANGE = (2**-10, 2**2)  # of lr and of rho
WIDER = 4  # times the searched width: the model of the command that is printed in the end


def parse_trial(args: argparse.Namespace, *flags: str) -> argparse.Namespace:
    """The run of a trial; without its flags, what all trials share."""
    return parse_run([*args.flags, "--out", str(args.out), *flags])


def open_study(args: argparse.Namespace) -> "optuna.Study":
    """SettingsError if there is one of this name for another search, DataError if its file is damaged."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # an interrupted trial is no surprise
    path = args.out / f"{args.study}.journal"
    for number, line in enumerate(path.read_bytes().splitlines(True) if path.exists() else (), 1):
        with reading(f"line {number} of {path}", "remove this line, or choose another name for the study"):
            json.loads(line)
            if not line.endswith(b"\n"):
                raise ValueError("the next line would be joined to this one")
    with reading(path, "choose another name for the study"):
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        study = optuna.create_study(storage=storage, study_name=args.study, direction="maximize", load_if_exists=True)
    wanted = {k: v for k, v in settings(parse_trial(args)).items() if k not in ("lr", "rho")}
    wanted |= {"lr_range": list(args.lr_range), "rho_range": list(args.rho_range)}
    found = study.user_attrs.get("settings", wanted)
    if found != wanted:
        names = ", ".join(sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)))
        raise SettingsError(f"study {args.study!r} searches with other settings ({names}): choose another name")
    study.set_user_attr("settings", wanted)
    return study


def trials(study: "optuna.Study", state: str) -> list["optuna.trial.FrozenTrial"]:
    return study.get_trials(states=(optuna.trial.TrialState[state],))


def work(args: argparse.Namespace, worker: int = 0) -> None:
    """Trials one after another, until the study has enough."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Optuna writes down that a trial was interrupted
    study, shared = open_study(args), parse_trial(args)
    images = data.images(shared.data, shared.root)
    seed = stream(shared.seed, worker, len(study.trials))
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def objective(trial: "optuna.Trial") -> float:
        flags = ["--lr", repr(trial.suggest_float("lr", *args.lr_range, log=True))]
        if shared.variant != "none":
            flags += ["--rho", repr(trial.suggest_float("rho", *args.rho_range, log=True))]
        run = parse_trial(args, *flags)
        try:
            with locked(run_folder(run) / "lock"):
                result = finished(run) or train(run, images, quiet=True)
        except BusyError as error:  # another process drew the same point
            raise optuna.TrialPruned from error
        accuracy = 100 / images.classes if result["diverged"] else result["best_test_accuracy"]
        found = ", ".join(f"{name} {value:.4g}" for name, value in trial.params.items())
        print(f"trial {trial.number}: {found}: {accuracy:.2f} %{' (diverged)' * result['diverged']}", flush=True)
        return accuracy

    if len(trials(study, "COMPLETE")) < args.trials:
        enough = optuna.study.MaxTrialsCallback(args.trials, states=(optuna.trial.TrialState.COMPLETE,))
        study.optimize(objective, callbacks=[enough])


def report(args: argparse.Namespace) -> None:
    study = open_study(args)
    best = study.best_trial
    found = " ".join(f"--{name} {value:.4g}" for name, value in best.params.items())
    flags = shlex.join([*args.flags, "--width-multiplier", f"{WIDER * parse_trial(args).width_multiplier:g}"])
    print(f"best of {len(trials(study, 'COMPLETE'))} trials: {found}, test accuracy {best.value:.2f} %")
    print(f"a model {WIDER} times as wide with them: python -m experiments.vision {flags} {found}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--trials", type=at_least(1, int), default=20, help="finished ones in the study")
    add("--study", default="search", help="its name")
    add("--out", type=Path, default=Path("runs"), help="folder of the study and of its runs")
    add("--jobs", type=at_least(1, int), default=1, help="trials at once")
    for flag in ("--lr-range", "--rho-range"):
        add(flag, type=float, nargs=2, default=PAPER_RANGE, metavar=("LOW", "HIGH"), help="the paper's")
    args, args.flags = parser.parse_known_args(argv)
    if given := {flag.partition("=")[0] for flag in args.flags} & {"--lr", "--rho"}:
        parser.error(f"{', '.join(sorted(given))}: that is what is searched")
    for name in ("lr_range", "rho_range"):
        low, high = getattr(args, name)
        if not 0 < low < high:
            parser.error(f"--{name.replace('_', '-')} {low:g} {high:g} must be positive and grow")
    return args


@command("the same command goes on where it stopped")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    shared = parse_trial(args)
    if optuna is None:
        raise SettingsError("the search takes Optuna: pip install optuna")
    data.images(shared.data, shared.root)
    args.out.mkdir(parents=True, exist_ok=True)
    study = open_study(args)
    if len(trials(study, "COMPLETE")) < args.trials:
        tried = [trial.params for trial in trials(study, "COMPLETE") + trials(study, "RUNNING")]
        for trial in trials(study, "FAIL"):  # interrupted
            if trial.params not in tried:
                study.enqueue_trial(trial.params)
    if args.jobs == 1:
        work(args)
    else:
        with worker_processes(args.jobs, max(1, torch.get_num_threads() // args.jobs)) as pool:
            for worker in as_completed([pool.submit(work, args, i) for i in range(args.jobs)]):
                worker.result()
    report(args)
    return 0


if __name__ == "__main__":
    start(main)
