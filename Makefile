# `make bench` and `make test` each set up everything on a fresh machine. PYTHON=/path/to/python uses an environment that exists.
VENV := .venv
ifdef PYTHON
  RUN := $(PYTHON)
else
  RUN := $(VENV)/bin/python
endif
OUT ?= out
CSRC := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
BUILD := pyproject.toml setup.py constraints.txt csrc/build.py $(CSRC)

.PHONY: bench test lint gpu gates oldest readme

bench: ready-bench
	$(RUN) -m benchmarks.models

# A worker for each core, where pytest-xdist is installed, and one thread for each: tests are many and small.
test: ready-test
	if $(RUN) -c "import xdist" 2> /dev/null; \
	then OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n logical --dist loadgroup; \
	else $(RUN) -m pytest tests; fi

lint: ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "import clang_format as tool; tool.clang_format()" --dry-run --Werror $(CSRC) $(wildcard tests/emulator/*.cu*)
	$(RUN) -m benchmarks.report --check

readme: ready-bench
	$(RUN) -m benchmarks.report

# What the compiled kernels hold, seen without a GPU: the table that the tests hold the kernels to.
gates: ready-test
	$(RUN) tests/gates.py

# The oldest Triton that is supported compiles a sample of the kernels and is launched as it should be; beside the environment's
# own, which stays as it is.
oldest: ready-test
	$(RUN) -m pip install --quiet --no-deps --upgrade --target build/oldest triton==3.6.0
	PYTHONPATH=build/oldest $(RUN) tests/gates.py sample > build/oldest/rows.json
	grep -q '"triton": "3.6.0"' build/oldest/rows.json
	PYTHONPATH=build/oldest $(RUN) -m pytest tests/test_launch.py

# Everything that needs a GPU, in under nine minutes: see benchmarks/gpu.py. Uses the environment as it is, installs and downloads
# nothing. STEPS=tests,verify runs these alone, BUDGET=120 ends after so many seconds.
gpu:
	$(or $(PYTHON),python3) benchmarks/gpu.py --out $(OUT) $(if $(STEPS),--steps $(STEPS)) $(if $(BUDGET),--budget $(BUDGET))

ifdef PYTHON
ready-%: ;
else
# One environment for all targets; a target adds its extra once, and again when the pins, the package or its kernels change.
# timm and open_clip come without torchvision, which binds PyTorch's version: tests/stubbed_torchvision.py stands for it.
ready-%: $(VENV)/.ready-% ;
$(VENV)/.ready-%: $(BUILD)
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	$(if $(filter dev test,$*),$(VENV)/bin/python -m pip install --quiet --no-deps -c constraints.txt timm open_clip_torch ftfy wcwidth)
	touch $@ $(if $(filter dev,$*),$(VENV)/.ready-test $(VENV)/.ready-bench)  # which are parts of it
.PRECIOUS: $(VENV)/.ready-%
endif
