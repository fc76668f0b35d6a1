"""Everything that needs an NVIDIA GPU.

    python -m benchmarks.gpu              make gpu: builds, tests and times the kernels in under eight minutes
    python -m benchmarks.gpu --training   make gpu-training: times training steps and trains Figure 1 of the paper, in
                                          under ten minutes; the next call trains on
    python -m benchmarks.gpu --dry-run    only lists the stages; also with --training

It needs a torch with CUDA and a CUDA toolkit. A stage for which another tool is missing is skipped and reported. Each
stage is a process with a time limit; time that a stage leaves is given to the later ones. All output is also written to
gpu.log in $OUT or benchmarks/results/gpu-logs, and new files in experiments/results are copied to $OUT. Exit status 1:
a stage failed, or there is no GPU.
"""

import argparse
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

try:
    import torch
except ImportError:
    sys.exit(f"error: {sys.executable} has no torch; name a Python that has it: make gpu PYTHON=...")

ROOT = Path(__file__).resolve().parent.parent
CUDA_TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "cuda"]  # the slow ones too


class Stage(NamedTuple):
    name: str
    command: list[str]
    seconds: int  # all stages together take less than 480, those for training less than 580
    needs: tuple[str, ...] = ()  # modules and tools
    env: dict[str, str] | None = None
    report: bool = False  # show everything that the stage prints
    resumes: bool = False  # the next call continues where the time limit ends this one


def find_tool(name: str) -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    homes = filter(None, (os.environ.get("CUDA_HOME"), CUDA_HOME, "/usr/local/cuda"))
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)]))


def stages(architecture: str) -> list[Stage]:
    python, tool = [sys.executable], "compute-sanitizer"
    me = [*python, "-m", "benchmarks.gpu"]
    check = [find_tool(tool) or tool, "--error-exitcode", "1", "--tool"]
    quiet = ["--report-api-errors", "no"]  # torch asks for functions that a driver may lack
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one allocation per tensor, whose bounds memcheck then knows
    build = {"MUP2_COMPILED": "1", "MUP2_CUDA": "1"}
    build |= {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", architecture)}
    tests = [*CUDA_TESTS, "tests/kernels", "tests/equivalence", "tests/product"]
    models = ["resnet18", "vit-b16", "mlp-4096", "vit-s16", "resnet18-w4", "mlp-tiny"]  # torch compiles the first ones
    timing = ["--device", "cuda", "--rounds", "15", "--compile-seconds", "40", "--models", *models]
    kinds = ["--device", "cuda", "--rounds", "30", "--models", "resnet18-w4", "vit-b16", "mlp-tiny"]
    return [
        Stage("build", [*python, "setup.py", "build_ext", "--inplace"], 150, env=build),
        Stage("tests", tests, 60, ("pytest",)),
        Stage("verify", [*python, "-m", "mup2_fused.verify", "--device", "cuda"], 35),
        Stage("memcheck", [*check, "memcheck", *quiet, *me, "--small-case"], 45, (tool,), uncached),
        Stage("racecheck", [*check, "racecheck", *me, "--small-case"], 45, (tool,)),
        Stage("launches", [*me, "--count-launches"], 20),
        Stage("graph", [*me, "--graph"], 20),
        Stage("benchmark", [*python, "-m", "benchmarks.step_time", *timing], 85, report=True),
        Stage("kinds", [*python, "-m", "benchmarks.step_kinds", *kinds], 10, report=True),
    ]


def training_stages(architecture: str) -> list[Stage]:
    build, python, modules = stages(architecture)[0], [sys.executable], ("numpy", "tqdm")
    steps = [*python, "-m", "experiments.epoch_time", "--device", "cuda", "--out", "--steps"]
    mlp = [*steps, "200", "--presets", "mlp-cifar10", "--width-multipliers", "1", "4", "16"]  # widths 256, 1024, 4096
    batch = ["30", "--batch-size", "128", "--width-multipliers", "1", "--presets"]
    figure = [*python, "-m", "experiments.transfer", "--device", "cuda", "--graph", "--widths", "256", "1024", "4096"]
    figure += ["--methods", "SP-naive", "muP²", "--seeds", "3", "--jobs", "3", "--name", "mnist1d_gpu"]
    return [
        build,
        Stage("tests", [*CUDA_TESTS, "tests/experiments"], 120, ("pytest", "sklearn", *modules)),
        Stage("mlp", mlp, 40, modules, report=True),
        Stage("resnet18", [*steps, *batch, "resnet18-cifar10"], 40, modules, report=True),
        Stage("vit", [*steps, *batch, "vit-s16-imagenet", "--amp", "bf16"], 40, modules, report=True),
        Stage("figure", figure, 180, ("matplotlib", *modules), resumes=True),
    ]


def run(stage: Stage, limit: float, log: Path) -> tuple[str, str]:
    """Run a stage. Returns its outcome, and the reason if it is not "ok"."""
    if missing := [name for name in stage.needs if not (importlib.util.find_spec(name) or find_tool(name))]:
        return "skipped", f"{' and '.join(missing)} not found"
    with log.open("a+", errors="replace") as file:
        begin = file.tell()
        options = dict(cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"} | (stage.env or {}), start_new_session=True)
        process = subprocess.Popen(stage.command, stdout=file, stderr=subprocess.STDOUT, **options)
        try:
            reason = f"exit status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # together with its compilers
        status = process.wait()
        file.seek(begin)
        lines = file.read().splitlines()
    shown = lines if stage.report else lines[-25:] if status else lines[-3:]
    print("\n".join(shown), flush=True)
    if stage.resumes and reason.startswith("not done"):
        return "to go on", reason
    return ("failed", reason) if status else ("ok", "")


def keep_results(since: float) -> None:
    """Copy result files that are newer than this time.time() to $OUT, if it is set, before a later stage is killed."""
    for path in (ROOT / "experiments" / "results").iterdir():
        if os.environ.get("OUT") and path.is_file() and path.stat().st_mtime >= since:
            shutil.copy(path, os.environ["OUT"])


def run_all(todo: list[Stage]) -> int:
    logs = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu-logs")
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "gpu.log").write_text("")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    begin, deadline, summary, failed, since = time.monotonic(), 0, [], 0, time.time()
    for stage in todo:
        print(f"\n-- {stage.name}", flush=True)
        deadline, start = deadline + stage.seconds, time.monotonic()
        outcome, reason = run(stage, begin + deadline - start, logs / "gpu.log")
        keep_results(since)
        summary.append(f"{stage.name:<10} {outcome:<8} {time.monotonic() - start:4.0f} s  {reason}")
        failed += outcome == "failed"
    print("\n" + "\n".join(summary))
    return int(failed > 0)


def make(sizes: list[int], dtype: torch.dtype, base: type, **kwargs) -> torch.optim.Optimizer:
    """Our SAM, with gradients that stay the same. Every tensor of odd size begins where no vector access can."""
    import mup2_fused

    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n + 1, device="cuda", dtype=dtype)[n % 2 : n + n % 2]) for n in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    return mup2_fused.SAM(params, base, lr=1e-3, backend="compiled", **momentum, **kwargs)


def steps(optimizer: torch.optim.Optimizer, n: int) -> None:
    for _ in range(n):
        optimizer.first_step()
        optimizer.second_step()


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = (x for own in optimizer.state.values() for x in own.values() if torch.is_tensor(x))
    return [*optimizer.param_groups[0]["params"], *state]


ASCENTS = ("gradient", "momentum")
KINDS = list(itertools.product((torch.float32, torch.bfloat16), (torch.optim.SGD, torch.optim.AdamW)))


def small_case() -> None:
    """For compute-sanitizer: sizes around the sizes of vectors and of chunks, in every variant."""
    from mup2_ref import VARIANTS

    for variant, ascent, kind in itertools.product(VARIANTS, ASCENTS, KINDS):
        optimizer = make([1, 7, 165, 8191, 8192, 8193, 24581], *kind, variant=variant, ascent=ascent)
        steps(optimizer, 3)
        assert all(x.isfinite().all() for x in tensors(optimizer)), (variant, ascent, kind)


def count_launches() -> None:
    """A step is three kernels, whatever the number of tensors. No call copies to or from the host, and none waits."""
    for n, ascent in itertools.product((62, 500), ASCENTS):
        optimizer = make([1000 + i for i in range(n)], torch.float32, torch.optim.SGD, ascent=ascent)
        steps(optimizer, 3)
        torch.cuda.set_sync_debug_mode("error")
        steps(optimizer, 1)
        torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile() as profile:
            steps(optimizer, 1)
            torch.cuda.synchronize()  # otherwise the profile ends before the kernels do
        on_device, on_host = Counter(), Counter()
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                on_device[re.sub(r".*?(\w+_kernel)<.*", r"\1", event.name)] += 1
            elif event.name.startswith("cuda"):
                on_host[event.name] += 1
        for name in [name for name in on_device if name.startswith(("Optimizer.", "Context Sync"))]:
            del on_device[name]  # torch's mark around step(), and the wait above
        print(f"{n} tensors, ascent by {ascent}: {dict(on_device)}; calls: {dict(on_host)}")
        norm = "norm_kernel" if ascent == "gradient" else "norm_of_sums_kernel"
        assert on_device == {norm: 1, "perturb_kernel": 1, "update_kernel": 1}, on_device
        assert not on_host.keys() & {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync", "cudaMemcpy"}


def graph() -> None:
    """Replaying both calls as a CUDA graph gives the same bits as calling them."""
    for ascent, kind in itertools.product(ASCENTS, KINDS):
        eager, captured = (make([7, 8193, 100_000], *kind, ascent=ascent) for _ in range(2))
        steps(eager, 8)
        steps(captured, 3)
        before = [x.clone() for x in tensors(captured)]
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph):
            steps(captured, 1)
        for _ in range(5):
            cuda_graph.replay()
        assert all(map(torch.equal, tensors(captured), tensors(eager))), (ascent, kind)
        assert not any(map(torch.equal, tensors(captured)[:3], before)), "replaying changes nothing"
        print(f"{kind}, ascent by {ascent}: 5 replays equal 5 steps")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="only print the stages")
    parser.add_argument("--training", action="store_true", help="time training steps and train Figure 1 instead")
    for function in (small_case, count_launches, graph):
        option = f"--{function.__name__.replace('_', '-')}"
        parser.add_argument(option, action="store_const", const=function, dest="part", help="only this part")
    args = parser.parse_args()
    chosen = training_stages if args.training else stages
    if args.dry_run:
        for stage in chosen("of this GPU"):
            env = "".join(f"{key}={shlex.quote(value)} " for key, value in (stage.env or {}).items())
            print(f"{stage.name:<10} {stage.seconds:>4} s  {env}{shlex.join(stage.command)}")
        return 0
    if not torch.cuda.is_available():
        print(f"error: no NVIDIA GPU for torch {torch.__version__} (CUDA {torch.version.cuda})", file=sys.stderr)
        return 1
    if args.part:
        args.part()
        return 0
    return run_all(chosen("{}.{}".format(*torch.cuda.get_device_capability())))


if __name__ == "__main__":
    sys.exit(main())
