# Everything a developer runs; `make` alone lists it.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make requirements"
# More arguments for the program behind a target: make test ARGS="-k rabbit"
ARGS ?=

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A stamp for each set of packages, so that a second `make` starts at once.
$(VENV)/.examples: pyproject.toml requirements/examples.txt
	@tools/venv $(VENV)
	@echo "Installing Flame and what its examples need"
	@$(PIP) install --requirement requirements/examples.txt
	@$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml requirements/dev.txt
	@tools/venv $(VENV)
	@echo "Installing Flame and what its tests need"
	@$(PIP) install --no-compile --requirement requirements/dev.txt
	@$(PIP) install --no-deps --editable .
	@touch $@ $(VENV)/.examples

.PHONY: demo
demo: $(VENV)/.examples  ## Sweep classifiers over worker processes; needs no server
	@$(BIN)/flame run examples/digits/digits.yaml $(ARGS)

.PHONY: test
test: $(VENV)/.dev  ## Run all tests; installs RabbitMQ and Redis when they are missing
	@tools/require rabbitmq-server=rabbitmq-server redis-server=redis-server
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

.PHONY: test-all
test-all: test  ## Run all tests, then those against PostgreSQL and RabbitMQ 4 (root, debootstrap)
	@PYTHONPATH=tests $(BIN)/python -m lab.debian || echo "Without it the tests below are skipped"
	@tools/require pg_ctlcluster=postgresql
	@LAB_ALL=1 LAB_RABBIT=4 $(BIN)/python -m pytest tests/integration tests/acceptance/test_broker_faults.py \
		$(ARGS)

.PHONY: compose-proof
compose-proof: $(VENV)/.dev  ## Build the images, start the whole system and use it (Docker; or Podman, root)
	@docker info >/dev/null 2>&1 || tools/require podman=podman runc=runc ip=iproute2 debootstrap=debootstrap
	@LAB_COMPOSE=1 $(BIN)/python -m pytest tests/acceptance/test_compose.py $(ARGS)

.PHONY: soak
soak: $(VENV)/.dev  ## Run the stories that take many minutes (LAB_PAUSE_S=20 shortens them)
	@tools/require rabbitmq-server=rabbitmq-server
	@$(BIN)/python -m pytest tests/soak tests/acceptance -m soak $(ARGS)

.PHONY: chaos
chaos: $(VENV)/.dev  ## Kill, stop and cut everything under 10,000 calls, half an hour (ARGS=--help)
	@tools/require rabbitmq-server=rabbitmq-server
	@PYTHONPATH=tests $(BIN)/python -m chaos $(ARGS)

.PHONY: unit
unit: $(VENV)/.dev  ## Run the tests that need no service
	@$(BIN)/python -m pytest tests/unit $(ARGS)

.PHONY: check
check: $(VENV)/.dev  ## Lint, format, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: format
format: $(VENV)/.dev  ## Put the code into shape
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV)/.dev  ## Measure Flame beside its peers; writes benchmarks/results
	@tools/require rabbitmq-server=rabbitmq-server
	@$(BIN)/python benchmarks/run.py $(ARGS)

.PHONY: docs
docs: $(VENV)/.dev  ## Build the documentation as HTML in build/docs; broken links fail
	@$(BIN)/mkdocs --quiet build --strict

.PHONY: wheel
wheel: $(VENV)/.dev  ## Build the wheel in dist
	@rm -rf dist
	@$(BIN)/python -m build --wheel --outdir dist .

.PHONY: smoke
smoke: wheel  ## Install the wheel into an empty environment and call something there
	@rm -rf build/smoke
	@tools/venv build/smoke
	@build/smoke/bin/python -m pip --disable-pip-version-check --quiet install \
		--constraint requirements/base.txt dist/*.whl
	@cd build && smoke/bin/python ../tests/smoke/smoke.py

.PHONY: requirements
requirements: $(VENV)/.dev  ## Compile requirements/*.txt anew (ARGS=--upgrade for newer versions)
	@$(COMPILE) $(ARGS) pyproject.toml --extra dev -o requirements/dev.txt
	@$(COMPILE) pyproject.toml --extra all -c requirements/dev.txt -o requirements/base.txt
	@$(COMPILE) pyproject.toml --extra all --extra examples -c requirements/dev.txt \
		-o requirements/examples.txt
	@$(COMPILE) $(ARGS) requirements/bench.in -o requirements/bench.txt

.PHONY: clean
clean:  ## Remove what was built, the environment included
	@rm -rf $(VENV) .bench-venv build dist .mypy_cache .pytest_cache .ruff_cache \
		.import_linter_cache .hypothesis
