#!/usr/bin/env bash
# Create the virtual environment if it is missing, and install saccade with the pinned versions for CPU into it.
#
#     deploy/venv.sh [FOLDER]        FOLDER defaults to .venv
#
# PYTHON       interpreter to use; default: the first of python3.11, 3.12, 3.13 and python3 that is 3.11 or newer
# TORCH_INDEX  extra package index to take the CPU build of torch from; default: PyTorch's own. If pip is configured
#              with an index or a folder of wheels of your own, those are taken to have it, and the default is none.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        # Importing ensurepip tells a Python that cannot make environments (Debian without python3-venv) in time.
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no usable Python: tried ${PYTHON:-python3.11 python3.12 python3.13 python3}, and none is 3.11 or newer" \
        "with the venv module. Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv)," \
        "or name it: make PYTHON=/path/to/python3.11" >&2
    return 1
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

if [ -z "${TORCH_INDEX+set}" ]; then
    if "${pip[@]}" config list | grep -Eq 'index-url|find-links'; then
        TORCH_INDEX=
    else
        TORCH_INDEX=https://download.pytorch.org/whl/cpu
    fi
fi

echo "installing the pinned versions into $venv (a few minutes and 4 GB the first time)"
"${pip[@]}" install --quiet --editable '.[cpu,dev]' --constraint deploy/constraints-cpu.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
"$venv/bin/python" deploy/torchvision_cpu.py
