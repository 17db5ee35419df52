#!/usr/bin/env bash
# Installs what is needed into .venv, then trains a small TokenFormer on the Python standard library, grows it, trains
# the larger one on, and both sizes from scratch for as many FLOPs; compares them, also on three small tasks, and writes
# some Python. Run again, it goes on where it was stopped.
#   bash launch/quickstart.sh [DIRECTORY]      (runs/quickstart by default)
set -euo pipefail
trap 'exit 130' INT TERM
cd "$(dirname "$0")/.."
source launch/setup.sh requirements-eval.txt
runs=${1:-runs/quickstart}
config=configs/quickstart.py
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}  # a tenth of a step on a CPU: see README, Speed
began=$SECONDS

run() {  # train that was stopped, also where this script may not see the signal, ends it with exit code 85
  echo "--- python -m tokenformer_jax.$*" >&2
  python -m "tokenformer_jax.$1" "${@:2}"
}
run train --config=$config:small --workdir="$runs/small"
[[ -e $runs/grown/grow.json ]] || run grow --source="$runs/small" --config=$config:grown --workdir="$runs/grown"
for name in grown large longer; do  # the other two from scratch, for as many FLOPs: as large as grown, and as small
  run train --config=$config:$name --workdir="$runs/$name"
done
echo "--- python -m benchmarks.python_tasks" >&2
python -m benchmarks.python_tasks --config=$config:small --out="$runs/tasks"
for name in small grown large longer; do
  run evaluate --workdir="$runs/$name" --config=configs/zero_shot.py:python --config.include_path="$runs/tasks"
done
names="small=$runs/small,grown=$runs/grown,large from scratch=$runs/large,small from scratch=$runs/longer"
run report --runs="$names" --out="$runs"
run generate --workdir="$runs/grown" --prompt='def ' --max_tokens=100
echo "done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s, not counting the installation" >&2
