# make demo: from two demo checkpoints, digits by class and pictures from words, to validated contact sheets.
# make test: lint, types, documentation, tests.   make check: the same without the slow tests, for every edit.
# make docs: the documentation as a site, in build/site.
# All set up a virtual environment first; nothing needs to be installed by hand but Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out

.PHONY: setup demo test check lint docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "linert needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/linert export demo/c2i_demo.pt --vq demo/vq_demo.pt --grid 16 --heads 4 --policy linear \
	    --budget-lines 4 --batch 10 --guidance 3 --out $(OUT)/bundle --force
	$(BIN)/linert run $(OUT)/bundle --classes 0-9 --num-images 40 --seed 1 --out $(OUT)/images --force
	$(BIN)/linert validate $(OUT)/bundle
	$(BIN)/linert export demo/words --budget-lines 1/2 --batch 10 --prompt-tokens 28 --guidance 1.5 \
	    --temperature 0.5 --out $(OUT)/words --force
	$(BIN)/linert run $(OUT)/words --prompt-file demo/words_prompts.txt --num-images 20 --seed 1 \
	    --out $(OUT)/drawn --force
	$(BIN)/linert validate $(OUT)/words
	@echo 'Digits: $(OUT)/images/contact_sheet.png. Drawn from words: $(OUT)/drawn/contact_sheet.png'

lint: setup docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# Not --quiet, which leaves warnings uncounted.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: setup lint
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

check: setup lint
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not slow'

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
