# All targets use .venv, which is created if it is missing. To use another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
RUN_DIR ?= runs/demo

.PHONY: demo demo-paper test test-without-ray test-with-ray test-long families gpu lint clean

demo: .venv/installed  ## online fine-tuning of the embedded model, from prompts to a report, on two CPU cores
	$(BIN)/python jobs/pipeline.py --config jobs/configs/shapes.yaml --run-dir $(RUN_DIR)

demo-paper: .venv/installed  ## the same with the paper's procedure: keep the best candidates, supervised fine-tuning
	$(BIN)/python jobs/pipeline.py --config jobs/configs/shapes-paper.yaml --run-dir $(RUN_DIR)-paper

# Tests with Ray often wait. So the tests without it run beside them, at low priority: two at a time with one thread each.
test: .venv/installed-test  ## all tests but the longest
	$(MAKE) --no-print-directory -j 2 test-without-ray test-with-ray

test-without-ray: .venv/installed-test
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m pytest -q -m "not ray" -n 2 --dist worksteal

test-with-ray: .venv/installed-test
	RAY_worker_niceness=0 $(BIN)/python -m pytest -q -m ray

test-long: .venv/installed-test  ## the tests that make test leaves out: more stores, faults and model families
	$(BIN)/python -m pytest -q -m long --long

families: .venv/installed-test  ## a whole run with every model family
	$(BIN)/python -m pytest -q tests/stages/test_model_families.py --long

gpu: .venv/installed-test  ## on a machine with a GPU: tests, benchmarks and a run that need one; ten minutes a part at most; writes gpu.json
	$(BIN)/python benchmarks/gpu.py --out gpu.json

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

clean:  ## removes the environment, but no runs
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

# One stamp file per set of extras, so that pip runs only once.
.venv/installed: EXTRAS :=
.venv/installed-test: EXTRAS := [test]
.venv/installed-dev: EXTRAS := [dev]
.venv/installed .venv/installed-test .venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -e ".$(EXTRAS)" -c constraints.txt
	touch $@
