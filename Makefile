# One command per purpose; each makes what it needs, from a fresh clone on.
#
#   make test                        PYTHON=python3.12 make test        TORCH="torch==2.11.0" make test
#
# A torch that PYTHON already has is used as it is; TORCH names the one to install where there is none.

export PYTHON ?= python3
export TORCH ?= torch==2.13.0
BIN := .venv/bin
# The environment's tools go first, ninja too: another version of it would compile everything anew.
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := pyproject.toml setup.py $(wildcard _build/*.py tools/*.sh) $(shell find csrc -type f)

.PHONY: demo docs test test-isa lint bench bench-full sanitize cuda-check gpu-check gpu-wheel gpu-lease mutations races wheel clean

demo: .venv/.demo  ## train 784-256-10 on MNIST, fused beside stock
	@tools/demo.sh .venv

docs: .venv/.dev  ## the documentation site, in site/; a broken link fails it, and so does a public name that no page shows
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	$(BIN)/python -m pytest -q tests/docs/test_api_pages.py

# Each process has two threads, so that the parallel parts of the kernels run. A thread that waits leaves its core to the
# other processes.
test: .venv/.dev  ## the whole suite, in a process per core
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-isa: .venv/.dev  ## the kernel tests as on one processor after another: instruction sets capped, ours and torch's
	$(BIN)/python -m tests.kernels.every_processor

lint: .venv/.dev  ## formatting, style and types; the versions pinned in pyproject.toml
	tools/lint.sh

bench: .venv/.examples  ## the quick benchmark
	$(BIN)/python -m bench --quick

bench-full: .venv/.examples  ## the whole grid
	$(BIN)/python -m bench

sanitize: .venv/.dev  ## kernel tests under AddressSanitizer and UBSan
	tools/sanitize.sh address,undefined

cuda-check:  ## compile every CUDA kernel for every architecture we ship; needs nvcc, no GPU
	tools/cuda_check.sh

gpu-check:  ## on a machine with a GPU: build, tests, sanitizers, benchmark; PYTHON's torch, no network; STAGES chooses
	$(PYTHON) -m tools.lease check $(STAGES)

gpu-wheel:  ## without a GPU: build what a lent one needs, so that nothing is compiled there
	python3 tools/gpu_wheel.py

gpu-lease:  ## on a lent GPU, with what gpu-wheel built: evidence in 560 s; `make gpu-lease RUN=again` runs what failed
	$(PYTHON) -m tools.lease $(or $(RUN),run)

mutations: .venv/.dev  ## break the CUDA kernels in one place at a time: the host tests must fail
	$(BIN)/python -m tests.emulation.cuda.mutations

races: .venv/.dev  ## the host tests of the CUDA kernels, where an access that no barrier orders fails
	DLKERNELS_TEST_RACES=1 $(BIN)/python -m pytest -q $(patsubst %,tests/emulation/test_%.py,cuda_gemm cuda_grad_pass cuda_glu_passes cuda_fused_mlp hopper)

wheel:  ## a manylinux wheel for PYTHON and its torch, else TORCH, in dist/; `python -m tools.wheel` takes several of each
	if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m tools.wheel; else $(PYTHON) -m tools.wheel --torch="$(TORCH)"; fi

clean:
	rm -rf build dist site *.egg-info dlkernels/_C*.so dlkernels/_C.json .venv

.venv/.%: $(SOURCES)
	tools/venv.sh .venv $*
	touch $@
