# `make demo` and `make test` are all that a newcomer needs; each sets up what it uses in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install

.DEFAULT_GOAL := help
.PHONY: help demo install test torture bench lint typecheck check clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  make \1\t\2/p' Makefile

demo: $(VENV)/made  ## sequential against concurrent on the built-in server: no key, no network
	@test -e $(VENV)/live || { $(PIP) --retries 0 --timeout 20 -r requirements.txt && touch $(VENV)/live; } \
	  || echo "The package index is out of reach: the demo runs with what is installed."
	$(BIN)/python concurrent_prompts.py --demo --compare -b $$($(BIN)/python -c "$$FOUND")

export FOUND := from importlib.util import find_spec as f; \
print(",".join(["stdlib"] + ["raw-aiohttp"] * bool(f("aiohttp")) + ["openai-sdk"] * bool(f("openai"))))

install: $(VENV)/dev  ## set up .venv with all that the backends and the tests use

test: $(VENV)/dev  ## run the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

torture: $(VENV)/dev  ## kill, interrupt and starve real runs, and count what was lost (more than an hour)
	$(BIN)/python -m tests.torture
	$(BIN)/python -m tests.fuzz

BENCH ?= --svg benchmarks/throughput.svg

bench: $(VENV)/bench  ## what a request costs, by client (15 minutes; with BENCH=--quick three)
	$(BIN)/python -m benchmarks $(BENCH)

lint: $(VENV)/dev  ## check the style
	$(BIN)/python -m ruff check .

typecheck: $(VENV)/dev  ## check the types
	$(BIN)/python -m mypy

check: lint typecheck test  ## all checks

clean:  ## remove what make and the tests made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/dev: $(VENV)/made requirements.txt requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $(VENV)/live $@

$(VENV)/bench: $(VENV)/made requirements.txt requirements-bench.txt
	@$(PIP) -r requirements-bench.txt && touch $(VENV)/live $@ || echo "Measured is what is installed already."

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "No virtual environment can be made. Debian, Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@
