"""What can be known of the kernels on an A10G without one: registers, occupancy, bytes, and the time of those bytes.

    python benchmarks/a10g.py                                                needs nvcc and c++filt, no GPU
    python benchmarks/a10g.py --table benchmarks/results/a10g-computed.json  markdown of a finished run

Nothing is measured. Registers are those that ptxas reports for sm_86; occupancy follows from them and from the limits
of its multiprocessors; the floor is the time of the bytes that no SAM step can avoid to move (as in step_time.py) at
the 600 GB/s of the card's data sheet.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import step_time
from subjects import MODELS, count

ROOT = Path(__file__).resolve().parent.parent
GB_PER_S = 600
THREADS = 256  # kThreads of csrc/mup2_math.h
# Compute capability 8.6, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
REGISTERS, WARPS, BLOCKS, REGISTER_UNIT = 65536, 48, 16, 256  # registers are given to warps in such units
TYPES, SIZES = {"float": "fp32", "mup2::BFloat16": "bf16"}, {"fp32": 4, "bf16": 2}
MOVED = {  # kernel and first template argument -> name, values read and written per parameter
    ("norm", "0"): ("norm", 1),
    ("norm", "1"): ("norm, elementwise", 2),
    ("norm", "2"): ("norm, layerwise", 2),
    ("perturb", "0"): ("perturb", 4),
    ("perturb", "1"): ("perturb, elementwise", 4),
    ("update", "mup2::Sgd"): ("restore + update, SGD", 5),
    ("update", "mup2::Adam"): ("restore + update, Adam", 7),
}
OUT = ROOT / "benchmarks" / "results" / "a10g-computed.json"


def nvcc_version() -> str:
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release ([\d.]+)", printed)[0]


def compile_report(architecture: int = 86) -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin"]
        command += ["-o", f"{folder}/kernels.cubin", str(ROOT / "csrc" / "cuda_kernels.cu")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return subprocess.run(["c++filt"], input=report, capture_output=True, text=True, check=True).stdout


def occupancy(registers: int) -> tuple[int, float]:
    """(blocks of a multiprocessor, its warps in use over those that it can hold)"""
    warps = THREADS // 32
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(BLOCKS, WARPS // warps, REGISTERS // per_warp // warps)
    return blocks, blocks * warps / WARPS


def kernels(report: str) -> list[dict]:
    """One row per kernel and type; of the two sizes that its arguments come in, the one with more registers."""
    found: dict[tuple[str, str], int] = {}
    pattern = r"entry function 'void [^']*?(\w+)_kernel<([\w:]+), ([\w:]+), ([\w:]+),.*?Used (\d+) registers"
    for kernel, kind, w, g, registers in re.findall(pattern, report, re.DOTALL):
        if w == g and w in TYPES and (kernel, kind) in MOVED:
            key = kernel, kind, TYPES[w]
            found[key] = max(found.get(key, 0), int(registers))
    rows = []
    for (kernel, kind, dtype), registers in sorted(found.items(), key=lambda item: (item[0][2] != "fp32", item[0])):
        name, values = MOVED[kernel, kind]
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
    lines = ["| kernel | dtype | bytes per parameter | registers | blocks | occupancy |", "|---|---|---|---|---|---|"]
    for r in result["kernels"]:
        cells = r["kernel"], r["dtype"], r["bytes per parameter"], r["registers"], r["blocks"], f"{r['occupancy']:.0%}"
        lines.append(f"| {' | '.join(map(str, cells))} |")
    columns = list(result["floors"][0])[2:]
    lines += ["", f"| model | parameters | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for r in result["floors"]:
        cells = [r["model"], f"{r['params'] / 1e6:.3g} M", *(f"{r[c]:.3g} ms" for c in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print what is in this file")
    args = parser.parse_args()
    if args.table:
        result = json.loads(args.table.read_text())
    else:
        result = {"computed": f"for sm_86 at {GB_PER_S} GB/s, not measured", "nvcc": nvcc_version()}
        result["kernels"] = kernels(compile_report())
        result["floors"] = floors()
        OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown_table(result))


if __name__ == "__main__":
    main()
