#!/usr/bin/env bash
# Everything that is tested without a GPU: static checks, C++ tests under sanitizers, a wheel with
# CUDA kernels where nvcc is found, then demo and pytest on that wheel in a clean environment.
# Needs Python 3.11+, g++ and GoogleTest (Debian: libgtest-dev). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

work=build/test
jobs=$(nproc)
started=$SECONDS
step() { printf '\n== %s (after %d s)\n' "$1" "$((SECONDS - started))"; }
loudly() { printf '\n%s\n!! %s\n%s\n\n' "$(printf '!%.0s' {1..78})" "$1" "$(printf '!%.0s' {1..78})"; }
trap 'echo "tools/test.sh: FAILED in the step above" >&2' ERR

. tools/venv.sh
mkdir -p "$work"

step "static checks"
python tools/check_includes.py
python tools/readme_table.py --check
git ls-files -z '*.h' '*.cuh' '*.cc' '*.cu' '*.inl' | xargs -0 clang-format --dry-run -Werror
ruff check .
mypy
mypy bench tools/*.py
mypy --explicit-package-bases --follow-imports=silent -p tools.scorecard

step "every header compiles alone"
python tools/check_headers.py

step "documentation site, with its links checked"
bash tools/docs.sh

step "C++ tests under ASan and UBSan"
cmake -S . -B "$work/sanitize" -G Ninja -DCONDENSATE_CUDA=OFF -DCONDENSATE_BUILD_PYTHON=OFF \
    -DCONDENSATE_BUILD_TESTS=ON -DCONDENSATE_BUILD_BENCH=ON -DCONDENSATE_SANITIZE=ON \
    -DCONDENSATE_WERROR=ON >"$work/sanitize-configure.log"
cmake --build "$work/sanitize" -j "$jobs" | tail -n 3
ctest --test-dir "$work/sanitize" -j "$jobs" --output-on-failure | tail -n 12
"$work/sanitize/gpu_check" # its CPU half: the driver itself must be clean

step "a C++ program of its own"
cmake -S examples/cpp -B "$work/example" -G Ninja >"$work/example-configure.log"
cmake --build "$work/example" -j "$jobs" | tail -n 1
"$work/example/attention_example" | tail -n 1

step "device code of decoding, emulated"
cmake -S . -B "$work/emulate" -G Ninja -DCONDENSATE_CUDA=OFF -DCONDENSATE_BUILD_PYTHON=OFF \
    -DCONDENSATE_BUILD_TESTS=ON -DCONDENSATE_BUILD_EXAMPLES=OFF -DCONDENSATE_WERROR=ON \
    >"$work/emulate-configure.log"
if grep -q condensate_emulate_tests "$work/emulate/build.ninja"; then
    cmake --build "$work/emulate" -j "$jobs" --target condensate_emulate_tests | tail -n 3
    ctest --test-dir "$work/emulate" -j "$jobs" -R '^Emulate|MatchesTheReference' \
        --output-on-failure | tail -n 6
else
    loudly "CUDA's headers or GCC on x86-64 are missing: device code was not emulated"
fi

step "wheel"
rm -rf "$work/wheel" "$work/wheel-build" # a full build, so that the log names every kernel
CONDENSATE_WERROR=ON CONDENSATE_ARCHS="${CONDENSATE_ARCHS:-80;90a}" \
    python -m pip wheel . --no-build-isolation --no-deps -v -w "$work/wheel" \
    -C "build-dir=$work/wheel-build" >"$work/wheel.log" 2>&1 ||
    { grep -E 'error|warning|FAILED' "$work/wheel.log" | head -n 40; tail -n 20 "$work/wheel.log"; false; }
if command -v nvcc >/dev/null; then
    python tools/check_ptxas.py "$work/wheel.log"
else
    loudly "nvcc was not found: the CUDA kernels were NOT compiled and NOT checked"
fi

python tools/check_wheel.py "$work"/wheel/condensate_ext-*.whl

step "clean environment"
rm -rf "$work/clean"
"${PYTHON:-python3}" -m venv "$work/clean"
wheel=$(echo "$PWD/$work"/wheel/condensate_ext-*.whl)
"$work/clean/bin/python" -m pip install -q "torch==$TORCH_VERSION" "$wheel[demo,test]" jsonschema
"$work/clean/bin/python" -m pip install -q ./examples/demo_layer
deactivate
clean="$PWD/$work/clean/bin/python"
(cd "$work/clean" && "$clean" -m condensate_ext doctor && "$clean" -m condensate_ext demo)

step "pytest on the wheel"
"$clean" -m pytest -q -m "not gpu" "$@"

step "scorecard, reduced"
"$clean" -m tools.scorecard --again --state "$work/scorecard" --docs "$work"
