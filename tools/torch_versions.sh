#!/usr/bin/env bash
# One wheel on several torch releases: for each, a new environment, the same wheel, doctor and a few
# test files. A release takes about 6 GB on disk while its turn lasts, and is removed after it.
#
#   tools/torch_versions.sh [-w WHEEL] [RELEASE ...]     default: 2.11 and every minor since
#
# Prints a line a release, and fails if one fails. PIP_ARGUMENTS go to pip's install of torch.
set -uo pipefail
cd "$(dirname "$0")/.."

wheel=""
if [ "${1:-}" = "-w" ]; then
    wheel=$2
    shift 2
fi
releases=("$@")
[ "${#releases[@]}" -gt 0 ] || releases=(2.11 2.12 2.13 2.14 2.15)
tests=(tests/test_interface.py tests/test_states.py tests/test_torch_integration.py)
work=build/torch-versions
mkdir -p "$work"

if [ -z "$wheel" ]; then
    CONDENSATE_CUDA=OFF python -m pip wheel . --no-build-isolation --no-deps -q -w "$work/wheel" \
        -C "build-dir=$work/wheel-build" || exit 1
    wheel=$(ls -t "$work"/wheel/condensate_ext-*.whl | head -n 1)
fi
echo "wheel: $(basename "$wheel"), sha256 $(sha256sum "$wheel" | cut -c 1-16)"

try() { # RELEASE ENVIRONMENT
    "${PYTHON:-python3}" -m venv "$2" &&
        "$2/bin/python" -m pip install -q ${PIP_ARGUMENTS:-} "torch==$1.*" numpy pytest jsonschema &&
        "$2/bin/python" -m pip install -q --no-deps "$wheel" &&
        "$2/bin/python" -m condensate_ext doctor &&
        "$2/bin/python" -m pytest -q -m "not gpu" -p no:cacheprovider "${tests[@]}"
}

status=0
for release in "${releases[@]}"; do
    environment="$work/torch-$release"
    rm -rf "$environment"
    if try "$release" "$environment" >"$work/$release.log" 2>&1; then verdict=passed; else verdict=FAILED; fi
    torch=$(sed -n 's/^  torch  *\([^,]*\),.*/\1/p' "$work/$release.log")
    [ "$verdict" = passed ] || status=1
    echo "torch ${torch:-$release}: $verdict, $(tail -n 1 "$work/$release.log")"
    rm -rf "$environment"
done
exit $status
