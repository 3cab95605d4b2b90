# `make demo` and `make test` need Python 3.11 or newer and nothing else; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test test-portable test-fuzz test-oldest lint format notebooks clean

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

# One thread and one process per core; what takes long comes last.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n auto --dist loadfile

# The fast suite as other CPUs would run it: other vector instructions, other threads, another order of tests.
# `make test` itself runs it with all instructions and one thread. A test that fails here hangs on rounding, an order or a time.
test-portable: install
	MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --dist loadfile
	ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=2 $(BIN)/pytest -m "not slow" -n auto --dist loadfile --random-order

# Thousands of damaged and hostile inputs for every loader; on demand, `make test` tries a few dozen.
test-fuzz: install
	XBT_FUZZ_EXAMPLES=2000 OMP_NUM_THREADS=1 $(BIN)/pytest tests -k fuzz -n auto --dist load --timeout 7200

# The fast suite with the oldest versions that pyproject.toml admits; on demand, no part of `make test`.
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -m "not slow" -n auto --dist loadfile

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
		--editable '.[dev]'
	touch $@

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: install
	cd notebooks && for source in *.py; do \
		../$(BIN)/jupytext --to ipynb "$$source" && ../$(BIN)/jupyter-execute --inplace "$${source%.py}.ipynb" || exit 1; \
	done

clean:
	rm -rf .venv .venv-oldest runs
