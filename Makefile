# One virtual environment for everything; PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/quickstart
MODEL := models/SmolLM2-135M-Instruct
DATA := runs/quickstart/data
AGENT := examples/agent_trajectories
# What `make coverage` runs, all by default; how tests share the cores; options of .ci/matrix.py
# and of benchmarks/against_trl.
TESTS ?=
PARALLEL := -n $(shell echo $$(($$(nproc) * 3 / 2))) --dist loadfile --no-loadscope-reorder
MATRIX ?=
BENCH ?=
# Of each test that `make fuzz` runs, and where its random inputs begin.
EXAMPLES ?= 300
FAULTS ?= 200
SEED ?= $(shell date +%s)
WITH_TOOLS := PATH="$(abspath $(BIN)):$$PATH"
export TOKENIZERS_PARALLELISM := false
# Set in many containers; then every process compiles anew what it imports, 14 s of CPU each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart agent test test-slow faults fuzz soak gpu bench test-matrix coverage docs check format hooks clean

install: $(STAMP)

# Python compiles what is imported; pip would compile all 25,000 files, which takes two minutes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: install
	$(BIN)/python examples/quickstart/fetch_model.py --out $(MODEL)
	$(BIN)/python examples/quickstart/make_preferences.py --out $(DATA)
	$(BIN)/dpo-dist run examples/quickstart.yaml run.dir=$(RUN)
	$(BIN)/dpo-dist evaluate examples/quickstart.yaml run.dir=$(RUN)
	$(BIN)/dpo-dist generate examples/quickstart.yaml run.dir=$(RUN)
	$(BIN)/python examples/quickstart/summary.py $(RUN)

# Preferences between an agent's trajectories: the tool's words are read, the agent's are scored.
agent: install
	$(BIN)/python examples/quickstart/fetch_model.py --out $(MODEL)
	$(BIN)/python $(AGENT)/make_rows.py --out runs/agent/data
	$(BIN)/dpo-dist prepare $(AGENT).yaml --preview 1
	$(BIN)/dpo-dist run $(AGENT).yaml
	$(BIN)/dpo-dist evaluate $(AGENT).yaml

# Three files of tests for two cores, since ranks wait for each other; then the clusters.
test: install
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not cluster'
	$(BIN)/python -m pytest -m 'cluster and not slow'

# All that is slow but the soak, which has a target of its own.
test-slow: install
	$(BIN)/python -m pytest $(PARALLEL) -m 'slow and not cluster' --ignore=tests/soak
	$(BIN)/python -m pytest -m 'slow and cluster'

# A training under hundreds of faults: make soak FAULTS=200 SEED=...
soak: install
	DPO_DIST_SOAK_FAULTS=$(FAULTS) DPO_DIST_SOAK_SEED=$(SEED) $(BIN)/python -m pytest -s -m slow tests/soak

# Damaged and made-up inputs, others every time: make fuzz SEED=... tries the same again.
fuzz: install
	DPO_DIST_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/fuzz --hypothesis-seed=$(SEED)

# Every case of docs/reliability.md; how it ended goes into the table there. Hours on two cores.
faults: install
	UPDATE_DOCS=1 $(BIN)/python -m pytest -m fault

# Acceptance on a machine with GPUs: build/gpu/RESULTS.md; fails where there is none.
gpu: install
	DPO_DIST_GPU_RESULTS=build/gpu/RESULTS.md $(BIN)/python -m pytest tests/gpu

# Against TRL, on CPUs: benchmarks/RESULTS.md, with DPO_DIST_REAL_MODEL and DPO_DIST_REAL_DATA, in
# about 20 minutes on two cores. BENCH=quick tries all of it on a tiny model in two minutes;
# BENCH=page writes the page again from what was measured.
bench: install
	$(BIN)/python -m benchmarks.against_trl $(BENCH:%=--%)

# Refreshes the output blocks and the tables of keys in docs/; read the diff before you commit it.
docs: install
	UPDATE_DOCS=1 $(BIN)/python -m pytest -m slow tests/test_docs_outputs.py
	UPDATE_DOCS=1 $(BIN)/python -m pytest tests/importing/test_tables.py

# Each Python with pinned and with lowest versions; slow, and gigabytes of downloads.
test-matrix: install
	$(BIN)/python .ci/matrix.py $(MATRIX)

# Forked ranks and commands in processes of their own are counted too; a failing test still fails.
coverage: install
	rm -rf build/coverage
	code=0; $(BIN)/coverage run -m pytest $(PARALLEL) -m 'not slow and not cluster' $(TESTS) || code=$$?; \
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report && exit $$code

check: install
	$(WITH_TOOLS) pre-commit run --all-files
	$(BIN)/pyright --pythonpath $(BIN)/python

# Every commit is checked by what `make check` runs, whether or not the environment is active.
hooks: install
	printf '#!/bin/sh\nPATH="%s:$$PATH" exec pre-commit run\n' '$(abspath $(BIN))' \
	    >"$$(git rev-parse --git-path hooks)/pre-commit"
	chmod +x "$$(git rev-parse --git-path hooks)/pre-commit"

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
