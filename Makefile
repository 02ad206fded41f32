# Two commands do everything: `make demo` runs the main job, `make test` checks it.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo install test lint format paper bench clean

demo: .venv/installed
	$(BIN)/convoy run experiments/quickstart.yaml --out out/quickstart --force

install: .venv/installed

test: lint
	$(BIN)/python -m pytest

lint: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

paper: .venv/installed
	$(BIN)/convoy paper --out out/paper --doc docs/paper.md

bench: .venv/installed-for-tests
	$(BIN)/python -m experiments.bench
	$(BIN)/python -m experiments.bench_runtime
	$(BIN)/python -m experiments.bench_sweep

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: .venv/created pyproject.toml constraints.txt
	$(INSTALL) --editable .
	touch $@

.venv/installed-for-tests: .venv/installed
	$(INSTALL) --editable '.[test,runtime,nvidia-data]'
	touch $@

clean:
	rm -rf .venv build out *.egg-info
