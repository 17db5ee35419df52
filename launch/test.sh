#!/usr/bin/env bash
# Installs what is needed and runs linters, type checker and tests; arguments go to pytest (-m slow: the long ones).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh requirements-dev.txt
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
mypy
shellcheck -x launch/*.sh
python -m pytest -n 2 --dist worksteal "$@"
