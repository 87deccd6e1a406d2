# make install   .venv with the package and every extra, versions from constraints.txt
# make demo      train on the embedded textures; tables, pictures and checkpoints in runs/demo
# make test      the Python tests, TEST_WORKERS at a time
# make test-lowest  the Python tests with the oldest packages that pyproject.toml allows
# make test-cpp  the C++ tests, also under AddressSanitizer and UndefinedBehaviorSanitizer
# make lint      ruff and clang-format
# make bench     benchmarks on the CPU, small inputs, under ten minutes; rows in runs/bench.csv
# make bench-full  all inputs, torch.compile too: an hour or two; rows in bench/results
# make bench-gpu   what fits into eight minutes on a CUDA device, with GPU_PYTHON's torch
# make tune-gpu    every configuration of every kernel on a CUDA device; rows in bench/results
# make accuracy  what models find, docs/accuracy.md: latent norms, affine against uniformly scaling flows, the threshold, bfloat16
# make accuracy-quick  the comparison of flows on one texture, two epochs; rows in runs/accuracy
# make report    pictures and the README's section on speed, from the rows
# make gpu       test-gpu, then bench-gpu; `make -k gpu` measures even where a test fails (what is wrong is not timed)
# make test-gpu  the kernels' tests and those that need a CUDA device, with GPU_PYTHON's torch
PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
GPU_WORKERS ?= 8
CMAKE := $(BIN)/cmake -S csrc -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja"
LOWEST := build/lowest
EXTRAS := demo,anomalib,export,bench,dev
# Compiled at the first import instead: sixteen thousand files, of which few are ever imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: install demo test test-lowest test-cpp test-gpu lint bench bench-full bench-gpu tune-gpu report accuracy accuracy-quick gpu clean
.DELETE_ON_ERROR:

install: $(VENV)/extension

# Three stamps: a change in csrc rebuilds the extension and nothing else, and `make -j2 install test-cpp` compiles
# the C++ tests, which need no package, while packages are unpacked.
$(VENV)/tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(PIP) cmake ninja
	touch $@

$(VENV)/packages: $(VENV)/tools pyproject.toml constraints.txt
	PIP_CONSTRAINT=constraints.txt $(PIP) --config-settings=wheel.cmake=false \
	  --config-settings=wheel.py-api=py3 -e ".[$(EXTRAS)]"
	$(PIP) --no-build-isolation maxtree==0.2.5 || echo "maxtree does not build here: the bench goes on without it"
	touch $@

$(VENV)/extension: $(VENV)/packages $(wildcard csrc/*.hpp csrc/*.cpp csrc/CMakeLists.txt)
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

demo: install
	$(BIN)/usf-kernels demo

test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist worksteal

# uv, since pip resolves to the newest only; a build folder of its own, since the extension is built by older tools.
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
	  --config-settings=build-dir=$(LOWEST)/extension --editable ".[$(EXTRAS)]"
	OMP_WAIT_POLICY=passive $(LOWEST)/bin/python -m pytest --numprocesses $(TEST_WORKERS) --dist worksteal

test-cpp: $(VENV)/tools
	$(CMAKE) -B build/tests -DUSF_TESTS=ON
	$(CMAKE) -B build/sanitized -DUSF_TESTS=ON -DUSF_SANITIZE=ON
	$(BIN)/cmake --build build/tests
	$(BIN)/cmake --build build/sanitized
	$(BIN)/ctest --test-dir build/tests --parallel 2 --output-on-failure
	$(BIN)/ctest --test-dir build/sanitized --parallel 2 --output-on-failure

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.hpp csrc/*.cpp csrc/tests/*.cpp csrc/tests/*.hpp

bench: install
	$(BIN)/python -m bench.run --quick --output runs/bench.csv

bench-full: install
	$(BIN)/python -m bench.run

bench-gpu:
	$(GPU_PYTHON) -m bench.run --device cuda --minutes 8

tune-gpu:
	$(GPU_PYTHON) -m bench.tune

accuracy: install
	$(BIN)/python -m bench.accuracy.gaussian_mixture
	$(BIN)/python -m bench.accuracy.nfa
	$(BIN)/python -m bench.accuracy.precision
	$(BIN)/python -m bench.accuracy.substitution

accuracy-quick: install
	$(BIN)/python -m bench.accuracy.substitution --quick

report: install
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.report

gpu: test-gpu bench-gpu

test-gpu:
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) -m pytest --numprocesses $(GPU_WORKERS) --dist worksteal tests/test_kernels_*.py
	$(GPU_PYTHON) -m pytest --numprocesses $(GPU_WORKERS) --dist worksteal -m gpu tests/test_gpu.py \
	  tests/test_segmentation.py tests/test_nn_reversible_surroundings.py tests/test_bench.py tests/test_bench_gpu.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache
