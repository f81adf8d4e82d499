# make demo   set up, prepare real image-text pairs, train a small CLIP on them, evaluate it, write demo/out/report.html
# make test   set up, check style and types, run every test
# make bench  set up, run the benchmarks, write bench/results/ and the README's tables from them
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
SOURCES := setup.py CMakeLists.txt pyproject.toml $(wildcard kernels/*.h kernels/*.cuh kernels/*/*.cpp kernels/*/*.cu)

.PHONY: demo test lint bench setup clean
setup: $(VENV)/.built

demo: setup
	$(PY) -m demo

test: setup lint
	$(PY) -m pytest

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy clipfast

bench: setup
	$(PY) -m pytest bench --benchmark-only --record bench/results/cpu.json
	test ! -f demo/out/results.json || cp demo/out/results.json bench/results/demo.json
	$(PY) -m bench.record

clean:
	rm -rf build clipfast/_C_*.so *.egg-info $(VENV)/.built

$(VENV)/.installed: requirements.txt requirements-rivals.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "clipfast: expected Python 3.10 or newer, got " + sys.version.split()[0] + "; name one with make PYTHON=…")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps -r requirements-rivals.txt
	@# A CUDA build of torch brings the Triton it needs; beside a CPU build the kernels are tested in Triton's interpreter.
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) install triton==3.6.0
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@
