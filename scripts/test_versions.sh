#!/usr/bin/env bash
# The fast tests and a training of two steps on the oldest or the newest versions that are promised:
#   bash scripts/test_versions.sh oldest|newest [options of pytest]
# Python 3.10 with exactly requirements-oldest.txt, or Python 3.13 with the newest packages that pip finds. Each gets an
# environment of its own, 6 GB with CUDA builds of torch, in the folder VERSIONS (default .versions).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
    oldest) version=3.10 pins=(--constraint requirements-oldest.txt) ;;
    newest) version=3.13 pins=(--upgrade --upgrade-strategy eager) ;;
    *) echo "usage: bash scripts/test_versions.sh oldest|newest [options of pytest]" >&2 && exit 2 ;;
esac
environment=${VERSIONS:-.versions}/$1
shift

if [ ! -x "$environment/bin/python" ]; then
    for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python ""; do
        "$python" -c "" 2> /dev/null && break # a shim of pyenv may be in PATH and start nothing
    done
    [ -n "$python" ] || { echo "error: there is no python$version, in PATH or of pyenv (pyenv install $version)" >&2 && exit 2; }
    "$python" -m venv "$environment"
fi
PYTHON=$(cd "$environment" && pwd)/bin/python
export PYTHON PATH="$(dirname "$PYTHON"):$PATH" OMP_NUM_THREADS=1 nproc_per_node=1
# tests of several threads do not wait for each other on a busy machine, see launch.sh
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-5000}
set -x
python -m pip install --quiet --disable-pip-version-check "${pins[@]}" -r requirements-dev.txt

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -c 'import sys; from pathlib import Path; from tests.helpers import write_images_and_tokenizer as write; write(Path(sys.argv[1]))' "$folder"
bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt "$folder/vq.pt" --data-path "$folder/images" \
    --code-path "$folder/codes" --image-size 32
bash scripts/autoregressive/train_c2i.sh --code-path "$folder/codes" --cloud-save-path "$folder/gpt" --no-local-save \
    --gpt-model GPT-T --spe-token-num 3 --ar-token-num 4 --epochs 1 --warmup-epochs 0 --global-batch-size 12 \
    --activation-checkpointing selective
test -f "$folder/gpt/GPT-T-4x-32/checkpoints/0000002.pt"
python -m pytest -m "not slow" -n 1 "$@"
