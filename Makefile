# Each target does all its own set-up from a bare clone. VENV=folder puts the environment elsewhere.

PYTHON ?= python3
VENV ?= .venv
CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
REPOSITORY := https://github.com/trl-fdfo/trl_fdfo

.PHONY: quickstart vote test benchmark drift lint docs wheel clean

quickstart: $(VENV)/installed  ## repair the packaged tiny pipeline with FDFO, a few minutes on two cores
	OMP_NUM_THREADS=$(CORES) $(VENV)/bin/trl-fdfo demo

vote: $(VENV)/installed  ## train the packaged tiny pipeline by clicking on a page
	OMP_NUM_THREADS=$(CORES) $(VENV)/bin/trl-fdfo train --config shapes_vote

test: $(VENV)/installed  ## the whole test suite
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder tests

benchmark: $(VENV)/installed  ## the figures of README and docs
	OMP_NUM_THREADS=$(CORES) $(VENV)/bin/python benchmarks/overhead.py
	$(VENV)/bin/python benchmarks/replay.py
	$(VENV)/bin/python benchmarks/branch_distance.py
	$(VENV)/bin/python benchmarks/mixed_rewards.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/remote_reward.py
	$(VENV)/bin/python benchmarks/memory.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/recipe_plans.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/scale.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/precision.py
	$(VENV)/bin/python benchmarks/full_size.py
	$(VENV)/bin/python benchmarks/gpu_sd35.py
	$(VENV)/bin/python benchmarks/gpu_shapes.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/convergence.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/counts/comparison.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/alarms.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/sparse_rewards.py

drift: $(VENV)/installed  ## whether small runs end in the bits that revision REV ends in
	$(VENV)/bin/python benchmarks/drift.py --against $(or $(REV),HEAD)

lint: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Links to files outside of docs/ lead to the repository.
docs: $(VENV)/installed  ## the documentation as a site, in build/site
	rm -rf build && mkdir -p build/docs/api
	cp docs/*.png build/docs && cp docs/api/*.md build/docs/api
	for page in docs/*.md; do sed 's|](\.\./|]($(REPOSITORY)/blob/main/|g' $$page > build/docs/$${page#docs/}; done
	$(VENV)/bin/zensical build --clean --strict

wheel: $(VENV)/installed  ## the wheel in dist/, tried in an environment of its own, outside of the clone
	rm -rf dist
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) tests/helpers/try_wheel.py dist/*.whl

clean:
	rm -rf .venv build dist outputs

# torch first, at the version of the constraints: so nothing that follows can ask for another.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@
