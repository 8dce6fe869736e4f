# make quickstart, make test: each sets up .venv by itself, from python3, pip and make alone.
#
#   PYTHON       the Python to build .venv with, 3.11 to 3.13
#   TORCH        what to install as torch; by exact version, so that it is the build that was asked for
#   TORCH_INDEX  one more package index for torch alone: another CUDA, or CPU-only wheels
#   PIP_FLAGS    flags for every pip install

PYTHON      ?= python3
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
PIP_FLAGS   ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
DONE := $(VENV)/installed
KERNELS := $(VENV)/kernels
FUZZER  := $(VENV)/fuzzer
# A process a core, each with one thread: more threads than cores wait for each other.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: quickstart test check ray fuzz format clean
.DELETE_ON_ERROR:

quickstart: $(DONE)
	$(BIN)/potstill run quickstart

test: $(DONE)
	$(TEST)

check: $(DONE) $(KERNELS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(TEST) tests/architecture
	$(MAKE) --no-print-directory test

# Ray is 70 MB and no part of `make check`, which leaves out its tests where it is not there.
ray: $(DONE)
	$(PIP) --no-deps --requirement requirements/ray.txt

# Longer than the suite does, led by coverage: make fuzz SECONDS=600
SECONDS ?= 120
fuzz: $(DONE) $(FUZZER)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

format: $(DONE)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, because the packages that depend on it would otherwise choose a build of their own. Everything else
# is pinned and installed without its dependencies: runtime.txt says why.
$(DONE): requirements/runtime.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	sys.exit(0 if (3, 11) <= v <= (3, 13) else "potstill needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % v)'
	@echo "Setting up $(VENV): some minutes the first time (torch is large)."
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint requirements/runtime.txt "$(TORCH)" setuptools
	$(PIP) --no-deps --no-build-isolation --requirement requirements/runtime.txt --requirement requirements/dev.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(FUZZER): $(DONE) requirements/fuzz.txt
	$(PIP) --no-deps --requirement requirements/fuzz.txt
	@touch $@

# triton runs the GPU kernel without a GPU, in its interpreter. It is as large as torch, whose builds for GPUs bring it,
# so that only `make check` has it; without it the tests of the kernel are left out.
$(KERNELS): $(DONE) requirements/kernels.txt
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps --requirement requirements/kernels.txt
	@touch $@
