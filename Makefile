# Each verb works on a fresh machine that has Python 3.11, make and git: it sets up what is missing by itself.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
.PHONY: help setup demo up check format test model-check chaos soak test-races test-metrics bench lock clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=

help:  ## What each verb does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## Virtual environment and exact versions, nothing outside this folder

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "[1/3] virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[2/3] installing the packages of requirements.lock"
	@total=$$(grep -c == requirements.lock); \
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -r requirements.lock 2>$(VENV)/pip.err \
	  | awk -v total=$$total '/^(Collecting|Processing|Requirement already)/ {n++; if (n <= total) printf "\r      %3d of %d", n, total; fflush()} \
	      /^Installing/ {printf "\n      unpacking ...\n"; fflush()}' \
	  || { cat $(VENV)/pip.err; exit 1; }
	@echo "[3/3] glmq itself"
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

demo: setup  ## A server, a worker with the demo checkpoint, two questions, a summary; stops everything
	@$(BIN)/python ops/demo.py

up: setup  ## The same, kept running until Ctrl-C: make up ARGS="--checkpoint PATH"
	@$(BIN)/glmq up $(ARGS)

check: setup  ## Formatting, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup  ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup  ## The whole suite, with real servers and processes; two at a time, a file's tests together
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

model-check: setup  ## The ledger's scripts against their model, from a new beginning each time: make model-check STEPS=100000
	GLMQ_MODEL_CHECK_STEPS=$(or $(STEPS),100000) GLMQ_MODEL_CHECK_SEED=$(or $(SEED),random) \
	  $(BIN)/pytest -s -k interleaving tests/producer/ledger/test_state_machine.py

chaos: setup  ## Workers, engines and Redis die at random instants while thousands of requests come in: make chaos ARGS="--kills 20 --requests 330"
	$(BIN)/python -m tests.chaos $(ARGS)

soak: setup  ## An hour of mixed load on one engine: nothing lost, nothing changed, memory where it was: make soak ARGS="--seconds 600"
	$(BIN)/python -m tests.soak $(ARGS)

test-races: setup  ## The suite with random pauses between the steps of a worker's threads: make test-races ARGS="tests/workers"
	GLMQ_TEST_PAUSES=$(or $(PAUSE),0.06) PYTHONPATH=$(CURDIR)/tests/pauses $(BIN)/pytest -n 2 --dist loadfile $(ARGS)

test-metrics: setup  ## Metrics, dashboards and alerts against a real Prometheus (fetched where there is apt)
	$(BIN)/pytest tests/ops tests/workers/test_metrics.py tests/journey/test_metrics.py $(ARGS)

bench: setup  ## Benchmarks of this machine: make bench ARGS="engine --batch 16"
	$(BIN)/python -m ops.bench.$(ARGS)

lock:  ## Resolve anew and write requirements.lock (torch stays: see the file)
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -q --disable-pip-version-check "torch==2.13.0" ".[gateway,worker,reference,evaluate,dev]"
	@{ sed -n '/^#/p;/^[^#]/q' requirements.lock; \
	   build/lock/bin/python -m pip freeze --all --exclude glmq --exclude pip \
	   | sed -E 's/\+cpu$$//; s/^(transformers|tokenizers|huggingface[-_]hub|hf-xet|peft|accelerate|cpm[-_]kernels)==.*/&; python_version < "3.12"/'; \
	 } > build/requirements.lock && mv build/requirements.lock requirements.lock
	@rm -rf build/lock

clean:  ## Remove everything that the other verbs made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .glmq
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
