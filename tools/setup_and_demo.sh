#!/usr/bin/env bash
# Builds condensate_ext into .venv for this machine and runs the demo. Needs Python 3.11+ and g++;
# with a GPU and nvcc the CUDA kernels are built for that GPU, otherwise the CPU kernels alone.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh

if [ -z "${CONDENSATE_ARCHS:-}" ] && [ -z "${CONDENSATE_CUDA:-}" ]; then
    gpus=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true)
    if [ -n "$gpus" ]; then
        CONDENSATE_ARCHS=$(echo "$gpus" | tr -d . | sort -un | paste -sd, -)
        export CONDENSATE_ARCHS
    else
        export CONDENSATE_CUDA=OFF
    fi
fi
python -m pip install -q --no-build-isolation . ./examples/demo_layer
python -m condensate_ext demo "$@"
