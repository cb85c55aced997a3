#!/usr/bin/env bash
# A CPU wheel for each Python: built and installed in a new environment, then doctor, a call of every
# function, and the contents of the wheel (tools/check_wheel.py). About 6 GB on disk at a time.
#
#   tools/python_versions.sh [VERSION ...]       default: 3.11 3.12 3.13 3.14; those that are found
set -uo pipefail
cd "$(dirname "$0")/.."

versions=("$@")
[ "${#versions[@]}" -gt 0 ] || versions=(3.11 3.12 3.13 3.14)
torch="${TORCH_VERSION:-2.13.0}"
work=build/python-versions
mkdir -p "$work"

try() { # VERSION ENVIRONMENT
    rm -rf "$work/wheel-$1"
    "python$1" -m venv "$2" &&
        "$2/bin/python" -m pip install -q --no-cache-dir "torch==$torch" numpy pytest jsonschema \
            pybind11 scikit-build-core ninja cmake &&
        CONDENSATE_CUDA=OFF "$2/bin/python" -m pip wheel . --no-build-isolation --no-deps -q \
            -w "$work/wheel-$1" -C "build-dir=$work/build-$1" &&
        "$2/bin/python" -m pip install -q --no-deps "$work/wheel-$1"/*.whl &&
        "$2/bin/python" tools/check_wheel.py "$work/wheel-$1"/*.whl &&
        "$2/bin/python" -m condensate_ext doctor &&
        "$2/bin/python" -m pytest -q -m "not gpu" -p no:cacheprovider tests/test_interface.py \
            tests/test_states.py
}

status=0
for version in "${versions[@]}"; do
    if ! "python$version" -c 'import sys' 2>/dev/null; then
        echo "Python $version: not found"
        continue
    fi
    environment="$work/python-$version"
    rm -rf "$environment"
    if try "$version" "$environment" >"$work/$version.log" 2>&1; then verdict=passed; else verdict=FAILED; fi
    [ "$verdict" = passed ] || status=1
    echo "Python $version: $verdict, $(tail -n 1 "$work/$version.log")"
    rm -rf "$environment"
done
exit $status
