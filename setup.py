"""Builds csrc/ into mup2_fused._C: for the CPU always, for CUDA where torch has it and a toolkit is (no GPU needed).

MUP2_CUDA=1 insists on CUDA, MUP2_CUDA=0 leaves it out; CUDA_HOME names the toolkit; TORCH_CUDA_ARCH_LIST the GPUs.
"""

import os
import platform
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ARCHITECTURES = "8.6;9.0+PTX"  # A10G, H100, and whatever comes after


def toolkit():
    """Folder of a CUDA toolkit with headers of torch's major version, and why there is none."""
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    for guess in filter(None, guesses):
        header = Path(guess, "include", "cuda.h")
        if header.is_file() and Path(guess, "include", "cuda_runtime.h").is_file():
            version = next(x for x in header.read_text().splitlines() if x.startswith("#define CUDA_VERSION"))
            major = int(version.split()[-1]) // 1000
            if major == int(torch.version.cuda.split(".")[0]):
                return guess, ""
            return None, f"the toolkit in {guess} is CUDA {major}, torch's is {torch.version.cuda}"
    return None, "no CUDA toolkit with include/cuda_runtime.h was found: set CUDA_HOME to its folder"


def cuda():
    """The toolkit's folder, or None to build for the CPU only; and a line that says why."""
    wish = os.environ.get("MUP2_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"MUP2_CUDA is 0 or 1, not {wish!r}")
    home, reason = toolkit() if torch.version.cuda else (None, f"torch {torch.__version__} is built without CUDA")
    if wish == "1" and home is None:
        raise SystemExit(f"MUP2_CUDA=1, but {reason}")
    return (None, "MUP2_CUDA=0") if wish == "0" else (home, reason)


def extension():
    home, reason = cuda()
    sources = ["bindings.cpp", "cpu_baseline.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp"]
    # No contraction of a * b + c: rounding as in mup2_ref.py. No errno, no traps: loops with sqrt vectorize.
    cxx = ["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    headers = [f"csrc/{name}" for name in ("mup2_math.h", "batches.h", "kernels.h", "cpu_kernels.h")]
    options = {"include_dirs": ["csrc"], "depends": headers, "extra_compile_args": {"cxx": cxx}}
    options["extra_link_args"] = ["-fopenmp"]
    if home:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = home
        sources.append("cuda_kernels.cu")
        options["define_macros"] = [("MUP2_CUDA", None)]
        options["extra_compile_args"]["nvcc"] = ["-O3", "-fmad=false", "--threads", "0"]
    built = f"CUDA ({os.environ['TORCH_CUDA_ARCH_LIST']}, {home})" if home else f"no CUDA: {reason}"
    print(f"mup2_fused: CPU ({platform.machine()}), {built}; torch {torch.__version__}")
    kind = cpp_extension.CUDAExtension if home else cpp_extension.CppExtension
    return kind("mup2_fused._C", [f"csrc/{name}" for name in sources], **options)


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
