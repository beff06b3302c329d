PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test setup format clean

demo: setup
	@echo "This trains a VQ-VAE on 1,500 digits and a prior on its codes: three to six minutes on two cores."
	@rm -rf logs/demo logs/demo-prior plots/demo plots/demo-prior
	$(RUN) train.py --dataset digits --batch-size 32 --epochs 16 --name demo
	$(RUN) train.py --prior gated-pixelcnn channels=32 dropout=0.3 --conditional --checkpoint logs/demo --name demo-prior \
		--batch-size 32 --lr cosine:2e-3:1e-4 --epochs 9
	$(RUN) visualize_codes.py --checkpoint logs/demo
	$(RUN) visualize_codes.py --checkpoint logs/demo-prior/best.pt --temperature 0.9
	@echo "Look at the reconstructions:         $(CURDIR)/plots/demo/index.html"
	@echo "Look at the samples and completions: $(CURDIR)/plots/demo-prior/index.html"

test: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib
	$(RUN) -m mypy vqvae train.py visualize_codes.py
	$(RUN) -m pytest -n 2 --dist worksteal

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.10 to 3.13 is needed: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
