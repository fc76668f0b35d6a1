"""The kernels on an A10G, computed without one: registers, occupancy, bytes, and the time that moving the bytes takes.

    python -m benchmarks.a10g                                                needs nvcc and c++filt, no GPU

Nothing is measured. ptxas reports the registers for sm_86; the occupancy follows from them and from the limits of a
multiprocessor. The floor is the time of the bytes that every SAM step has to move (see step_time.py) at 600 GB/s, which
the data sheet of the card promises.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks import step_time
from benchmarks.subjects import MODELS, count
from experiments.commands import markdown, write_json

ROOT = Path(__file__).resolve().parent.parent
GB_PER_S = 600
THREADS = 256  # kThreads in csrc/core/batches.h
# Compute capability 8.6, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
REGISTERS, WARPS, BLOCKS, REGISTER_UNIT = 65536, 48, 16, 256  # a warp gets a multiple of REGISTER_UNIT registers
TYPES, SIZES = {"float": "fp32", "mup2::BFloat16": "bf16"}, {"fp32": 4, "bf16": 2}
# Kernel, first template argument, whether it sums the moment's squares -> name, values read and written per parameter.
MOVED = {
    ("norm", "0", ""): ("norm", 1),
    ("norm", "1", ""): ("norm, elementwise", 2),
    ("norm", "2", ""): ("norm, layerwise", 2),
    ("perturb", "0", ""): ("perturb", 4),
    ("perturb", "1", ""): ("perturb, elementwise", 4),
    ("update", "mup2::Sgd", ""): ("restore + update, SGD", 5),
    ("update", "mup2::Sgd", ", true"): ("restore + update, SGD, with sums", 5),
    ("update", "mup2::Adam", ""): ("restore + update, Adam", 7),
    ("update", "mup2::Adam", ", true"): ("restore + update, Adam, with sums", 7),
}
OUT = ROOT / "benchmarks" / "results" / "a10g-computed.json"


def nvcc_version() -> str:
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release ([\d.]+)", printed)[0]


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def compile_kernels(architecture: int = 86) -> tuple[str, str]:
    """(report of ptxas, PTX) of all kernels. Raises RuntimeError with nvcc's words if it fails."""
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", f"-arch=sm_{architecture}"]
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            command = ["nvcc", *flags, "-cubin", "--keep", "--keep-dir", folder, "-o", f"{folder}/{source.stem}.cubin"]
            running.append(subprocess.Popen([*command, str(source)], stderr=subprocess.PIPE, text=True))
        reports = [process.communicate()[1] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError("".join(reports))
        ptx = [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]
    return demangled("".join(reports)), demangled("".join(ptx))


def occupancy(registers: int) -> tuple[int, float]:
    """(blocks that a multiprocessor holds, share of its warps that are in use)"""
    warps = THREADS // 32
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(BLOCKS, WARPS // warps, REGISTERS // per_warp // warps)
    return blocks, blocks * warps / WARPS


def kernels(report: str) -> list[dict]:
    """One row per kernel and type. A kernel exists for two sizes of batches: the one with more registers."""
    found: dict[tuple[str, str, str, str], int] = {}
    arguments = r"<([\w:]+), ([\w:]+), ([\w:]+),[^(]*?(, true)?>\("
    pattern = rf"entry function 'void [^']*?(\w+)_kernel{arguments}.*?Used (\d+) registers"
    for kernel, kind, w, g, sums, registers in re.findall(pattern, report, re.DOTALL):
        if w == g and w in TYPES and (kernel, kind, sums) in MOVED:
            key = kernel, kind, sums, TYPES[w]
            found[key] = max(found.get(key, 0), int(registers))
    rows = []
    for (*kernel, dtype), registers in sorted(found.items(), key=lambda item: (item[0][3] != "fp32", item[0])):
        name, values = MOVED[tuple(kernel)]
        blocks, share = occupancy(registers)
        row = {"kernel": name, "dtype": dtype, "bytes per parameter": values * SIZES[dtype], "registers": registers}
        rows.append(row | {"blocks": blocks, "occupancy": share})
    return rows


def floors() -> list[dict]:
    rows = []
    for model, shapes in MODELS.items():
        row = {"model": model, "params": count(shapes)}
        for dtype, size in SIZES.items():
            for base, values in step_time.MOVED.items():
                row[f"{dtype} {base}"] = 1e3 * count(shapes) * size * values / (GB_PER_S * 1e9)
        rows.append(row)
    return rows


def markdown_table(result: dict) -> str:
    head = ["kernel", "dtype", "bytes per parameter", "registers", "blocks"]
    kernels = [[*(r[key] for key in head), f"{r['occupancy']:.0%}"] for r in result["kernels"]]
    columns = list(result["floors"][0])[2:]
    times = [[r["model"], f"{r['params'] / 1e6:.3g} M", *(f"{r[c]:.3g} ms" for c in columns)] for r in result["floors"]]
    return f"{markdown([*head, 'occupancy'], kernels)}\n\n{markdown(['model', 'parameters', *columns], times)}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    result = {"computed": f"for sm_86 at {GB_PER_S} GB/s, not measured", "nvcc": nvcc_version()}
    result |= {"kernels": kernels(compile_kernels()[0]), "floors": floors()}
    write_json(OUT, result)
    print(markdown_table(result))


if __name__ == "__main__":
    main()
