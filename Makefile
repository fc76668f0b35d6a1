# make demo: train the small transfer experiment, draw its picture, say in one sentence what it shows.
# make test: style, types and all quick tests.    make test-all: the slow tests, too.    make docs: write the tables anew.
# make bench: time one step on the CPU, against other implementations.
# These set up .venv first; with PYTHON=... they use that interpreter and its packages and install nothing.
# make cuda: build, link and import against a CUDA build of torch, in .venv-cuda; needs nvcc, but no GPU.
# make gpu: build, test and time on a machine with an NVIDIA GPU, with PYTHON or python3 and the torch that it has.
# make gpu-training: time training steps there, and train the transfer experiment on wide networks as far as it gets.

ifdef PYTHON
READY :=
GPU_PYTHON := $(PYTHON)
else
PYTHON := .venv/bin/python
READY := .venv/ready
GPU_PYTHON := python3
endif

demo: $(READY)
	$(PYTHON) -m experiments.demo

test: check $(READY)
	$(PYTHON) -m pytest

test-all: check $(READY)
	$(PYTHON) -m pytest -m "slow or not slow"

check: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: $(READY)
	$(PYTHON) -m docs.build

bench: $(READY)
	$(PYTHON) -m benchmarks.step_time

# A torch with CUDA from PyPI (some 5 GB); the toolkit must be of the same major version.
cuda:
	$(or $(CUDA_PYTHON),python3) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet torch==2.11.0 ninja pybind11 setuptools wheel numpy
	MUP2_CUDA=1 MUP2_COMPILED=1 .venv-cuda/bin/pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	cd .venv-cuda && bin/python -c "import mup2_fused; assert mup2_fused.built_with_cuda; print(mup2_fused)"
	cd .venv-cuda && bin/python -m mup2_fused.verify

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu

gpu-training:
	$(GPU_PYTHON) -m benchmarks.gpu --training

.venv/ready: pyproject.toml setup.py $(shell find csrc -type f) tests/constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --constraint tests/constraints.txt setuptools wheel ninja pybind11 torch
	MUP2_COMPILED=1 .venv/bin/pip install --quiet --constraint tests/constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

.PHONY: demo test test-all check docs bench cuda gpu gpu-training
