# make demo   trains a VAE and a PixelCNN on handwritten digits and shows what the fused ops save
# make test   runs the test suite
# Both set up a virtual environment first, if it is missing or out of date. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
PYTHONS ?= python3.10 python3.13
TORCHES ?= 2.10.0 newest
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A file's tests share what it compiles; tests/conftest.py has the order of files.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder
SOURCES := $(wildcard csrc/*.ninja csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu) setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo course test test-slow coverage bench figures lint typecheck docs pictures wheel wheel-test clean

help:
	@echo "make setup      virtual environment in $(VENV), pinned dependencies, fastelbo with its C++ library"
	@echo "make demo       train a VAE and a PixelCNN on handwritten digits, under two minutes; pictures go to demo/"
	@echo "make course     programs that hold what they find against what is true, and one table; pictures go to demo/course"
	@echo "make test       the test suite"
	@echo "make test-slow  the exhaustive rest: 10^8 draws, ten thousand calls, sanitized too, all products in Triton"
	@echo "make bench      benchmarks against eager torch, torch.distributions and torch.compile; appends result rows;"
	@echo "                ARGS=\"--quick --no-save\" or others, see $(BIN)/python -m pytest benchmarks --help"
	@echo "make figures    the figures in docs/figures from the rows in benchmarks/results"
	@echo "make lint       ruff and clang-format"
	@echo "make typecheck  mypy"
	@echo "make coverage   the test suite, and which lines of Python it ran"
	@echo "make docs       the documentation as a site, in docs/_build/html"
	@echo "make pictures   the pictures of the documentation, by running the examples; some minutes"
	@echo "make wheel      source distribution and manylinux wheel into dist/; takes minutes, with nvcc many"
	@echo "make wheel-test installs dist/'s wheel anew for each of PYTHONS=\"$(PYTHONS)\" and TORCHES=\"$(TORCHES)\", and tries it"
	@echo "make clean      remove the environment and what was built"

setup: $(STAMP)

$(STAMP): $(SOURCES)
	@echo "fastelbo: setting up $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "fastelbo: installing torch, and all else of constraints.txt while compilers run"
	@$(BIN)/pip install --quiet -c constraints.txt torch numpy ninja setuptools wheel
	@echo "fastelbo: compiling; where nvcc is, FASTELBO_CUDA=0 saves the CUDA kernels' five minutes on two cores"
	@$(BIN)/pip install --quiet -r constraints.txt & others=$$!; \
		$(BIN)/python setup.py -q build_ext || { kill $$others; exit 1; }; wait $$others
	@echo "fastelbo: installing fastelbo"
	@$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/train_vae.py --compare --output demo
	@$(BIN)/python examples/train_pixelcnn.py --compare --output demo/pixelcnn

course: $(STAMP)
	@$(BIN)/python examples/course.py --output demo/course

test: $(STAMP)
	@$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	@$(BIN)/python -m pytest benchmarks $(ARGS)

figures: $(STAMP)
	@$(BIN)/python benchmarks/plot.py

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(shell git ls-files "*.h" "*.cpp" "*.cu" "*.cuh")

typecheck: $(STAMP)
	@$(BIN)/mypy

coverage: $(STAMP)
	@$(BIN)/python -m pytest -m "not slow" $(PARALLEL) --cov --cov-report=term-missing:skip-covered

docs: $(STAMP)
	@$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "fastelbo: the site is docs/_build/html/index.html"

pictures: $(STAMP)
	@$(BIN)/python docs/pictures.py

# torch 2.10's own wheels run on glibc 2.28, too. GPUs: A100, H100, B200, and from sm_120 on.
wheel: PLATFORM = manylinux_2_28_$(shell uname -m)
wheel: $(STAMP)
	@rm -rf dist build/wheel
	@echo "fastelbo: packing the sources and building a wheel: minutes the first time, with nvcc many"
	@FASTELBO_GLIBC=2.28 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0;9.0;10.0;12.0+PTX}" \
		$(BIN)/python -m build --no-isolation --sdist --wheel --outdir build/wheel
	@echo "fastelbo: auditing the wheel"
	@$(BIN)/auditwheel show build/wheel/*.whl
	@PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat $(PLATFORM) --only-plat --wheel-dir build/wheel/audited \
		--exclude "libtorch*" --exclude "libc10*" --exclude "libcuda.so*" build/wheel/*.whl || \
		{ echo "fastelbo: the wheel does not run on every $(PLATFORM), as auditwheel says above: no dist/" >&2; exit 1; }
	@mkdir dist && mv build/wheel/*.tar.gz build/wheel/audited/*.whl dist
	@echo "fastelbo: dist/ holds" && ls -sh dist

wheel-test:
	@$(PYTHON) tools/try_wheel.py --pythons $(PYTHONS) --torches $(TORCHES)

clean:
	rm -rf $(VENV) build docs/_build demo dist *.egg-info fastelbo/_*.so
