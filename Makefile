# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The tests of the pages need a browser, which root can install; without one they say so.
CHROMIUM = command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
  { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || true

.PHONY: demo test test-all test-faults install install-dev clean python

demo: $(VENV)/.installed
	@"$(BIN)/lora-lab" demo

test: $(VENV)/.installed-dev
	@$(CHROMIUM)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/python" -m pytest -n 2 -m "not long"

test-all: $(VENV)/.installed-dev
	@$(CHROMIUM)
	"$(BIN)/python" -m pytest -n 2

test-faults: $(VENV)/.installed-dev
	"$(BIN)/python" -m pytest tests/test_faults.py

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt embedded.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "lora_lab needs Python 3.11 or newer as '$(PYTHON)'; try: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "'$(PYTHON)' has no venv module; install it (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/pip" install -qq -c constraints.txt torch==2.13.0
	"$(BIN)/pip" install -qq -c constraints.txt -e .
	"$(BIN)/pip" install -qq --no-deps -r embedded.txt
	"$(BIN)/lora-lab" help >/dev/null  # so that the first Tab need not wait
	@touch "$@"

$(VENV)/.installed-dev: $(VENV)/.installed
	"$(BIN)/pip" install -qq -c constraints.txt -e ".[dev]"
	@touch "$@"

clean:
	rm -rf "$(VENV)" .pytest_cache .mypy_cache .ruff_cache
