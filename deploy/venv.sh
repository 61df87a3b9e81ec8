#!/usr/bin/env bash
# Create the virtual environment if it is missing, and install saccade with the pinned versions for CPU into it.
#
#     deploy/venv.sh [FOLDER]        FOLDER defaults to .venv
#
# PYTHON       interpreter to use; default: the first of python3.11, 3.12, 3.13 and python3 that is 3.11 or newer
# TORCH_INDEX  package index to take the CPU build of torch from, which the Python Package Index does not have; default:
#              PyTorch's own. Empty: pip's usual sources, the default where pip is configured with sources of your own.
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

if [ ! -x "$venv/bin/pip" ]; then
    python=$(find_python)
    echo "creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
if ! "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
    echo "error: vLLM's CPU build needs the system library libnuma.so.1 (Debian, Ubuntu: apt install libnuma1;" \
        "Fedora: dnf install numactl-libs)" >&2
    exit 1
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

if [ -z "${TORCH_INDEX+set}" ]; then
    case $("${pip[@]}" config list) in
        *index-url* | *find-links*) TORCH_INDEX= ;;
        *) TORCH_INDEX=https://download.pytorch.org/whl/cpu ;;
    esac
fi

echo "installing the pinned versions into $venv (a few minutes and 4 GB the first time)"
if [ -n "$TORCH_INDEX" ]; then
    "${pip[@]}" install --quiet --no-deps --index-url "$TORCH_INDEX" --constraint deploy/constraints-cpu.txt \
        torch torchvision torchaudio || {
        echo "error: no CPU build of torch from $TORCH_INDEX; name another index (make TORCH_INDEX=https://...)," \
            "or make TORCH_INDEX= if pip's usual sources have it" >&2
        exit 1
    }
fi
"${pip[@]}" install --quiet --editable '.[cpu,dev]' --constraint deploy/constraints-cpu.txt
"$venv/bin/python" deploy/torchvision_cpu.py
