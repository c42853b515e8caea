# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with the packages of $1, installed once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1
stamp=.venv/installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$requirements
if [ ! -e "$stamp" ]; then
    echo "+ python3 -m venv .venv && .venv/bin/pip install -r $requirements   (several GB with CUDA builds of torch)"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH" PYTHON="$PWD/.venv/bin/python"
