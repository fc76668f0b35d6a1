"""Builds csrc/ into mup2_fused._C: for the CPU, and for CUDA where torch has it and a toolkit is found (no GPU needed).

Without a C++ compiler the package is installed without mup2_fused._C, and mup2_fused works with torch's operations.
Environment: MUP2_COMPILED=1 raises an error instead, MUP2_COMPILED=0 builds nothing. MUP2_CUDA=1 insists on CUDA,
MUP2_CUDA=0 leaves it out. CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the GPUs, CXX the compiler.
"""

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

ARCHITECTURES = "7.5;8.0;8.6;9.0+PTX"  # T4, A100, A10G, H100, and later GPUs


def wish(name):
    """The value of an environment variable: "1", "0", or "" if it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, not {value!r}")
    return value


def say(text):
    """Print a line, but not when pip only asks for the package's metadata."""
    if not {"egg_info", "dist_info"}.intersection(sys.argv):
        print(f"mup2_fused: {text}")


def missing():
    """Why the extension cannot be built here; "" if it can."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return ""


def toolkit():
    """Folder of a CUDA toolkit of torch's major version, or None and the reason."""
    import torch
    from torch.utils import cpp_extension

    reason = "no CUDA toolkit with bin/nvcc and include/cuda_runtime.h was found: set CUDA_HOME to its folder"
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    for guess in filter(None, guesses):
        if not all(Path(guess, file).is_file() for file in ("bin/nvcc", "include/cuda.h", "include/cuda_runtime.h")):
            continue
        lines = Path(guess, "include", "cuda.h").read_text().splitlines()
        version = int(next(line for line in lines if line.startswith("#define CUDA_VERSION")).split()[-1])
        if version < 12010:
            reason = f"the toolkit in {guess} is older than CUDA 12.1, whose kernels take 32 KB of parameters"
        elif version // 1000 != int(torch.version.cuda.split(".")[0]):
            reason = f"the toolkit in {guess} is CUDA {version // 1000}, torch's is {torch.version.cuda}"
        else:
            return guess, ""
    return None, reason


def cuda():
    """The toolkit's folder, or None to build for the CPU only; and a line that says why."""
    import torch

    wanted = wish("MUP2_CUDA")
    if wanted == "0":
        return None, "MUP2_CUDA=0"
    home, reason = toolkit() if torch.version.cuda else (None, f"torch {torch.__version__} is built without CUDA")
    if wanted == "1" and home is None:
        raise SystemExit(f"MUP2_CUDA=1, but {reason}")
    return home, reason


def extension():
    import torch
    from torch.utils import cpp_extension

    home, reason = cuda()
    # -ffp-contract=off: a * b + c is rounded as in mup2_ref.py. -fno-...: loops with sqrt are vectorized. -g0: without
    # debug information the build takes two thirds of the time.
    cxx = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden"]
    cxx += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    files = sorted(str(path) for path in Path("csrc").rglob("*") if path.is_file())
    sources = [file for file in files if file.endswith(".cpp") or (home and file.endswith(".cu"))]
    options = {
        "include_dirs": [str(Path("csrc").resolve())],
        "extra_compile_args": {"cxx": cxx},
        "extra_link_args": ["-fopenmp"],
    }
    options["depends"] = files  # a change of a header builds again
    if home:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = home
        options["define_macros"] = [("MUP2_CUDA", None)]
        options["extra_compile_args"]["nvcc"] = ["-O3", "-fmad=false", "--threads", "0"]
    built = f"CUDA ({os.environ['TORCH_CUDA_ARCH_LIST']}, {home})" if home else f"no CUDA: {reason}"
    say(f"CPU ({platform.machine()}), {built}; torch {torch.__version__}")
    kind = cpp_extension.CUDAExtension if home else cpp_extension.CppExtension

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                hint = "see the errors above; MUP2_COMPILED=0 installs mup2_fused without its compiled part"
                raise SystemExit(f"mup2_fused._C cannot be built: {error}; {hint}") from error

    return {"ext_modules": [kind("mup2_fused._C", sources, **options)], "cmdclass": {"build_ext": Build}}


def options():
    """Arguments of setup() for the extension, or none if it is left out."""
    if wish("MUP2_COMPILED") == "0":
        return {}
    if not (reason := missing()):
        return extension()
    if wish("MUP2_COMPILED") == "1":
        raise SystemExit(f"MUP2_COMPILED=1, but {reason}")
    say(f"installed without its compiled part: {reason}. To get it, install a C++ compiler and then this package again")
    return {}


setup(**options())
