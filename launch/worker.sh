#!/usr/bin/env bash
# What one worker does of a run on TPU VMs; launch/tpu_vm.sh and launch/multislice.sh call it over ssh.
#   bash launch/worker.sh install [STORAGE]    installs the project, and mounts STORAGE at /mnt/shared
#   bash launch/worker.sh mount STORAGE        an NFS share HOST:/SHARE
#   bash launch/worker.sh start COMMAND…       starts a command that outlives this shell
#   bash launch/worker.sh status               idle, running, finished, stopped (it saved, and goes on when started again),
#                                              lost (it died unseen), failed CODE or orphaned (it ended because another
#                                              worker's died or failed)
#   bash launch/worker.sh logs LINES|all|follow
#   bash launch/worker.sh stop                 sends it SIGTERM, and returns when it has ended
#   bash launch/worker.sh exec COMMAND…        runs a command in this shell
set -euo pipefail
shared=/mnt/shared
job=$HOME/.tokenformer_job
mkdir -p "$job"

install_project() {
  PYTHON=python3
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then  # Ubuntu 22.04 has 3.10
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.11
    PYTHON=$(python3 -m uv python find 3.11)
  fi
  source launch/setup.sh requirements-tpu.txt
  [[ -z ${1-} ]] || mount_storage "$1"
}

mount_storage() {
  ! mountpoint -q $shared || return 0
  sudo mkdir -p $shared
  command -v mount.nfs >/dev/null || apt_install nfs-common
  sudo mount -t nfs -o hard,nconnect=8 "$1" $shared
  [[ -w $shared ]] || sudo chown "$(id -u):$(id -g)" $shared
}

apt_install() {  # the system's own upgrades hold the lock after boot
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y "$@"
}

running() {  # the command holds the lock as long as it lives: no stale process id, not even after a reboot
  ! flock -n "$job/lock" true
}

start() {
  local command=${*@Q}
  exec 9>"$job/lock"
  if ! flock -n 9; then
    [[ $command == "$(<"$job/command")" ]] && return
    echo "error: another command is running: $(<"$job/command"); wait for it, or stop it first" >&2
    exit 2
  fi
  rm -f "$job/result" "$job/stopping"
  printf '%s\n' "$command" | tee "$job/command" >>"$job/log"
  setsid nohup bash launch/worker.sh supervise "$@" </dev/null >>"$job/log" 2>&1 &
  echo $! >"$job/pid"
}

supervise() {
  local code child signalled=
  trap 'signalled=yes; touch "$job/stopping"; kill -TERM "$child" 2>/dev/null || true' TERM
  "$@" &
  child=$!
  while code=0; do
    wait "$child" || code=$?
    [[ $signalled ]] || break
    signalled=  # the signal ended the wait, not the command
  done
  if ((code == 85)) || [[ -e $job/stopping && $code == 143 ]]; then
    echo stopped
  elif ((code == 75)); then
    echo orphaned
  elif ((code)); then
    echo "failed $code"
  else
    echo finished
  fi >"$job/result.new"
  mv "$job/result.new" "$job/result"
}

status() {
  if [[ ! -e $job/command ]]; then
    echo idle
  elif running; then
    echo "running $(tail -c 1000 "$job/log" | tr '\r' '\n' | tail -n 1)"
  else
    cat "$job/result" 2>/dev/null || echo lost
  fi
}

logs() {
  case $1 in
    all) cat "$job/log" ;;
    follow) tail -n 20 -F "$job/log" ;;
    *) tail -n "$1" "$job/log" ;;
  esac
}

stop() {
  running || return 0
  kill -TERM "$(<"$job/pid")"
  flock -w 600 "$job/lock" true && return
  echo "it did not end within 10 minutes: killed" >&2
  kill -KILL -- "-$(<"$job/pid")"
}

cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.jax_cache}
case ${1-} in
  install) install_project "${2-}" ;;
  mount) mount_storage "$2" ;;
  start | supervise) "$@" ;;
  status) status | sed "s/^/$HOSTNAME: /" ;;
  logs) logs "$2" | sed -u "s/^/$HOSTNAME: /" ;;
  stop) stop ;;
  exec) exec "${@:2}" ;;
  *) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
