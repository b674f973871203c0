# Two commands do everything: `make demo` shows what LLMasOS is, `make test` checks what CI checks.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format bench faults clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: check
	$(BIN)/pytest -q

check: .venv/developing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -m llmasos -p llmasos.syscalls -p llmasos.kernel -p llmasos.userland -p llmasos.drivers

format: .venv/developing
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml .venv/bin/python
	@echo "Installing torch and the other packages into .venv: a minute or more, once."
	$(BIN)/pip install --disable-pip-version-check --quiet --editable .
	touch $@

.venv/developing: .venv/installed
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	touch $@

# BENCH holds options of run.py; peers are installed by tests/bench/peers.py.
bench: .venv/benching
	$(BIN)/python tests/bench/run.py $(BENCH)

.venv/benching: .venv/developing
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[bench]'
	touch $@

# N multiplies the kills: N=10 kills the kernel 300 times, the worker 100 times, both 50 times.
N ?= 1
faults: .venv/benching
	$(BIN)/python tests/bench/faults.py --kernel $$((30*$(N))) --worker $$((10*$(N))) --both $$((5*$(N)))

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
