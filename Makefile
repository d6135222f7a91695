# Set-up, demo, tests and checks. Everything lives in .venv, .cache and demo; `make clean` removes them.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
ROOMS := frontend custom_ops passes targets runtime
SOURCES := $(shell find v4c $(ROOMS) -name '*.py')
TESTS := $(shell find tests examples benchmarks -name '*.py')
JOBS ?= 2
# Of pyproject.toml; with mlir too (some 180 MB) no test is skipped.
EXTRAS ?= test

.PHONY: all demo test slow lint wheel clean
all: demo

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "v4c needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

NANO := examples/train_nano/checkpoint

# The trained small model, exported, compiled, verified against the torch reference, measured, and run.
demo: demo/.done
	$(BIN)/v4c run demo/nano.v4c --prompt "If the file" --max-new-tokens 48

demo/.done: $(INSTALLED) $(SOURCES) $(wildcard $(NANO)/*)
	rm -rf demo && mkdir demo
	$(BIN)/v4c export -m $(NANO) -o demo/nano.onnx
	$(BIN)/v4c compile -m $(NANO) --target cpu -o demo/nano.v4c
	$(BIN)/v4c verify demo/nano.v4c -m $(NANO)
	$(BIN)/v4c eval demo/nano.v4c $(NANO) --max-tokens 4000 --questions 8
	@touch $@

# The quick suite; a second call with nothing changed does nothing.
test: .cache/tested
	@echo "all tests passed on these sources"

.cache/tested: $(INSTALLED) $(SOURCES) $(TESTS) Makefile
	@mkdir -p .cache
	$(BIN)/python -m pytest -m 'not slow and not gpu' -n $(JOBS) --dist loadfile --durations 25
	@touch $@

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# mypy reads the package as it is installed: the rooms side by side under v4c.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .cache/types && mkdir -p .cache/types/v4c
	ln -s $(CURDIR)/v4c/* $(addprefix $(CURDIR)/,$(ROOMS)) .cache/types/v4c/
	cd .cache/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p v4c

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf .venv .cache demo dist build *.egg-info
