"""Builds csrc/ into mup2_fused._C: for the CPU, and for CUDA where torch has it and a toolkit is found (no GPU needed).

On other systems than Linux, and without g++, the package is installed without mup2_fused._C, and mup2_fused works with
torch's operations.
Environment: MUP2_COMPILED=1 raises an error instead, MUP2_COMPILED=0 builds nothing. MUP2_CUDA=1 insists on CUDA,
MUP2_CUDA=0 leaves it out. CUDA_HOME names the toolkit, TORCH_CUDA_ARCH_LIST the GPUs, CXX the compiler.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py


def description():
    """For a package index: the beginning of README.md, its example and its limits. Its links lead nowhere there."""
    first, *sections = re.split("^(?=## )", Path("README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    kept = [first.partition("\n![")[0], *(text for text in sections if text.startswith(("## Usage", "## Limits")))]
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", "\n".join(kept))


class BuildPython(build_py):
    def run(self):
        """Installs mup2_ref.py as a stub, too. A type checker reads types in folders with a py.typed, and in stubs."""
        super().run()
        if not self.editable_mode:
            self.mkpath(f"{self.build_lib}/mup2_ref-stubs")
            self.copy_file("mup2_ref.py", f"{self.build_lib}/mup2_ref-stubs/__init__.pyi")


def wish(name):
    """The value of an environment variable: "1", "0", or "" if it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, not {value!r}")
    return value


def macros(compiler):
    """What a C++ compiler defines; empty if it does not run."""
    command = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


obstacle = ""  # why the extension is not built
cxx = shlex.split(os.environ.get("CXX") or "c++")
if wish("MUP2_COMPILED") == "0":
    obstacle = "MUP2_COMPILED=0"
elif sys.platform != "linux":
    obstacle = f"it is for Linux, and this is {sys.platform}"
elif shutil.which(cxx[0]) is None:
    obstacle = f"there is no C++ compiler {cxx[0]!r}. To get it, install one and then this package again"
elif "__clang__" in macros(cxx):
    obstacle = f"it needs g++, and {cxx[0]!r} is clang. To get it, set CXX=g++"
else:
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:  # OSError: a library of torch cannot be loaded
        obstacle = f"torch cannot be imported ({error})"


def toolkit():
    """Folder of a CUDA toolkit of torch's major version, or None and the reason."""
    if wish("MUP2_CUDA") == "0":
        return None, "MUP2_CUDA=0"
    if not torch.version.cuda:
        return None, f"torch {torch.__version__} is built without CUDA"
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


def extension(home):
    """Arguments of setup() for the extension, with CUDA if the folder of a toolkit is given."""

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(f"{error}. MUP2_COMPILED=0 installs mup2_fused without its compiled part") from error

    # -ffp-contract=off: a * b + c is rounded as in mup2_ref.py. -fno-...: loops with sqrt vectorize. -g0: fast build.
    cxx = "-O3 -g0 -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
    files = sorted(str(path) for path in Path("csrc").rglob("*") if path.is_file())
    sources = [file for file in files if file.endswith(".cpp") or (home and file.endswith(".cu"))]
    options = {"include_dirs": [str(Path("csrc").resolve())], "define_macros": [("MUP2_CUDA", None)] if home else []}
    options["extra_compile_args"] = {"cxx": shlex.split(cxx), "nvcc": ["-O3", "-fmad=false", "--threads", "0"]}
    options |= {"extra_link_args": ["-fopenmp"], "depends": files}  # a change of a header builds again
    kind = cpp_extension.CUDAExtension if home else cpp_extension.CppExtension
    return {"ext_modules": [kind("mup2_fused._C", sources, **options)], "cmdclass": {"build_ext": Build}}


def options():
    """Arguments of setup(), none if the extension is left out, and a line that says what is built."""
    if obstacle and wish("MUP2_COMPILED") == "1":
        raise SystemExit(f"MUP2_COMPILED=1 asks for the compiled part, but {obstacle}")
    if obstacle:
        return {}, f"installed without its compiled part: {obstacle}"
    home, reason = toolkit()
    if home is None and wish("MUP2_CUDA") == "1":
        raise SystemExit(f"MUP2_CUDA=1, but {reason}")
    about = f"no CUDA: {reason}"
    if home:
        gpus = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "7.5;8.0;8.6;9.0+PTX")  # T4, A100, A10G, H100, later ones
        about = f"CUDA ({gpus}, {home})"
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = home
    return extension(home), f"CPU ({platform.machine()}), {about}; torch {torch.__version__}"


arguments, about = options()
if not {"egg_info", "dist_info"}.intersection(sys.argv):  # where pip only asks for the package's metadata
    print(f"mup2_fused: {about}")
arguments["cmdclass"] = {"build_py": BuildPython} | arguments.get("cmdclass", {})
modern = int(setuptools.__version__.partition(".")[0]) >= 77  # older ones, as in Ubuntu 24.04, know no expressions
arguments |= {"license_expression" if modern else "license": "MIT"}
setuptools.setup(long_description=description(), long_description_content_type="text/markdown", **arguments)
