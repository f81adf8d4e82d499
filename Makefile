# make demo   set up, prepare real image-text pairs, train a small CLIP on them, evaluate it, write demo/out/report.html
# make paper  the CLIP paper's figures on real drawings in 45 minutes (MINUTES=10: in ten), writes paper/out/paper.html
# make test   set up, check style and types, run the tests
# make test-all  the same with the slow ones: all kernels in Triton's interpreter and emulated, ahead-of-time compilation, large
#             batches; then each known fault is put into a kernel (since SINCE: into those changed since that commit) to be found
# make soak   damaged inputs without number for every reader, the C++ kernels under sanitizers, a month of training in minutes;
#             at most 30 minutes
# make bench  (or cpu-check) set up, run the benchmarks, test the CPU's kernels, write bench/results/ and the README's tables: the
#             goals first, all within SECONDS=1500; CLIPFAST_CPU=avx2: the record of that instruction set
# make gpu-first OUT=dir SECONDS=200  with an NVIDIA GPU and no network, for PYTHON, which has torch and Triton: each kernel's first
#             light, its parts by events, ncu, compute-sanitizer
# make gpu-check OUT=dir SECONDS=480  the same machine: the GPU's tests and benchmarks
# make gpu-multi OUT=dir SECONDS=480  with several GPUs: losses over NCCL, DDP, FSDP
#             All three take the libraries that lie in clipfast/ (else build them for Hopper), write one record into OUT within
#             SECONDS whatever breaks; commit it under bench/results/ and run python -m bench.record
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet --quiet
SOURCES := setup.py CMakeLists.txt pyproject.toml $(wildcard kernels/*.h kernels/*.cuh kernels/*/*.cpp kernels/*/*.cu)

.PHONY: demo paper test test-all soak lint bench cpu-check gpu-first gpu-check gpu-multi setup rivals clean
setup: $(VENV)/.built
rivals: $(VENV)/.built $(VENV)/.rivals

demo: setup
	$(PY) -m demo

paper: MINUTES = 45
paper: setup
	$(PY) -m paper --minutes $(MINUTES)

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
	@# kernels/ is the package clipfast.kernels: beside the others, as it is installed, mypy reads it too.
	rm -rf build/lint && mkdir -p build/lint && cp -r clipfast build/lint/ && rm -f build/lint/clipfast/kernels
	cp -r kernels build/lint/clipfast/kernels
	$(PY) -m mypy build/lint/clipfast

bench: cpu-check

# A run that was cut off, or of which a row failed, leaves a record too; make then ends with an error.
cpu-check: OUT = build/cpu-check
cpu-check: SECONDS = 1500
cpu-check: rivals
	rm -f $(OUT)/*.json
	$(PY) -m bench.run cpu $(OUT) $(SECONDS); code=$$?; cp $(OUT)/*.json bench/results/ || exit $$code; \
	test ! -f demo/out/results.json || cp demo/out/results.json bench/results/demo.json; \
	$(PY) -m bench.record && exit $$code

# Nothing is fetched, installed or, where the libraries load, built: the packages are those of PYTHON.
gpu-first: SECONDS = 200
gpu-check gpu-multi: SECONDS = 480
gpu-first gpu-check gpu-multi:
	@test -n "$(OUT)" || { echo "$@: expected OUT=dir, the folder for the record" >&2; exit 2; }
	test -e clipfast/kernels || ln -s ../kernels clipfast/kernels
	$(PYTHON) -m bench.run $(@:gpu-%=%) $(OUT) $(SECONDS)

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
