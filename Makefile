# make demo    render a clip dense and accelerated, with the built-in model, into out/
# make test    lint, types and tests
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

.PHONY: demo test lint format clean

demo: $(VENV)/.ready-demo
	@$(BIN)/diffpatch render --model $(MODEL) --prompt "$(PROMPT)" \
		--method $(METHOD) $(OPTIONS) --compare dense -o out/ --overwrite

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

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
