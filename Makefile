# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Neighbours stay together, so that a worker uses what it has captured; who is done takes over.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test quick explore lint bench bench-check workloads clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## train a ResNet on digits twice, by PyTorch alone and through graphopt, and compare
	$(BIN)/python examples/train_digits.py

test: $(STAMP) ## run all tests
	$(PYTEST)

quick: $(STAMP) ## run the tests that need neither ranks nor the corpus nor long
	$(PYTEST) -m "not distributed and not corpus and not slow"

explore: $(STAMP) ## run the property tests on new random examples
	$(PYTEST) -m hypothesis --hypothesis-profile=explore

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## measure step times against PyTorch; writes benchmarks/results/
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.pass_time

bench-check: $(STAMP) ## measure a few figures again, fail where they are far from the kept ones
	$(BIN)/python -m benchmarks.check

workloads: $(STAMP) ## train the scientific workloads with three seeds, hold them against their criteria
	$(BIN)/python -m benchmarks.workloads

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
