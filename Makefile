# make demo        train a tiny model on this machine's CPU and show that it learned to see (3 to 8 minutes)
# make demo-seeds  the same for seeds 0, 1 and 2
# make test        the tests; make test-all adds the slow ones; make test-unit, test-model, test-system: those of one folder
# make chaos       kill and stop processes of a run at random moments, 200 with simulated engines and 20 with vLLM
# make lint        style, format and types
# Each of them first creates .venv and installs the pinned versions, if that has not been done (see deploy/venv.sh).

VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest
ARGS :=

# Nothing is downloaded and nothing is reported to anyone.
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1

.PHONY: chaos demo demo-seeds test test-all test-unit test-model test-system lint venv
.DELETE_ON_ERROR:

demo: venv
	$(VENV)/bin/saccade demo $(ARGS)

demo-seeds: venv
	for seed in 0 1 2; do $(VENV)/bin/saccade demo --seed $$seed --output-dir runs/demo-seed-$$seed $(ARGS) || exit 1; done

# Two passes: the tests of one process in as many processes as there are cores, then those of whole systems, two at a
# time, since each starts several processes. A slip shows within minutes. One thread per process.
test test-all test-unit test-model test-system: export OMP_NUM_THREADS := 1
SELECT := -m "not slow"
QUICK = $(PYTEST) -q $(SELECT) -n auto --maxprocesses 8 $(ARGS)
SYSTEM = $(PYTEST) -q $(SELECT) -n 2 --dist loadfile --no-loadscope-reorder --durations=10 $(ARGS)

test-all: SELECT :=
test test-all: venv
	$(QUICK) tests/unit tests/model
	$(SYSTEM) tests/system

test-unit test-model: test-%: venv
	$(QUICK) tests/$*

test-system: venv
	$(SYSTEM) tests/system

chaos: export OMP_NUM_THREADS := 1
chaos: venv
	$(VENV)/bin/python -m tests.chaos --kills 200 $(ARGS)
	$(VENV)/bin/python -m tests.chaos --kills 20 --engine vllm $(ARGS)

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml deploy/constraints-cpu.txt deploy/torchvision_cpu.py deploy/venv.sh
	deploy/venv.sh $(VENV)
	touch $@
