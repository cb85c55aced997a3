#!/usr/bin/env bash
# Builds the documentation site into build/site and fails on a broken link or reference; with `serve`
# shows it at http://127.0.0.1:8000 instead. Needs no torch; the build itself needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."

venv="${CONDENSATE_DOCS_VENV:-$PWD/build/docs-venv}"
if ! cmp -s tools/requirements-docs.txt "$venv/requirements.txt"; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install -q -r tools/requirements-docs.txt
    cp tools/requirements-docs.txt "$venv/requirements.txt"
fi
export NO_MKDOCS_2_WARNING=1
if [ "${1:-}" = serve ]; then
    exec "$venv/bin/python" -m mkdocs serve
fi
"$venv/bin/python" -m mkdocs build --strict --quiet
echo "built build/site: $(find build/site -name '*.html' | wc -l) pages"
