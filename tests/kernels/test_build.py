"""setup.py: what it builds, what it leaves out and says so, and what the distributions contain."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser

import pytest
from small_problems import ROOT

import mup2_fused

RUN_SETUP = """
import os, runpy, setuptools, sys
sys.platform, setuptools.__version__ = os.environ["TEST_PLATFORM"], os.environ["TEST_SETUPTOOLS"]
if sys.platform == "win32":
    del os.uname
runpy.run_path("setup.py", run_name="__main__")
"""


def run(folder, *command, **environment):
    options = dict(cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *command], **options, check=False)
    return done.returncode, done.stdout + done.stderr


def setup(folder, *arguments, platform="linux", setuptools="84.2.1", **environment):
    """Runs setup.py, which believes to be on this platform with this version of setuptools."""
    environment |= dict(TEST_PLATFORM=platform, TEST_SETUPTOOLS=setuptools)
    return run(folder, "-c", RUN_SETUP, *arguments, **environment)


@pytest.fixture
def project(tmp_path):
    """A copy of the sources, so that no other test sees what is built here."""
    for name in ("csrc", "mup2_fused"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "mup2_ref.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "platform, compiler, words",
    [
        ("linux", "no-such-compiler", "there is no C++ compiler 'no-such-compiler'. To get it, install one"),
        ("linux", "./clang -O2", "it needs g++, and './clang' is clang"),
        ("darwin", "c++", "it is for Linux, and this is darwin"),
        ("win32", "cl", "it is for Linux, and this is win32"),
    ],
)
def test_where_it_cannot_be_built_the_compiled_part_is_left_out(project, platform, compiler, words):
    (project / "clang").write_text("#!/bin/sh\necho '#define __clang__ 1'\n")
    (project / "clang").chmod(0o755)
    here = dict(platform=platform, CXX=compiler)
    status, said = setup(project, "build", MUP2_COMPILED="", **here)
    assert status == 0 and not list(project.glob("build/**/*.so")) and list(project.glob("build/**/optimizer.py")), said
    (line,) = [line for line in said.splitlines() if line.startswith("mup2_fused:")]
    assert "installed without its compiled part: " + words in line

    status, said = setup(project, "build", MUP2_COMPILED="1", **here)
    assert status and "MUP2_COMPILED=1 asks for the compiled part, but " + words in said


@pytest.mark.parametrize("fault", ["ImportError", "OSError"])
def test_a_torch_that_cannot_be_imported(project, fault):
    """OSError: one of its libraries cannot be loaded."""
    (project / "broken").mkdir()
    (project / "broken" / "torch.py").write_text(f"raise {fault}('libcudart.so is missing')")
    here = dict(PYTHONPATH=str(project / "broken"), CXX="g++", MUP2_COMPILED="")
    status, said = setup(project, "build", **here)
    words = "without its compiled part: torch cannot be imported (libcudart.so is missing)"
    assert status == 0 and words in said, said


def test_wrong_settings_and_old_versions(project):
    status, said = setup(project, "build", MUP2_COMPILED="yes")
    assert status and "MUP2_COMPILED must be 0 or 1" in said
    for version, licence in (("76.1.0", "License: MIT"), ("84.2.1", "License-Expression: MIT")):
        status, said = setup(project, "egg_info", setuptools=version)
        assert status == 0 and licence in (project / "mup2_sam.egg-info" / "PKG-INFO").read_text().splitlines(), said


def test_the_changelog_begins_with_this_version():
    first, *_ = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == mup2_fused.__version__


def test_distributions(project):
    """What `python -m build` makes: a source distribution, and from this a wheel, which is imported elsewhere."""
    for folder in ("docs", "experiments/results", "tests/kernels"):
        (project / folder).mkdir(parents=True)
        (project / folder / "test_not_packed.py").touch()
    status, said = run(project, "-m", "build", "--no-isolation", MUP2_COMPILED="0")
    assert status == 0, said
    (packed,), (wheel,) = project.glob("dist/*.tar.gz"), project.glob("dist/*-py3-none-any.whl")
    with tarfile.open(packed) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
        archive.extractall(project / "site")

    stub = "mup2_ref-stubs/__init__.pyi"  # for type checkers
    names = [[str(x.relative_to(project)) for x in (project / y).rglob("*.*")] for y in ("csrc", "mup2_fused")]
    code, python = set(names[0]), {*names[1], "mup2_ref.py"}
    assert len(code) > 20 and {"mup2_fused/py.typed", "mup2_fused/_C.pyi", "mup2_fused/check/run.py"} <= python
    assert installed == {*python, stub} and code | python | {"setup.py", "README.md", "LICENSE"} <= sources
    assert (project / "site" / stub).read_text() == (project / "mup2_ref.py").read_text()
    assert packed.stat().st_size < 300_000 and not any(re.match("experiments|tests|docs", name) for name in sources)

    fields = Parser().parsestr(metadata)
    assert (fields["Version"], fields["License-Expression"]) == (mup2_fused.__version__, "MIT")
    assert (fields["License-File"], fields["Description-Content-Type"]) == ("LICENSE", "text/markdown")
    assert all("https://arxiv.org/" in url for url in fields.get_all("Project-URL"))
    text, readme = fields.get_payload(), (project / "README.md").read_text()
    (example, *_) = re.findall(r"```python\n.*?```", readme, re.DOTALL)
    assert example in text and text.startswith("# muP² SAM\n") and "](" in readme and "](" not in text

    imports = "import mup2_fused, mup2_fused.check, mup2_fused.verify; print(mup2_fused.__file__)"
    status, said = run(project / "dist", "-c", imports, PYTHONPATH=str(project / "site"))
    assert status == 0 and said == f"{project}/site/mup2_fused/__init__.py\n", said


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_an_error_of_the_compiler_is_an_error_of_the_installation(project):
    shutil.rmtree(project / "csrc" / "torch")
    (project / "csrc" / "cpu" / "choose.cpp").write_text("#error on purpose\n")
    status, said = setup(project, "build_ext", MUP2_COMPILED="", MUP2_CUDA="0")
    assert status and "error on purpose" in said and "MUP2_COMPILED=0 installs mup2_fused without" in said
