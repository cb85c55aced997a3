#!/usr/bin/env bash
# Formats C++ and CUDA sources in place and applies ruff's safe fixes; tools/test.sh checks both.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
git ls-files -z '*.h' '*.cuh' '*.cc' '*.cu' '*.inl' | xargs -0 clang-format -i
ruff check --fix .
