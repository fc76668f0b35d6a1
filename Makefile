# make demo: train the reduced transfer experiment, print its table, draw its figure.    make test: the whole suite.
# Both set up .venv first; with PYTHON=... they use that interpreter and its packages and install nothing.

ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/ready
endif

demo: $(READY)
	$(PYTHON) experiments/transfer.py --demo

test: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest

.venv/ready: pyproject.toml setup.py $(wildcard csrc/*) tests/constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --constraint tests/constraints.txt setuptools wheel ninja pybind11 torch
	.venv/bin/pip install --quiet --constraint tests/constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

.PHONY: demo test
