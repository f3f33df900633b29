# Two commands for a fresh machine that has Python >= 3.11 and make: `make demo` and `make test`.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRAS ?= test

RESULT ?= results/digits
RESULT_LONG ?= results/digits_long

.PHONY: demo test test-slow check clean result-digits result-digits-long ablations torch-training

# One marker for each set of extras, newer than pyproject.toml once they are installed.
comma := ,
INSTALLED := $(VENV)/installed-$(subst $(comma),-,$(EXTRAS))

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run make PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python train.py configs/digits.py --workdir runs/digits
	$(BIN)/python sample.py runs/digits --num-images 512 --batch-size 256 --out runs/digits/demo
	$(BIN)/python -m ddpm_jax.evaluation.digits runs/digits/demo/images.npz
	@echo "The generated digits: runs/digits/demo/grid.png"

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# The shipped digits, results/digits, once more: five seeds, the first one evaluated. make result-digits RESULT=runs/new/digits
result-digits: $(INSTALLED)
	for seed in 0 1 2 3 4; do \
	  $(BIN)/python train.py configs/digits.py --workdir runs/result/digits_$$seed --seed $$seed || exit 1; \
	done
	$(BIN)/python evaluate.py runs/result/digits_0 --features pixels
	$(BIN)/python convert.py to-result runs/result/digits_0 $(RESULT) --more \
	  runs/result/digits_1 runs/result/digits_2 runs/result/digits_3 runs/result/digits_4

# The digits trained ten times as long, results/digits_long: three seeds, each evaluated. make result-digits-long RESULT_LONG=NEW
result-digits-long: $(INSTALLED)
	for seed in 0 1 2; do \
	  $(BIN)/python train.py configs/digits.py --workdir runs/result/digits_long_$$seed --seed $$seed \
	    --train.steps 10000 --train.ema-decay 0.999 || exit 1; \
	  $(BIN)/python evaluate.py runs/result/digits_long_$$seed --features pixels || exit 1; \
	done
	$(BIN)/python convert.py to-result runs/result/digits_long_0 $(RESULT_LONG) --more \
	  runs/result/digits_long_1 runs/result/digits_long_2

# The paper's ablations on the digits, results/ablations: more than an hour of one core. The same command continues.
ablations: $(INSTALLED)
	$(BIN)/python results/ablations/ablations.py

# The same recipe by this package and by PyTorch, three seeds each, docs/torch_training.md: make torch-training EXTRAS=test,parity
torch-training: $(INSTALLED)
	$(BIN)/python results/torch_training/compare.py

check: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) runs
