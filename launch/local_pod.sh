#!/usr/bin/env bash
# Runs a command as N processes of one pod on this machine, to try on a CPU what runs on a pod:
#   bash launch/local_pod.sh N python -m tokenformer_jax.train --config=… --workdir=…
# Flags and config are checked first. All write to this terminal. When one dies the others end too, as on a pod, or are
# ended after 45 seconds (POD_GRACE), as where they still wait for it to join them; the exit code is that of the first to
# fail, rather than 75, with which processes end because another did, or 85, with which train ends that was stopped and
# has saved.
set -euo pipefail
[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || { echo "usage: bash launch/local_pod.sh N COMMAND…" >&2; exit 2; }
count=$1
shift
# shellcheck source=launch/check.sh
source "$(dirname "$0")/check.sh"
PYTHON=python check . any "$@"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count

pids=()
for ((index = 0; index < count; index++)); do
  JAX_PROCESS_ID=$index "$@" --distributed &
  pids[$!]=$!
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM  # each saves, and all end well
grace=${POD_GRACE:-45}
status=0 timer=
trap '[[ ! $timer ]] || kill "$timer" 2>/dev/null || true' EXIT
while ((${#pids[@]})); do
  wait -n "${pids[@]}" $timer 2>/dev/null || true  # for one to end, or a signal, which was passed on
  for pid in "${pids[@]}"; do
    kill -0 "$pid" 2>/dev/null && continue
    code=0
    wait "$pid" 2>/dev/null || code=$?
    unset "pids[$pid]"
    if ((code && (!status || status == 75 || status == 85))); then status=$code; fi
  done
  if ((status)) && [[ ! $timer ]]; then
    sleep "$grace" >/dev/null 2>&1 &
    timer=$!
  elif [[ $timer ]] && ! kill -0 "$timer" 2>/dev/null && ((${#pids[@]})); then
    echo "local_pod: another process failed $grace seconds ago; ending the rest" >&2
    kill -KILL "${pids[@]}" 2>/dev/null || true
    wait
  fi
done
exit $status
