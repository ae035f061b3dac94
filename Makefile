# make demo    render a clip dense and accelerated, with the built-in model, into out/; and the
#              README's picture from it, with the figures of the README's table, if it has to change
# make test    lint, types and tests; at the end the slowest twenty
# make mutants do the tests notice small wrong edits? MINUTES=10 SEED=1, goes on where it stopped
# make fuzz    random grids, methods, sweeps, settings and weights, for MINUTES=10
# make docs    README, map, gallery and an API reference, into build/docs/
# make engines the adapters against the wheels of vLLM-Omni, SGLang and xDiT, without what these run on
# make drift   the family matrix with the oldest supported diffusers, and with the newest
# Set-up happens by itself, in .venv, and again only when pyproject.toml changes.

PYTHON ?= python3
# Without a GPU the release that this project is tested with, from PyTorch's own index of builds for
# CPUs (200 MB instead of 2 GB); where that does not answer within seconds, whatever pip finds.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH ?= $(if $(GPU),torch,torch==2.13.0)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
REACHED = $(BIN)/python -c "import signal, urllib.request as u; signal.alarm(6); u.urlopen('$(CPU_INDEX)/torch/', timeout=5)" >/dev/null 2>&1
MODEL ?= demo-long
METHOD ?= radial
OPTIONS ?= --set decay=0.5 --dense-steps 2 --dense-layers 0
PROMPT ?= a large red circle moves left over a black background

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: demo test mutants fuzz docs engines drift drift-oldest drift-newest lint format clean

demo: $(VENV)/.ready-demo
	@$(BIN)/diffpatch render --model $(MODEL) --prompt "$(PROMPT)" \
		--method $(METHOD) $(OPTIONS) --compare dense -o out/ --overwrite
	@$(BIN)/python examples/readme_card.py out/
	@printf '\n%s\n' "next: open out/index.html, and see which method suits your own prompt:"
	@printf '  %s\n' "source $(BIN)/activate" \
		'diffpatch sweep --model demo --prompt "a small blue ring grows over a gray background" -o runs/ring'

docs: $(VENV)/.ready-test
	@$(BIN)/python examples/docs/build.py build/docs
	@echo "open build/docs/index.html"

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 20

MINUTES ?= 10
SEED ?= 1

mutants: $(VENV)/.ready-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation --minutes $(MINUTES) --seed $(SEED)

fuzz: $(VENV)/.ready-test
	@$(BIN)/python -m tests.proof --minutes $(MINUTES)

# Pure Python, and pinned: their dependencies want a GPU's stack, so that no extra installs them.
engines: $(VENV)/.ready-test
	@$(PIP) -q --upgrade --no-deps --target build/engines \
		vllm-omni==0.30.0 sglang==0.5.23 xfuser==0.7.0 einops
	@OMP_NUM_THREADS=1 PYTHONPATH=build/engines $(BIN)/python -m pytest tests/adapters

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
	@echo "setting up $(VENV), once: torch ($(if $(GPU),some 3 GB,200 MB to download where the index of CPU builds is reached)),"
	@echo "then diffusers, transformers and ffmpeg (200 MB)"
	@if [ -z "$(GPU)" ] && $(REACHED); then \
		$(PIP) --extra-index-url $(CPU_INDEX) "$(TORCH)"; else $(PIP) "$(TORCH)"; fi
	@$(PIP) -q -e ".[video]"
	@touch $@

$(VENV)/.ready-test: pyproject.toml $(VENV)/.ready-demo
	@$(PIP) -q -e ".[dev,video,eval]"
	@touch $@
