# make demo   set up, prepare real image-text pairs, train a small CLIP on them, evaluate it, write demo/out/report.html
# make test   set up, check style and types, run the tests
# make test-all  the same with the slow ones: all kernels in Triton's interpreter and emulated, ahead-of-time compilation, large
#             batches; then each known fault is put into a kernel (since SINCE: into those changed since that commit) to be found
# make soak   damaged inputs without number for every reader, the C++ kernels under sanitizers, a month of training in minutes;
#             at most 30 minutes
# make bench  (or cpu-check) set up, test the CPU's kernels, run the benchmarks, write bench/results/ and the README's tables
# make gpu-check OUT=dir  with an NVIDIA GPU and no network: build for PYTHON, which has torch and Triton, run the GPU's tests and
#             benchmarks, write one record into OUT within 9 minutes; commit it under bench/results/ and run python -m bench.record
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet --quiet
SOURCES := setup.py CMakeLists.txt pyproject.toml $(wildcard kernels/*.h kernels/*.cuh kernels/*/*.cpp kernels/*/*.cu)

.PHONY: demo test test-all soak lint bench cpu-check gpu-check setup rivals clean
setup: $(VENV)/.built
rivals: $(VENV)/.built $(VENV)/.rivals

demo: setup
	$(PY) -m demo

test: rivals lint
	$(PY) -m pytest

test-all: rivals lint
	$(PY) -m pytest -m ""
	$(PY) -m tests.kernels.mutations $(if $(SINCE),--since $(SINCE))

soak: rivals
	$(PY) -m tests.hostile

lint: rivals
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy clipfast

bench: cpu-check

cpu-check: OUT = build/cpu-check
cpu-check: rivals
	$(PY) -m bench.run cpu $(OUT)
	cp $(OUT)/cpu.json bench/results/
	test ! -f demo/out/results.json || cp demo/out/results.json bench/results/demo.json
	$(PY) -m bench.record

# Nothing is fetched and no environment made: the packages that it needs are those of PYTHON.
gpu-check:
	@test -n "$(OUT)" || { echo "gpu-check: expected OUT=dir, the folder for the record" >&2; exit 2; }
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu-check: torch " + torch.__version__ + " finds no GPU")'
	@$(PYTHON) -c 'import importlib.util as u, sys; absent = [m for m in "ftfy wcwidth regex tokenizers safetensors tqdm PIL numpy triton pytest_benchmark".split() if not u.find_spec(m)]; sys.exit(absent and "gpu-check: expected packages that this Python has not: " + ", ".join(absent) + "; install them, or put their wheels on PYTHONPATH")'
	CLIPFAST_CUDA=on timeout 180 $(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
	$(PYTHON) -m bench.run cuda $(OUT)

clean:
	rm -rf build clipfast/_C_*.so *.egg-info $(VENV)/.built

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "clipfast: expected Python 3.10 or newer, got " + sys.version.split()[0] + "; name one with make PYTHON=…")'
	@test -x $(PY) || { echo "set-up: an environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "set-up: torch and the other packages, pinned (1 to 10 minutes; torch alone is 200 MB, with CUDA 3 GB)"
	@$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "set-up: building the kernels (1 minute; 3 where nvcc is found)"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# What tests and benchmarks compare with, and what they need beyond the package.
$(VENV)/.rivals: $(VENV)/.installed requirements-rivals.txt
	@echo "set-up: rivals and oracles of the tests (under 3 minutes)"
	@$(PIP) install --no-deps -r requirements-rivals.txt
	@# A CUDA build of torch brings the Triton it needs; beside a CPU build the kernels are tested in Triton's interpreter.
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) install triton==3.6.0
	@touch $@
