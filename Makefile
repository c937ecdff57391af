# Everything starts from a Python and this file: `make demo`, `make test`. Nothing that is done is done again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := configs deepzero_core flows infra simulators tasks

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create the virtual environment and install the package and what it needs

# The stamp is older than either file when requirements have changed: then pip brings the environment up to date.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); } \
		|| { echo "error: $(PYTHON) -m venv failed; some systems have it in a package of its own (python3-venv)" >&2; exit 2; }
	@echo "installing the pinned requirements (minutes and some GB the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(INSTALLED) ## Train a network without a gradient, certify it and report
	@$(BIN)/deepzero run pipeline --config demo

test: lint ## Check style and types and run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Put imports and layout in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## Run the benchmarks, e.g. with ARGUMENTS='--case cnn5'
	@$(BIN)/python -c 'import torchzero' 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks $(ARGUMENTS)

clean: ## Remove caches and build products, keep the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(INSTALLED)

distclean: clean ## Remove the environment as well
	rm -rf $(VENV)
