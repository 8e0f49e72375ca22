# make demo: the centralized script, and then the same script federated, side by side.
# make test: the test suite.  make test-slow: the longer tests, which start many processes.
# make docs: the documentation as a site, in site/.  make dist: what a release consists of, in dist/.
# PYTHON picks the interpreter that makes .venv; DATA names a data folder for the demo.
PYTHON ?= python3
DATA ?=
BIN := .venv/bin
OPTIONS := $(if $(DATA),--data $(DATA))

EXTRAS ?= dev
TEST := $(BIN)/pytest --dist loadfile --durations 20
# Only these files, since to import the others takes each worker seconds; those that take longest come first.
LONGEST = readme_simulated benchmarks examples_ladder faults examples examples_simulated readme keras_ladder
SLOW = $(LONGEST:%=tests/e2e/test_%.py) $(shell grep -rl --include='test_*.py' 'mark\.slow' tests | sort)

.PHONY: demo test test-slow lint docs dist install

install: .venv/installed

.venv/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e ".[$(EXTRAS)]"
	touch $@

demo: install
	@echo "== Centralized: python cifar.py"
	@$(BIN)/python cifar.py --epochs 3 $(OPTIONS)
	@echo "== Federated: python server.py, and python client.py twice"
	@$(BIN)/python client.py --wait 120 > /dev/null & $(BIN)/python client.py --wait 120 > /dev/null & $(BIN)/python server.py $(OPTIONS)
	@echo "== Side by side"
	@$(BIN)/python benchmarks/side_by_side.py $(OPTIONS)

test: install
	$(TEST) -n 2

test-slow: install
	$(TEST) -n 4 -m slow --no-loadscope-reorder $(SLOW)  # many of them mostly wait

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	.venv-release/bin/python -m build
	.venv-release/bin/twine check --strict dist/*
