# `make bench` and `make test` each set up everything on a fresh machine. PYTHON=/path/to/python uses an environment that exists.
VENV := .venv
ifdef PYTHON
  RUN := $(PYTHON)
else
  RUN := $(VENV)/bin/python
endif
OUT ?= out

.PHONY: bench test lint gpu readme

bench: ready-bench
	$(RUN) -m benchmarks.models

test: ready-test
	$(RUN) -m pytest tests

lint: ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m benchmarks.report --check

readme: ready-bench
	$(RUN) -m benchmarks.report

# Everything that needs a GPU: its tests, then both benchmarks. Uses the environment as it is, installs and downloads nothing.
gpu:
	$(or $(PYTHON),python3) benchmarks/gpu.py --out $(OUT)

ifdef PYTHON
ready-%: ;
else
# One environment for all targets; a target adds its extra once, and again when the pins or the package change.
ready-%: $(VENV)/.ready-% ;
$(VENV)/.ready-%: pyproject.toml setup.py constraints.txt
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@
.PRECIOUS: $(VENV)/.ready-%
endif
