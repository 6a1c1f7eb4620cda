# make demo | test | slow | lint | types | imports | docs | rivals
# Everything happens in .venv; its stamps make repeated calls quick.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RIVALS := benchmarks/.venv
SOURCES := src tests examples benchmarks

export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: demo test slow lint types imports docs rivals clean

# Two test processes with one thread each; small models gain nothing from more.
test slow: export OMP_NUM_THREADS = 1

demo: $(VENV)/.train
	$(BIN)/loopaware run distances

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.train $(VENV)/.lm $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.test
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The same work by x-transformers and torchdeq, which live apart: loopaware does not depend on them.
rivals: $(RIVALS)/.rivals
	$(RIVALS)/bin/python benchmarks/rivals.py

clean:
	rm -rf $(VENV) $(RIVALS) site

# .venv/.test says that `pip install loopaware[test]` is done.
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(RIVALS)/.rivals: pyproject.toml constraints.txt benchmarks/constraints.txt | $(VENV)/.made
	$(PYTHON) -m venv $(RIVALS)
	$(RIVALS)/bin/python -m pip install --quiet -c constraints.txt -c benchmarks/constraints.txt -e . x-transformers torchdeq
	@touch $@

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python must be 3.11 or newer, got " + sys.version.split()[0] + ". Name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@
