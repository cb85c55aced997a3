#!/usr/bin/env bash
# Everything that needs a GPU, for a machine with CUDA, torch and the build tools installed and no
# network: builds for this GPU, then the sections named as arguments (default: all of them).
#   tools/device_check.sh [test] [bench] [decode] [quick] [fidelity] [stages] [sanitize] [demo] [scorecard]
# The scorecard goes on where its last run ended (build/scorecard), and is no default.
# Fidelity takes its model and text from $MODEL and $TEXT.
# Logs and results go to $OUT (default build/device); a failed section does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."

sections=${*:-test bench fidelity stages sanitize demo}
mkdir -p "${OUT:-build/device}"
out=$(cd "${OUT:-build/device}" && pwd)
python=${PYTHON:-python3}
build=build/device-build
failed=()
export PYTHONUNBUFFERED=1
export CONDENSATE_ARCHS=${CONDENSATE_ARCHS:-90}

# section NAME SECONDS COMMAND...: output to the log, its end to the terminal.
section() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout "$limit" "$@" >>"$out/$name.log" 2>&1
    local status=$?
    tail -n "${LINES_SHOWN:-25}" "$out/$name.log"
    echo "== $name: exit $status, $((SECONDS - began)) s"
    [ "$status" = 0 ] || failed+=("$name")
    return "$status"
}

cpp_targets() {
    cmake "$build" -DCONDENSATE_BUILD_BENCH=ON && cmake --build "$build" --target "$@"
}

sanitize() {
    cpp_targets gpu_check || return 1
    # racecheck does not follow barriers that a thread arrives at for others, as sm90 uses them.
    local tool
    for tool in memcheck initcheck synccheck "racecheck sm80 simt"; do
        echo "== compute-sanitizer $tool"
        set -- $tool
        timeout 100 compute-sanitizer --tool "$1" --error-exitcode 9 "$build/gpu_check" "${@:2}" ||
            return 1
    done
}

stages() {
    cpp_targets condensate_bench && timeout 60 "$build/condensate_bench" \
        --benchmark_filter=cuda --benchmark_min_time=0.2 \
        --benchmark_out="$out/stages.json" --benchmark_out_format=json
}

# A model folder that came without its full weights brings the script that rebuilds them.
fidelity() {
    local model=${MODEL:-.carry/tiny-code-lm}
    if [ ! -f "$model/model.safetensors" ]; then
        "$python" "$model/expand.py" build/model && model=build/model || return 1
    fi
    "$python" -m bench.fidelity --model "$model" --text "${TEXT:-.carry/heldout_code.txt}" \
        --output "$out/fidelity.json"
}
export -f cpp_targets sanitize stages fidelity
export build out python

LINES_SHOWN=3 section build 400 "$python" -m pip install --no-build-isolation --no-index --no-deps \
    -v -C "build-dir=$build" . || { grep -E 'error|FAILED' "$out/build.log" | head -n 40; exit 1; }
for name in $sections; do
    case $name in
        test) section test 360 "$python" -m pytest -q -m gpu -x --durations=10 ;;
        quick) section bench 60 "$python" -m bench.prefill --quick --budget-seconds 30 \
            --output "$out/prefill.json" ;;
        bench) section bench 240 "$python" -m bench.prefill --budget-seconds 150 \
            --output "$out/prefill.json" &&
            section bench 60 "$python" -m bench.plot "$out/prefill.json" "$out/prefill.png" ;;
        decode) section decode 240 "$python" -m bench.decode --budget-seconds 150 \
            --output "$out/decode.json" &&
            section decode-plot 60 "$python" -m bench.plot "$out/decode.json" "$out/decode.png" ;;
        fidelity) section fidelity 300 bash -c fidelity ;;
        stages) section stages 120 bash -c stages ;;
        sanitize) section sanitize 450 bash -c sanitize ;;
        scorecard) section scorecard 560 "$python" -m tools.scorecard --device cuda --size full \
            --seconds "${SECONDS_OF_SCORECARD:-420}" --docs "$out" ;;
        demo) "$python" -m pip install -q --no-build-isolation --no-index --no-deps \
            ./examples/demo_layer && section demo 120 env -C "$out" "$python" -m condensate_ext demo ;;
        *) echo "unknown section '$name'; use test, bench, decode, quick, fidelity, stages, sanitize, scorecard or demo" && exit 2 ;;
    esac
done
echo "device check: ${#failed[@]} sections failed ${failed[*]:-}"
[ "${#failed[@]}" = 0 ]
