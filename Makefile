# `make demo` and `make test` need Python 3.11 or newer and nothing else; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test lint format notebooks clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) recipes/quickstart.py --config recipes/configs/quickstart.yaml

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict xbt

# One thread and one process per core; what takes long comes last and alone, where it does not disturb.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --dist loadfile
	$(BIN)/pytest -m slow

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: install
	cd notebooks && for source in *.py; do \
		../$(BIN)/jupytext --to ipynb "$$source" && ../$(BIN)/jupyter-execute --inplace "$${source%.py}.ipynb" || exit 1; \
	done

clean:
	rm -rf .venv runs
