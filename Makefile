# One environment in .venv, made once; `make` lists what there is.

PYTHON ?= python3
# More options for pip when it fetches torch, for example --index-url with the index of its builds for the CPU alone.
TORCH_PIP ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
FAULTS_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers

.DEFAULT_GOAL := help
.PHONY: help venv tools check format test faults soak test-bench demo bench bench-full clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## make .venv and install the package, editable, with everything the tests need

# torch first and alone: while pip weighs a range of versions it may fetch each one's gigabytes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_PIP) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

tools:
	@.ci/tools

check: $(INSTALLED) ## formatting, lint, types and the architecture of the package
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet tests/unit/test_architecture.py

format: $(INSTALLED) ## put the sources into the form that `make check` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: tools $(INSTALLED) ## all tests but the benchmarks' own; PYTEST_ARGS="-k name" for some
	$(BIN)/pytest -m "not bench" $(PYTEST_ARGS)

faults: $(INSTALLED) ## 2,000 runs in which processes, requests and files fail, in a few minutes; FAULTS_ARGS="--help" tells more
	$(BIN)/python -m tests.faults $(FAULTS_ARGS)

soak: tools $(INSTALLED) ## half an hour of trainings that are killed before a store that fails; SOAK_ARGS="--minutes 5 --outage 60" is shorter
	$(BIN)/python -m tests.faults.soak $(SOAK_ARGS)

test-bench: tools $(INSTALLED) ## the benchmarks' own tests: stores, peers, harness, report
	$(BIN)/pytest -m bench $(PYTEST_ARGS)

demo: $(INSTALLED) ## kill a training run in the middle, resume it from S3, compare every loss bit for bit
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

$(PEERS): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]' && touch $@ || \
	echo "Some other systems could not be installed: each will be a line that says so." >&2

bench: $(PEERS) ## compare with other ways to save, in under six minutes, and print the README's table; BENCH_ARGS="--help" tells more
	$(BIN)/python -m benchmarks.bench $(BENCH_ARGS)

bench-full: $(PEERS) ## every scenario, more systems and rounds: almost two hours
	$(BIN)/python -m benchmarks.bench --full $(BENCH_ARGS)

clean: ## remove .venv and everything that can be made again
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
