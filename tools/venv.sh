# Sourced. Makes a Python environment in .venv (or $CONDENSATE_VENV) with tools/requirements.txt
# and torch, and activates it. Quick when it is there already.

TORCH_VERSION="${TORCH_VERSION:-2.13.0}"

if [ ! -f pyproject.toml ]; then
    echo "run this from the repository's root" >&2
    exit 1
fi
venv="${CONDENSATE_VENV:-$PWD/.venv}"
stamp="$venv/requirements-$TORCH_VERSION.txt"
if ! cmp -s tools/requirements.txt "$stamp"; then
    echo "== Python environment in $venv"
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install -q "torch==$TORCH_VERSION" -r tools/requirements.txt
    cp tools/requirements.txt "$stamp"
fi
# shellcheck disable=SC1091
. "$venv/bin/activate"
