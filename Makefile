# make demo: train the reduced transfer experiment, print its table, draw its figure.    make test: the whole suite.
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
	$(PYTHON) experiments/transfer.py --demo

test: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest

bench: $(READY)
	$(PYTHON) benchmarks/step_time.py

# A torch with CUDA from PyPI (some 5 GB); the toolkit must be of the same major version.
cuda:
	$(or $(CUDA_PYTHON),python3) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet torch==2.11.0 ninja pybind11 setuptools wheel numpy
	MUP2_CUDA=1 .venv-cuda/bin/pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	cd .venv-cuda && bin/python -c "import mup2_fused; assert mup2_fused.built_with_cuda; print(mup2_fused._C)"
	cd .venv-cuda && bin/python -m mup2_fused.verify

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py

gpu-training:
	$(GPU_PYTHON) benchmarks/gpu.py --training

.venv/ready: pyproject.toml setup.py $(wildcard csrc/*) tests/constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --constraint tests/constraints.txt setuptools wheel ninja pybind11 torch
	.venv/bin/pip install --quiet --constraint tests/constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

.PHONY: demo test bench cuda gpu gpu-training
