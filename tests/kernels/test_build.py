"""setup.py: what it builds, what it leaves out and says so, and what a source distribution contains."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def setup(folder, *arguments, **environment):
    command = [sys.executable, "setup.py", *arguments]
    options = dict(cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    done = subprocess.run(command, **options, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    """A copy of the sources, so that no other test sees what is built here."""
    for name in ("csrc", "mup2_fused"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "mup2_ref.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_without_a_compiler_the_compiled_part_is_left_out(project):
    no_compiler = {"CXX": "no-such-compiler", "MUP2_COMPILED": ""}
    status, said = setup(project, "build", **no_compiler)
    assert status == 0 and not list(project.glob("build/**/*.so")) and list(project.glob("build/**/optimizer.py"))
    said = [line for line in said.splitlines() if line.startswith("mup2_fused:")]
    assert len(said) == 1 and "no C++ compiler 'no-such-compiler'" in said[0] and "install a C++ compiler" in said[0]

    status, said = setup(project, "build", **(no_compiler | {"MUP2_COMPILED": "1"}))
    assert status and "MUP2_COMPILED=1, but there is no C++ compiler" in said
    status, said = setup(project, "build", MUP2_COMPILED="yes")
    assert status and "MUP2_COMPILED must be 0 or 1" in said


def test_a_source_distribution_contains_every_source(project):
    status, said = setup(project, "sdist", MUP2_COMPILED="0")
    assert status == 0, said
    with tarfile.open(next(project.glob("dist/*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert len(sources) > 20 and sources <= packed and {"setup.py", "mup2_ref.py"} <= packed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_an_error_of_the_compiler_is_an_error_of_the_installation(project):
    shutil.rmtree(project / "csrc" / "torch")
    (project / "csrc" / "cpu" / "choose.cpp").write_text("#error on purpose\n")
    status, said = setup(project, "build_ext", MUP2_COMPILED="", MUP2_CUDA="0")
    assert status and "error on purpose" in said and "MUP2_COMPILED=0 installs mup2_fused without" in said
