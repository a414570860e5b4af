# One virtual environment for everything; PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/quickstart
MODEL := models/SmolLM2-135M-Instruct
DATA := runs/quickstart/data
export TOKENIZERS_PARALLELISM := false

.PHONY: install quickstart test test-slow check format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: install
	$(BIN)/python examples/quickstart/fetch_model.py --out $(MODEL)
	$(BIN)/python examples/quickstart/make_preferences.py --out $(DATA)
	$(BIN)/dpo-dist run examples/quickstart.yaml run.dir=$(RUN)
	$(BIN)/dpo-dist evaluate examples/quickstart.yaml run.dir=$(RUN)
	$(BIN)/dpo-dist generate examples/quickstart.yaml run.dir=$(RUN)
	$(BIN)/python examples/quickstart/summary.py $(RUN)

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck -x .ci/run slurm/dpo.sh slurm/task.sh slurm/sweep_table.sh launch/ray_up.sh tests/clusters/slurm.sh

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
