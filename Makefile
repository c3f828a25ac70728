# Each target makes its own virtual environment, builds what changed, and runs. Needs Python 3.10 or later, pip,
# a C++ compiler and make, and nvcc for the CUDA kernels; PYTHON=... chooses the Python and CXX=... the compiler.

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
EXTENSION := sassha_fused/_C.abi3.so
CXX_SOURCES := $(shell find csrc tests/support/cuda_emulation -name '*.cpp' -o -name '*.cu' -o -name '*.h')
PYTHONS := python3.11 python3 python3.12 python3.13 python3.10
# Of the tests: each has one thread, for more only get in each other's way. WORKERS=8 make test has more of them.
WORKERS := 2
# Hundreds of processes import the tests: what Python compiles of them is kept.
TESTS := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n $(WORKERS) --dist=worksteal --costs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# No recipe calls make, and ninja trips over the job server of a make -j that it cannot reach.
unexport MAKEFLAGS
.PHONY: help demo demo-language check test test-long bench sass ptx lint format build wheel clean compiler

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: compiler $(EXTENSION) $(VENV)/.demo ## train a small ResNet on MNIST digits, fused against the plain loop, AdamW and SGD
	$(VENV)/bin/python -m examples.mnist

demo-language: compiler $(EXTENSION) $(VENV)/.demo ## train a character GPT with AdamW and with members of the family
	$(VENV)/bin/python -m examples.chargpt

check: compiler $(EXTENSION) ## run the quick tests, in two to three minutes: backends cpu and eager, nothing marked slow
	$(TESTS) -m "not slow and not long and not gpu"

test: compiler $(EXTENSION) ## run all tests but the long ones, and measure the coverage of those that run Python
	$(TESTS) -m "not untraced and not long" --cov --cov-report=term-missing
	$(TESTS) -m "untraced and not long"

test-long: compiler $(EXTENSION) ## run the long tests: PTX, planted faults, sanitizers, Triton for all targets, thousands of steps
	$(TESTS) -m long

bench: compiler $(EXTENSION) ## time the optimizer step; the JSON goes to .benchmarks
	$(VENV)/bin/python -m pytest bench

sass: compiler $(EXTENSION) ## print what the CUDA kernels are made of: registers, spills, widths of accesses
	$(VENV)/bin/python -m bench.sass

ptx: $(VENV)/.dev ## print the same of the Triton kernels, compiled for NVIDIA and AMD
	$(VENV)/bin/python -m bench.ptx

lint: $(VENV)/.dev ## check style, spelling and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy

format: $(VENV)/.dev ## rewrite the sources in the project's style
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

build: compiler $(EXTENSION) ## build the C++ and CUDA extensions in place

wheel: compiler $(EXTENSION) ## build a wheel into dist/
	rm -rf build/lib* build/bdist*
	$(PIP) wheel . --verbose --no-build-isolation --no-deps --wheel-dir dist

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info sassha_fused/*.so .benchmarks .coverage* .hypothesis examples/*/results
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '.*_cache' \) -prune -exec rm -rf {} +

# csrc and its folders stand here too, so that a deleted file is noticed; within, ninja rebuilds what changed.
$(EXTENSION): $(shell find csrc) setup.py $(VENV)/.dev
	$(VENV)/bin/python setup.py build_ext --inplace

$(VENV)/.dev: requirements-dev.txt $(VENV)/.made
	$(PIP) install -r $<
	@touch $@

$(VENV)/.demo: requirements-demo.txt $(VENV)/.dev
	$(PIP) install --no-deps -r $<
	@touch $@

# Where venv cannot install pip by itself (Debian without python3-venv), the pip of that Python does.
$(VENV)/.made:
	@for python in $(or $(PYTHON),$(PYTHONS)); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue; \
	  echo "$$python -m venv $(VENV)"; \
	  $$python -m venv $(VENV) || { \
	    $$python -m venv --without-pip $(VENV) && $$python -m pip --python $(VENV) install pip; \
	  } && touch $@ && exit 0; \
	  exit 1; \
	done; \
	echo "Python 3.10 or later was not found (tried: $(or $(PYTHON),$(PYTHONS))); name one with PYTHON=..." >&2; exit 1

compiler:
	@for compiler in $${CXX%% *} c++ g++ clang++; do command -v "$$compiler" >/dev/null && exit 0; done; \
	echo "No C++ compiler was found (c++, g++, clang++): install one, such as g++, or name one with CXX=..." >&2; exit 1
