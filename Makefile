# make demo    render a clip dense and accelerated, with the built-in model, into out/
# make test    lint, types and tests
# make mutants do the tests notice small wrong edits? MINUTES=10 SEED=1, goes on where it stopped
# make fuzz    random grids, methods, sweeps, settings and weights, for MINUTES=10
# make drift   the family matrix with the oldest supported diffusers, and with the newest
# Set-up happens by itself, in .venv, and again only when pyproject.toml changes.

PYTHON ?= python3
# Without a GPU the release that this project is tested with. Where pip finds no build of it for the
# CPU by itself, name PyTorch's own index in PIP_EXTRA_INDEX_URL and save gigabytes.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch,torch==2.13.0)
MODEL ?= demo-long
METHOD ?= radial
OPTIONS ?= --dense-steps 2 --dense-layers 0
PROMPT ?= a large red circle moves left over a black background

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: demo test mutants fuzz drift drift-oldest drift-newest lint format clean

demo: $(VENV)/.ready-demo
	@$(BIN)/diffpatch render --model $(MODEL) --prompt "$(PROMPT)" \
		--method $(METHOD) $(OPTIONS) --compare dense -o out/ --overwrite

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

MINUTES ?= 10
SEED ?= 1

mutants: $(VENV)/.ready-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation --minutes $(MINUTES) --seed $(SEED)

fuzz: $(VENV)/.ready-test
	@$(BIN)/python -m tests.proof --minutes $(MINUTES)

# Only the parts that lean on diffusers: what is said of its insides, and every family's tiny model.
DRIFT := tests/patching/swap/test_internals.py tests/pipelines/test_families.py tests/pipelines/test_family_limits.py
OLDEST := $(shell sed -n 's/^ *"diffusers>=\(.*\)",$$/\1/p' pyproject.toml)

drift: drift-oldest drift-newest

drift-oldest: SPEC := diffusers==$(OLDEST)
drift-newest: SPEC := diffusers
drift-newest: DRIFT += tests/pipelines/test_family_coverage.py
drift-oldest drift-newest: drift-%:
	@$(PYTHON) -m venv build/$@
	@build/$@/bin/python -m pip install -qq --disable-pip-version-check "$(TORCH)"
	@build/$@/bin/python -m pip install -qq --disable-pip-version-check --upgrade \
		"$(SPEC)" -e . pytest pytest-timeout hypothesis
	@build/$@/bin/python -c "import diffusers; print('diffusers', diffusers.__version__)"
	@OMP_NUM_THREADS=1 build/$@/bin/python -m pytest $(DRIFT)

lint: $(VENV)/.ready-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.ready-test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

# torch goes first, so that the build chosen above stays.
$(VENV)/.ready-demo: pyproject.toml | $(BIN)/python
	@echo "setting up $(VENV) (once; a few minutes)"
	@$(PIP) "$(TORCH)"
	@$(PIP) -e ".[video]"
	@touch $@

$(VENV)/.ready-test: pyproject.toml $(VENV)/.ready-demo
	@$(PIP) -e ".[dev,video,eval]"
	@touch $@
