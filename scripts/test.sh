#!/usr/bin/env bash
# Install what is missing, then lint and all tests; options go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt
set -x
ruff check .
ruff format --check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # a core for each of the two workers
python -m pytest -n 2 --dist loadfile "$@"
