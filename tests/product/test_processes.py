"""Several processes on gloo: DDP, m-sharpness, FSDP2, tensor parallelism, checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

from small_problems import ROOT


def run_script(script, folder):
    """A script beside this file, which starts its processes and fails if one of its checks does."""
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]


def test_four_processes(tmp_path):
    run_script("spread_processes.py", tmp_path)
