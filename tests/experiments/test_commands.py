"""How commands end: by signals, with their workers, and over a worker that was killed."""

import os
import signal
import time
from pathlib import Path

import pytest
from small_runs import ROOT, TINY_RESNET, start, wait_for
from test_search import trials_of

from experiments import search

ENDLESS = {
    "transfer": ["--widths", "512", "--epochs", "99999"],
    "exponents": ["--widths", "1024", "2048", "--seeds", "99"],
    "search": [*TINY_RESNET, "--epochs", "99999", "--jobs", "2", "--device", "cpu"],
    "vision": ["--width-multiplier", "1", "--epochs", "99999", "--workers", "2", "--device", "cpu"],
}


def session(process):
    """Pid -> command line and seconds of work, for the command and the processes that it has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, sid, *_, user, system = (folder / "stat").read_text().rpartition(") ")[2].split()[:13]
            if int(sid) == process.pid and state != "Z":
                ticks = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
                found[int(folder.name)] = (folder / "cmdline").read_text(), ticks
        except OSError:  # it has ended
            continue
    return found


def workers(process):
    return [pid for pid, (line, _) in session(process).items() if pid != process.pid and "tracker import" not in line]


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "command, sent",
    [
        ("transfer", "SIGTERM"),
        ("transfer", "SIGKILL to a worker"),
        slow("transfer", "SIGINT"),
        slow("transfer", "SIGKILL"),
        slow("exponents", "SIGTERM"),
        slow("search", "SIGTERM"),
        slow("search", "SIGKILL"),
        slow("vision", "SIGTERM"),
        slow("vision", "SIGINT to all"),  # as a terminal sends it
        slow("transfer", "SIGINT to all"),
        slow("vision", "SIGKILL to a worker"),
    ],
)
def test_workers_end_with_the_command(tmp_path, command, sent):
    """A signal to the command alone ends all in seconds; what is finished stays."""
    if command == "search" and search.optuna is None:
        pytest.skip("the search takes Optuna")
    path = tmp_path / "transfer_mnist1d.jsonl"
    path.write_bytes(before := (ROOT / "experiments" / "results" / path.name).read_bytes())
    with (tmp_path / "errors").open("w") as errors:  # no pipe: a worker that is left behind would keep it open
        options = dict(stderr=errors, start_new_session=True)
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
        process = start(["-m", f"experiments.{command}", *ENDLESS[command], "--out", tmp_path], **options)
    try:
        wait_for(lambda: sum(seconds for _, seconds in session(process).values()) > 12, process, pause=0.2)
        targets = [*session(process)] if "all" in sent else [process.pid]
        if "worker" in sent:  # those of a DataLoader live for one epoch only
            wait_for(lambda: workers(process), process, pause=0.01)
            targets = workers(process)[-1:]
        for pid in targets:
            os.kill(pid, getattr(signal, sent.split()[0]))
        status = process.wait(10)
        end = time.monotonic() + 8  # a DataLoader's worker looks every five seconds
        while (left := session(process)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left
    finally:
        for pid in session(process):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    said = (tmp_path / "errors").read_text()
    if sent == "SIGKILL":
        assert status == -signal.SIGKILL
    elif "worker" in sent:
        assert status == 2 and "error: " in said and "killed" in said and "the same command" in said
    else:
        how = "start the command again" if command == "exponents" else "the same command goes on"
        assert status == 130 and "interrupted; " in said and how in said and "Traceback" not in said
    assert path.read_bytes() == before
    if command == "search" and sent == "SIGTERM":  # the next command starts with them
        assert [trial.state.name for trial in trials_of(tmp_path, "search")] == ["FAIL"] * 2
