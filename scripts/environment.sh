# Sourced by quickstart.sh, test.sh and rehearsal.sh: an interpreter with the packages of the requirements file $1, as
# $PYTHON and as python and python3 in PATH. PYTHON, if set, or else an active virtual or conda environment is used as
# it is; without any, .venv is made and filled once.
set -euo pipefail
if [ -n "${PYTHON:-}" ]; then
    # a name or a path; a relative one is meant from where the command was typed
    python=$(command -v -- "$PYTHON") || { echo "error: PYTHON: there is no program $PYTHON" >&2 && exit 2; }
    PYTHON=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
    bin=.python/$(printf %s "$PYTHON" | cksum | cut -d' ' -f1)
elif [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    bin=${VIRTUAL_ENV:-$CONDA_PREFIX}/bin
    PYTHON=$bin/python
    [ -x "$PYTHON" ] || { echo "error: the active environment ${bin%/bin} has no bin/python" >&2 && exit 2; }
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1

if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" - "$PYTHON" "$requirements" <<< 'import sys; from scripts.requirements import check; check(*sys.argv[1:])' || exit 2
    case $bin in
        .python/*)
            # the interpreter may have another name, or stand beside a python that is not meant
            mkdir -p "$bin"
            for name in python python3; do
                [ -x "$bin/$name" ] && continue
                printf '#!/bin/sh\nexec "%s" "$@"\n' "$PYTHON" > "$bin/$name.$$"
                chmod +x "$bin/$name.$$"
                mv "$bin/$name.$$" "$bin/$name"
            done
            bin=$PWD/$bin
            ;;
    esac
    export PATH="$bin:$PATH" PYTHON
else
    stamp=.venv/installed-$(cat requirements.txt requirements-dev.txt | cksum | cut -d' ' -f1)-$requirements
    if [ ! -e "$stamp" ]; then
        echo "+ python3 -m venv .venv && .venv/bin/pip install -r $requirements   (several GB with CUDA builds of torch)"
        [ -x .venv/bin/python ] || python3 -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        touch "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH" PYTHON="$PWD/.venv/bin/python"
fi
