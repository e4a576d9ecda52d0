# From a fresh clone, with Python 3.11+ and make: `make run` and `make test` install what they need by themselves.
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Idle threads sleep instead of spinning: small models on few cores run several times faster so.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

# Where tests and claims find books to read; without any, they read text that they make themselves.
ifndef EVENFLOW_DATA
ifneq ($(wildcard ../shared/data),)
export EVENFLOW_DATA := $(abspath $(wildcard ../shared/data))
endif
endif

# Equal budgets without and with sinks, and no bound at all, which is stopped when it has used too many seconds.
MEMORIES := --memory 'window(window=256)' --memory 'streaming-llm(sink=4, window=252)' --memory full

# The first Python that runs and is new enough.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)

.PHONY: help run read test lint format bench claims coverage docs clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do printf 'make %-9s %s\n' "$$name" "$$what"; done

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one, or say make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

run: $(READY) ## Open the live page: an endless video that obeys while it plays, at the address that is printed
	$(BIN)/evenflow live

read: $(READY) ## Read a long text through three memories side by side: a table and a figure
	@mkdir -p runs
	@$(BIN)/python tools/stream_text.py > runs/topics.txt
	$(BIN)/evenflow read runs/topics.txt $(MEMORIES) --patience 75 --figure runs/read.png

test: $(READY) ## Run all tests, on two cores at once where there are two
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(READY) ## Check style, types, and that imports between rooms point downwards
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_rooms.py

format: $(READY) ## Format all files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Measure speed against what one would use instead
	$(BIN)/python -m benchmarks

claims: $(READY) ## Measure what the papers promised, beside their figures
	@for name in $$($(BIN)/evenflow claims list | cut -d' ' -f1); do \
		echo "evenflow claims run $$name" && $(BIN)/evenflow claims run $$name || exit 1; done
	$(BIN)/evenflow claims compare --into docs
	$(BIN)/evenflow claims report

coverage: $(READY) ## Run all tests and show the lines that none of them reaches
	$(BIN)/python -m pytest -q --cov --cov-report=term

docs: $(READY) ## Write docs/api.md from the docstrings, and docs/gallery.md from runs of all recipes
	$(BIN)/python tools/make_api_docs.py
	$(BIN)/python tools/make_gallery.py

clean: ## Remove the virtual environment and all that was made
	rm -rf $(VENV) build dist runs htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
