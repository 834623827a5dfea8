# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test check bench chaos clean

setup: $(READY)

# torch first and alone: a later package must not pull in another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: setup
	$(BIN)/asymlift demo

# Two at once, of one thread each; what belongs together shares its fixtures.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Long measurements; each writes its numbers to benchmarks/results/.
bench: setup
	$(BIN)/python benchmarks/fit_basis.py
	$(BIN)/python benchmarks/convert_memory.py
	$(BIN)/python benchmarks/data_pipeline.py
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.plan_memory
	$(BIN)/python -m benchmarks.training_comparison

# Long figures of reliability.
chaos: setup
	$(BIN)/pytest -m slow
	$(BIN)/python -m benchmarks.reliability.kill_convert
	$(BIN)/python -m benchmarks.reliability.kill_finetune
	$(BIN)/python -m benchmarks.reliability.kill_saves
	$(BIN)/python -m benchmarks.reliability.stop_finetune
	$(BIN)/python -m benchmarks.reliability.resume_finetune
	$(BIN)/python -m benchmarks.reliability.poison
	$(BIN)/python -m benchmarks.reliability.attacks
	$(BIN)/python -m benchmarks.reliability.canaries
	$(BIN)/python -m benchmarks.reliability.flip_bits

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
