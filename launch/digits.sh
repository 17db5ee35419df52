#!/usr/bin/env bash
# Installs what is needed into .venv, then trains a small image classifier on scikit-learn's digits, grows it, trains the
# larger one on, compares both, and draws what it says of 24 images. Run again, it goes on where it was stopped.
#   bash launch/digits.sh [DIRECTORY]      (runs/digits by default)
set -euo pipefail
trap 'exit 130' INT TERM
cd "$(dirname "$0")/.."
source launch/setup.sh requirements-vision.txt
runs=${1:-runs/digits}

run() {
  echo "--- python -m tokenformer_jax.$*" >&2
  python -m "tokenformer_jax.$1" "${@:2}"
}
run train --config=digits:small --workdir="$runs/small"
[[ -e $runs/grown/grow.json ]] || run grow --source="$runs/small" --config=digits:grown --workdir="$runs/grown"
run train --config=digits:grown --workdir="$runs/grown"
run evaluate --workdir="$runs/grown"
run report --runs="small=$runs/small,grown=$runs/grown" --out="$runs"
run predict --workdir="$runs/grown" --count=24
