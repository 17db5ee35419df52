#!/usr/bin/env bash
# Runs a command as N processes of one pod on this machine, to try on a CPU what runs on a pod:
#   bash launch/local_pod.sh N python -m tokenformer_jax.train --config=… --workdir=…
# All write to this terminal. When one dies the others end too, as on a pod; the exit code is that of the first to fail,
# where it is not 75, with which processes end because another did.
set -euo pipefail
[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || { echo "usage: bash launch/local_pod.sh N COMMAND…" >&2; exit 2; }
count=$1
shift
port=$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count

pids=()
for ((index = 0; index < count; index++)); do
  JAX_PROCESS_ID=$index "$@" --distributed &
  pids[$!]=$!
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM  # each saves, and all end well
status=0
while ((${#pids[@]})); do
  code=0 ended=
  wait -n -p ended "${pids[@]}" || code=$?
  [[ ${ended-} ]] || continue  # a signal came, and was passed on
  unset "pids[$ended]"
  if ((code && (!status || status == 75))); then status=$code; fi
done
exit $status
