# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
# On a machine without a GPU this is torch's CPU build; set TORCH to another requirement to choose yourself.
TORCH ?= torch==2.13.0
OLDEST_TRANSFORMERS = 5.17.0
BIN = $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-oldest check format clean

demo: $(VENV)/.ready
	$(BIN)/phi3v demo --output_dir demo-run

test: $(VENV)/.ready
	$(PYTEST)

# Whole runs through the command line: kill and resume, the demo.
test-slow: $(VENV)/.ready
	$(PYTEST) -m slow

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The default suite against the oldest transformers that phi3v promises to work with.
test-oldest: .venv-oldest/.ready
	$(MAKE) test VENV=.venv-oldest

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest demo-run

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'phi3v needs Python 3.11 or newer; name one with make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

ifneq ($(VENV),.venv-oldest)
.venv-oldest/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet "$(TORCH)" "transformers==$(OLDEST_TRANSFORMERS)"
	.venv-oldest/bin/pip install --quiet --editable ".[dev]"
	touch $@
endif
