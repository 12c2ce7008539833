# `make demo` runs the tiny model from checkpoint to text, `make serve` serves it over HTTP, `make test` runs every check of the Python side.
# `make bench` measures a pretrained model beside other engines.
# `make cpp` builds the C++ runtime, installing Debian packages where it is root, and runs its tests and sanitizers.
# `make processors` emulates other processors (AVX2 alone, SSE4 alone, aarch64) and runs on each what they may differ in.
# `make scale` runs what needs Ray Serve, tritonserver, lm-evaluation-harness, LangChain or guidellm, and installs them; CHAMELEON_DEPLOY_RAY_KILLS=10 is the long form.
# `make release` writes dist/: the wheel, the source archive, the Debian package and their digests.
# `make mutants` changes one place of a module at a time and lists the changes that its tests do not notice (docs/testing.md).
# Each makes its own virtual environment first; PYTHON is any interpreter of 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
# Where it is set, every process compiles PyTorch's thousands of modules again, which takes as long as running them.
export PYTHONDONTWRITEBYTECODE :=

demo: .venv/demo
	$(BIN)/python -m benchmarks.demo

serve: models/demo/chameleon/bundle.json
	$(BIN)/python -m chameleon_deploy.serve models/demo/chameleon

models/demo/chameleon/bundle.json: | .venv/demo
	$(BIN)/python -m chameleon_deploy.export models/tiny/chameleon --out models/demo/chameleon

test: lint pytest pytest-tensorrt

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: .venv/ready
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --ignore tests/export/test_tensorrt.py

# Apart: TensorRT for RTX has ended a process that did all the rest before.
pytest-tensorrt: .venv/ready
	$(BIN)/python -m pytest tests/export/test_tensorrt.py

scale: scale-ray scale-others

# Apart: these wait for processes half of the time, so that others may run beside them.
scale-ray: .venv/scale
	LM_EVAL=$(CURDIR)/.venv/lm-eval/bin/lm_eval $(BIN)/python -m pytest -m ray tests/serve

scale-others: .venv/scale
	CLIENTS=$(CURDIR)/.venv/clients LM_EVAL=$(CURDIR)/.venv/lm-eval/bin/lm_eval TRITON=$(CURDIR)/.venv/triton \
	$(BIN)/python -m pytest -m '(clients or triton) and not ray' tests/serve

# In environments of their own: tritonserver wants numpy below 2.
.venv/scale: .venv/ray
	$(PYTHON) -m venv --upgrade-deps .venv/triton
	.venv/triton/bin/pip install --quiet --no-compile --editable '.[cpu,structured]' 'nvidia-pytriton>=0.7'
	$(PYTHON) -m venv --upgrade-deps .venv/lm-eval
	.venv/lm-eval/bin/pip install --quiet --no-compile 'lm-eval[api]>=0.4.13'
	$(PYTHON) -m venv --upgrade-deps .venv/clients
	.venv/clients/bin/pip install --quiet --no-compile 'guidellm>=0.8' 'langchain-openai>=1'
	touch $@

# What the tests of Ray and Triton need in the environment of all others.
.venv/ray: .venv/ready
	$(BIN)/pip install --quiet --no-compile --editable '.[ray]' 'tritonclient[grpc]>=2.50'
	touch $@

mutants: .venv/ready
	$(BIN)/python -m tests.mutation

# For docs/lab/performance.md: allow two hours on an idle machine, with what pip install -e '.[peers,peers-llama,peers-torchao,report]'
# adds. TEXT is the text that the quality is measured on.
bench: .venv/ready
	$(BIN)/python -m benchmarks.pretrained $(addprefix --text ,$(TEXT))

cpp: .venv/ready
	.ci/cpp

processors: .venv/ready
	.ci/processors

release: .venv/ready
	rm -rf dist runtime/build/package
	$(BIN)/hatchling build --directory dist
	.ci/cpp build release
	cpack -G DEB --config runtime/build/release/CPackConfig.cmake -B runtime/build/package
	cp runtime/build/package/*.deb dist
	cd dist && sha256sum *.whl *.tar.gz *.deb > SHA256SUMS

# What `demo` and `serve` need. Not compiled ahead: of 20,000 modules they import a quarter.
.venv/demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv --upgrade-deps .venv
	$(BIN)/pip install --quiet --no-compile --editable '.[cpu,export,serve]'
	touch $@

# What the tests need, beside it.
.venv/ready: .venv/demo
	$(BIN)/pip install --quiet --no-compile --editable '.[cpu,export,peers,serve,tensorrt-rtx,dev]'
	touch $@

.PHONY: bench cpp demo lint mutants processors pytest pytest-tensorrt release scale scale-others scale-ray serve test
