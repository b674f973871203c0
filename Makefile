# Two commands do everything: `make demo` shows what LLMasOS is, `make test` checks what CI checks.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format bench faults wheels clean

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

# For PyPI, in dist/: with every variant of the engine, for Linux with glibc 2.34 or later. Needs Debian's
# g++-x86-64-linux-gnu and g++-aarch64-linux-gnu.
wheels: .venv/releasing
	rm -rf build dist
	for machine in x86_64 aarch64; do \
		CXX=$$machine-linux-gnu-g++ LLMASOS_BUILD_MACHINE=$$machine \
			$(BIN)/pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir build/wheels . || exit; \
	done
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist build/wheels/*.whl

.venv/releasing: .venv/installed
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[release]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
