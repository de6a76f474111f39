# make quickstart: from nothing to an answer.  make test: everything that must hold.
# Both make .venv and install the locked dependencies; neither needs anything but Python 3.11+, make and a C library.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FT := $(BIN)/ft
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: quickstart test lint types unit test-faults audit docs lock clean

quickstart: $(VENV)/.ready
	$(FT) train configs/quickstart.yaml
	$(FT) eval runs/quickstart
	$(FT) export runs/quickstart --to gguf --quant q8_0
	$(FT) chat runs/quickstart --prompt "$$($(BIN)/python -c 'import json; print(json.loads(open("data/samples/contract-clauses-heldout.jsonl").readline())["messages"][-2]["content"])')"

test: $(VENV)/.ready-dev lint types unit

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.ready-dev
	$(BIN)/mypy

# Two processes with a thread each: threads that wait for one another would take longer than one alone.
unit: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

# Kills training, merging and exporting at every one of their writes: 20 minutes.
test-faults: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m every_event

# Known weaknesses of what is locked; needs the network.
audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip --disable-pip-version-check --quiet install pip-audit
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --require-hashes -r requirements/lock.txt -r requirements/lock-dev.txt
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps -r requirements/torch.txt

docs: $(VENV)/.ready-dev
	$(BIN)/python -c "from finetune.config.reference import reference_page; print(reference_page(), end='')" > docs/config.md
	$(FT) config schema > finetune/config/config.schema.json
	$(BIN)/python -m scripts.recipes
	$(BIN)/python -m benchmarks.performance
	$(BIN)/python -m pytest --collect-only -qq --reliability=docs/reliability.md > /dev/null

# torch comes first and by itself: the same version has CPU and CUDA builds, so the lock cannot hold its hash.
$(VENV)/.ready: requirements/torch.txt requirements/lock.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/torch.txt
	$(PIP) install --no-deps --require-hashes -r requirements/lock.txt
	$(PIP) install --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements/lock-dev.txt
	$(PIP) install --no-deps --require-hashes -r requirements/lock-dev.txt
	$(BIN)/python -m pip check
	touch $@

# Write the lock anew from pyproject.toml, with the versions that are installed now where they still fit.
lock:
	$(BIN)/python scripts/lock.py

clean:
	rm -rf $(VENV) runs
