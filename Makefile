# Everything a contributor can do: `make help`. Only Python >= 3.10 and make are needed beforehand.
PYTHON ?= python3
VENV ?= .venv

# The environment's tools are called by their paths, so that nothing has to be activated.
BIN = $(VENV)/bin
QUIETLY = --quiet --quiet --disable-pip-version-check --no-input
PIP = $(BIN)/python -m pip $(QUIETLY) install -c constraints.txt

# Two test workers on two cores: one thread each, or they fight over the cores.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# What `make test-oldest` and `make test-newest` run, in an environment of their own.
define fast_tests_and_fits
$(1)/bin/python -c "import sys, torch, pytorch_lightning as pl; print('Python %d.%d, torch %s, pytorch-lightning %s' % (*sys.version_info[:2], torch.__version__, pl.__version__))"; \
$(ONE_THREAD) $(1)/bin/python -m pytest -q -n 2 --dist worksteal -m "not (gpu or processes or compile or slow)" && \
$(ONE_THREAD) $(1)/bin/python -m pytest -q -n 2 --dist worksteal -m "slow and not (gpu or processes or compile)" tests/callbacks
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo demo-pretrained test test-fast test-gpu test-oldest test-newest coverage lint format docs bench bench-gpu clean distclean

help: ## list what can be done here
	@$(PYTHON) -c 'import re; [print("  make %-15s %s" % t) for t in re.findall(r"^([a-z-]+):.*?## (.+)$$", open("Makefile").read(), re.M)]'

demo: $(VENV)/.installed-examples ## run the main example on real data: three tables and a figure
	@$(BIN)/python examples/digits_multitask/run.py

demo-pretrained: $(VENV)/.installed-examples ## fine-tune a network with ImageNet weights: four tables and a figure
	@$(BIN)/python examples/pretrained_backbone/run.py

test: $(VENV)/.installed-test ## run all tests, doctests and the README's code
	@echo "Running the tests, two at a time"
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not gpu"

test-fast: $(VENV)/.installed-test ## run the tests that start no process and compile nothing: half a minute
	@echo "Running the fast tests, two at a time"
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not (gpu or processes or compile or slow)"

test-gpu: $(VENV)/.installed-test ## run the tests that need a CUDA device
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then echo "Running the tests that need a CUDA device"; $(BIN)/python -m pytest -q -m gpu; \
	else echo "No CUDA device here: NO test was run."; fi

test-oldest: .venv-oldest/.installed ## run the fast tests and the fits with the lowest versions that pyproject.toml states
	@$(call fast_tests_and_fits,.venv-oldest)

test-newest: .venv-newest/.installed ## run the fast tests and the fits with the newest versions there are
	@$(call fast_tests_and_fits,.venv-newest)

coverage: $(VENV)/.installed-test ## run all tests and see which lines and branches none of them reaches
	@echo "Running the tests and measuring what they reach"
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not gpu" --cov --cov-report=term-missing:skip-covered

lint: $(VENV)/.installed-lint ## check style, formatting, import rules (ruff) and types (mypy, --strict for the package)
	@echo "Checking with ruff and mypy"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted as ruff does it: run make format"; exit 1; }
	@$(BIN)/mypy --strict --no-error-summary lightning_bn tests

format: $(VENV)/.installed-lint ## rewrite the code as `make lint` wants it, where that is safe
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

docs: $(VENV)/.installed-docs ## build the documentation into site/, strictly
	@echo "Building the documentation into site/"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed-bench ## run every benchmark (prints ratios of paired runs)
	@found=; for f in benchmarks/[!_]*.py; do [ -e "$$f" ] || continue; found=1; \
	echo "== $$f"; $(BIN)/python "$$f" || exit 1; done; \
	[ -n "$$found" ] || echo "No benchmarks here yet."

bench-gpu: $(VENV)/.installed-bench ## run the benchmarks that know CUDA (says so where there is none)
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then for f in $$(grep -l asked_device benchmarks/[!_]*.py); do \
	echo "== $$f"; $(BIN)/python "$$f" --device cuda || exit 1; done; \
	else echo "No CUDA device here: NO benchmark was run."; fi

clean: ## remove what these commands wrote, except the environment
	@$(PYTHON) -c 'import glob, shutil; \
	names = ["build", "dist", "site", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "lightning_logs", "checkpoints", "benchmarks/output"]; \
	names += glob.glob("examples/*/output") + [p for d in ("lightning_bn", "tests", "examples", "benchmarks") for p in glob.glob(d + "/**/__pycache__", recursive=True)]; \
	[shutil.rmtree(n, ignore_errors=True) for n in names]'

distclean: clean ## remove the environments too
	@rm -rf "$(VENV)" .venv-oldest .venv-newest

$(VENV)/.created:
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else 'lightning-bn needs Python 3.10 or newer, but $(PYTHON) is %d.%d. Try: make $(MAKECMDGOALS) PYTHON=python3.11' % v[:2])"
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv "$(VENV)"
	@touch $@

# torch first and alone, so that what follows finds the pinned build in place.
$(VENV)/.installed-torch: $(VENV)/.created constraints.txt
	@echo "Installing torch into $(VENV) (once; it is large)"
	@$(PIP) torch
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml constraints.txt
	@echo "Installing what '$*' needs into $(VENV) (once)"
	@$(PIP) -e ".[$*]"
	@touch $@

# With the Python that PYTHON names: the lowest versions need one that they were built for, 3.10 for instance.
.venv-oldest/.installed: pyproject.toml tests/lowest.py
	@echo "Installing the lowest versions into .venv-oldest (once; several gigabytes)"
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python tests/lowest.py > .venv-oldest/constraints.txt
	@.venv-oldest/bin/python -m pip $(QUIETLY) install -c .venv-oldest/constraints.txt torch
	@.venv-oldest/bin/python -m pip $(QUIETLY) install -c .venv-oldest/constraints.txt -e ".[test]"
	@touch $@

.venv-newest/.installed: pyproject.toml
	@echo "Installing the newest versions into .venv-newest (once; several gigabytes)"
	@$(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip $(QUIETLY) install --upgrade torch
	@.venv-newest/bin/python -m pip $(QUIETLY) install --upgrade --upgrade-strategy eager -e ".[test]"
	@touch $@
