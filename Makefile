# Every target sets up what it needs in .venv, once.
#   make demo   train LeNet-5 on real digits, show the accuracy, write the pictures
#   make test   run the tests (make test-slow: the long ones)
#   make lint   ruff and mypy          make bench   figures, next to the peers installed
#   make clean  remove .venv and all that was generated

PYTHON  ?= python3
WORKERS ?= auto
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
# A file's tests stay in one process: they share what they compile.
PYTEST  := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 4 --dist loadfile

.PHONY: demo test test-slow lint format bench pictures clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	$(BIN)/graphc train lenet --out out/demo
	$(BIN)/graphc predict out/demo/lenet.safetensors --digits 8

test: $(VENV)/.test
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# pytest's exit status 5 says that no test is marked slow.
test-slow: $(VENV)/.test
	$(PYTEST) -m slow $(PYTEST_ARGS) || [ $$? -eq 5 ]

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test
	$(BIN)/python examples/benchmark.py

pictures: $(VENV)/.demo
	$(BIN)/graphc draw lenet --stage inference --out docs/images/lenet.svg
	$(BIN)/graphc draw lenet --stage training --out docs/images/lenet-training.svg

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: graphc needs Python 3.10 or newer: make PYTHON=/path/to/python3.x $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: '$(PYTHON) -m venv' failed: install Python's venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing graphc and what the demo needs into $(VENV) ..."
	$(PIP) install -q -e '.[data,plot]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing graphc and what the tests need into $(VENV) ..."
	$(PIP) install -q -e '.[data,plot,cuda,test]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
