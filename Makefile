# make demo   trains a VAE and a PixelCNN on handwritten digits and shows what the fused ops save
# make test   runs the test suite
# Both set up a virtual environment first, if it is missing or out of date. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu) setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow bench lint docs pictures clean

help:
	@echo "make setup      virtual environment in $(VENV), pinned dependencies, fastelbo with its C++ library"
	@echo "make demo       train a VAE and a PixelCNN on handwritten digits, under two minutes; pictures go to demo/"
	@echo "make test       the test suite"
	@echo "make test-slow  the statistical tests over 10^8 draws"
	@echo "make bench      benchmarks against eager torch, torch.distributions and torch.compile; appends result rows"
	@echo "make lint       ruff and clang-format"
	@echo "make docs       the documentation as a site, in docs/_build/html"
	@echo "make pictures   the pictures of the documentation, by running the examples; some minutes"
	@echo "make clean      remove the environment and what was built"

setup: $(STAMP)

$(STAMP): $(SOURCES)
	@echo "fastelbo: setting up $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "fastelbo: installing the pinned dependencies of constraints.txt"
	@$(BIN)/pip install --quiet -c constraints.txt torch numpy setuptools wheel
	@echo "fastelbo: compiling and installing fastelbo"
	@$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/train_vae.py --compare --output demo
	@$(BIN)/python examples/train_pixelcnn.py --compare --output demo/pixelcnn

test: $(STAMP)
	@$(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	@$(BIN)/python -m pytest benchmarks

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(shell git ls-files "*.h" "*.cpp" "*.cu" "*.cuh")

docs: $(STAMP)
	@$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "fastelbo: the site is docs/_build/html/index.html"

pictures: $(STAMP)
	@$(BIN)/python docs/pictures.py

clean:
	rm -rf $(VENV) build docs/_build demo *.egg-info fastelbo/_*.so
