"""Several processes on gloo: DistributedDataParallel, m-sharpness, FSDP2, tensor parallelism and checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_four_processes(tmp_path):
    """All checks in one start of the processes: see four_processes.py."""
    command = [sys.executable, str(Path(__file__).with_name("four_processes.py")), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
