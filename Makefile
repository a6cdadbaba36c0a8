# make demo   embed, train, evaluate and show a real model (about 7 minutes on two cores, set-up included)
# make test   every part, and one whole run under Ray in which everything dies (8 minutes at most)
# make test-all   that, and the long tests: chaos, elastic, sweeps, TPU slices, jobs, a real `ray up` (25 minutes at most;
#             the last one needs root, iproute2, openssh-server and rsync)
# make test-mutations   does a test notice each of some 400 small faults? (15 minutes at most)
# make check  format, lint, types, words
# make env    the environment .venv alone; the other targets call it
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo test test-parts test-run test-all test-mutations check format env clean

demo: $(STAMP)
	$(BIN)/python -m examples.emoji36 data/emoji36
	$(BIN)/sigray embed examples/emoji_siglit.yaml
	$(BIN)/sigray train examples/emoji_siglit.yaml run.name=demo --overwrite

# Two at once: the whole run, which is the longest chain of waits, and in the time that it leaves what needs no Ray, in
# two processes of one thread each.
test: $(STAMP)
	$(MAKE) --no-print-directory -j2 test-parts test-run

test-parts: $(STAMP)
	OMP_NUM_THREADS=1 nice $(BIN)/python -m pytest -m "not ray" -n 2 --dist loadfile --junitxml=$(VENV)/tests.xml

test-run: $(STAMP)
	$(BIN)/python -m pytest -m ray -v

# The hosts of the cluster test are missed after four seconds: nothing else runs beside it.
test-all: test
	$(BIN)/python -m pytest --tier long -m "not cluster" -n 2 --dist loadfile
	$(BIN)/python -m pytest --tier long -m cluster

test-mutations: $(STAMP)
	$(BIN)/python -m tests.mutations

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m dev.prose

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

env: $(STAMP)

# uv resolves nothing here: requirements.txt names every version. It is fetched with pip into the environment itself.
# Compiled at once because a run starts a dozen Python processes: importing open_clip takes 14 s from source, 5 s from
# bytecode, and many containers set PYTHONDONTWRITEBYTECODE.
$(STAMP): pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sigray needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) data runs
