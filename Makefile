# make demo    few-shot distillation on the embedded data set, from nothing to a table
# make test    the tests that a contributor runs, some minutes
# make check   everything else that continuous integration runs
# make docs    the documentation as a site, in build/docs
# make wheel   dist/fastjac-*.whl: no PyTorch inside, for every later PyTorch and Python
# make lint    ruff, mypy, and clang-format for C++ and CUDA
# make format  what `make lint` would change
# make bench   the benchmarks of the operators, some minutes
# make bench-full   every benchmark: operators, steps, penalties, the trainer; hours
#
# Each sets up what it needs in VENV, once. PYTHON makes the virtual environment. `demo` and `test`
# compile for this machine alone, unless a wheel in dist/ fits; scripts/set_up.py says what else there is.

PYTHON ?= python3
VENV ?= .venv

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
CSRC := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
PACKAGE := $(shell find fastjac -name '*.py' -o -name '*.yaml')
FORMATTED := $(CSRC) $(shell find tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp')
# The pinned versions of the `dev` extra.
LINTERS := $(shell grep -oE '(ruff|clang-format|mypy)==[0-9.]+' pyproject.toml)

# A process for each core, each with one thread. One that crashes ends the run: replaced, it may hang.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadgroup --max-worker-restart 0
BENCH_OPTIONS := --benchmark-enable --benchmark-only --benchmark-quiet
# An allocator that keeps its pages: else a CPU's page faults are timed, not its arithmetic.
KEEP_PAGES := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

.PHONY: demo test check docs wheel lint format bench bench-full clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@echo "fastjac: training a teacher and 100 students, about 3 minutes on two cores"
	$(PY) -m fastjac.train

test: $(VENV)/.installed
	$(PYTEST) -m 'not check'

check: wheel docs $(VENV)/.installed
	$(PYTEST) -m 'check and not serial'
	$(PY) -m pytest -m serial

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "fastjac: build/docs/index.html"

wheel: dist/.built

bench: $(VENV)/.installed
	$(KEEP_PAGES) $(PY) -m pytest benchmarks $(BENCH_OPTIONS)

bench-full: bench
	$(PY) -m pytest benchmarks $(BENCH_OPTIONS)
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.penalty --compiled
	$(PY) -m benchmarks.penalty --compiled --penalty wgan-gp
	$(PY) -m benchmarks.trainer
	$(PY) -m benchmarks.teacher_cache

lint: $(VENV)/.linters $(VENV)/.torch
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.linters
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(FORMATTED)

clean:
	rm -rf build dist *.egg-info fastjac/_build.json fastjac/*.so

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.linters: pyproject.toml | $(PY)
	$(PIP) install $(LINTERS)
	@touch $@

# What the extension is built with.
$(VENV)/.torch: | $(PY)
	@echo "fastjac: installing PyTorch into $(VENV); the download is the longest part"
	$(PIP) install torch torchvision 'setuptools>=77' ninja
	@touch $@

# The log says what each kernel takes of each device, for the tests. It is kept: a later build
# compiles only what has changed.
dist/.built: $(VENV)/.torch pyproject.toml setup.py $(CSRC) $(PACKAGE)
	rm -rf dist build/lib* && mkdir -p build
	@echo "fastjac: compiling for every processor and GPU, about 8 minutes on two cores"
	FASTJAC_BUILD_FOR=everywhere NVCC_APPEND_FLAGS=-Xptxas=-v \
		$(PIP) wheel -vv --no-build-isolation --no-deps -w dist . \
		>> build/wheel.log 2>&1 || { tail -n 50 build/wheel.log; exit 1; }
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	$(PY) scripts/set_up.py train
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	$(PY) scripts/set_up.py train test
	$(PY) -m fastjac.info
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.installed pyproject.toml
	FASTJAC_NATIVE=keep $(PIP) install --no-build-isolation -e ".[docs]"
	@touch $@
