# `make demo` runs the tiny model from checkpoint to text, `make serve` serves it over HTTP, `make test` runs every check of the Python side.
# `make cpp` builds the C++ runtime, installing Debian packages where it is root, and runs its tests and sanitizers.
# `make mutants` changes one place of a module at a time and lists the changes that its tests do not notice (docs/testing.md).
# Each makes its own virtual environment first; PYTHON is any interpreter of 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin

demo: .venv/ready
	$(BIN)/python -m chameleon_deploy.demo

serve: models/demo/chameleon/bundle.json
	$(BIN)/python -m chameleon_deploy.serve models/demo/chameleon

models/demo/chameleon/bundle.json: | .venv/ready
	$(BIN)/python -m chameleon_deploy.export models/tiny/chameleon --out models/demo/chameleon

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --ignore tests/export/test_tensorrt.py
	$(BIN)/python -m pytest tests/export/test_tensorrt.py # apart: TensorRT for RTX has ended a process that did all the rest before

mutants: .venv/ready
	$(BIN)/python -m tests.mutation

cpp: .venv/ready
	.ci/cpp

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[cpu,export,peers,serve,tensorrt-rtx,dev]'
	touch $@

.PHONY: cpp demo mutants serve test
