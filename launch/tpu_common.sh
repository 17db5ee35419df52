# shellcheck shell=bash
# Sourced by tpu_vm.sh and multislice.sh, which explain the flags: creating, following, resuming, deleting.
multislice=${multislice-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
worker='bash tokenformer_jax/launch/worker.sh' # on the workers, from the home directory
shared=/mnt/shared
# shellcheck source=launch/check.sh
source "$root/launch/check.sh"

# Reading the command line.

mistake() {
  echo "error: $1" >&2
  exit 2
}

say() { echo "$(date +%H:%M:%S) $1" >&2; }

read_flags() {
  action=${1-} name=${TPU_NAME-} zone=${TPU_ZONE-} project=${TPU_PROJECT-} type=${TPU_TYPE-} runtime=${TPU_RUNTIME-}
  storage=${TPU_STORAGE-} slices=${TPU_SLICES-} queued=$multislice workers='' lines=40 poll=60 dry_run=''
  create_flags=() command=()
  case $action in
    create | run | exec | status | logs | stop | delete) shift ;;
    '' | help | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0" && exit ;;
    *) mistake "$action: not a command; use create, run, exec, status, logs, stop or delete" ;;
  esac
  while (($#)); do
    case $1 in
      --name=* | --zone=* | --project=* | --type=* | --runtime=* | --storage=* | --lines=* | --poll=*)
        flag=${1%%=*}
        printf -v "${flag#--}" %s "${1#*=}"
        ;;
      --worker=*) workers=${1#*=} ;;
      --slices=*) slices=${1#*=} ;;
      --create_flag=*) create_flags+=("${1#*=}") ;;
      --queued) queued=yes ;;
      --spot | --reserved) create_flags+=("$1") ;;
      --follow) lines=follow ;;
      --dry_run) dry_run=yes ;;
      --)
        shift
        command=("$@")
        break
        ;;
      --name | --zone | --project | --type | --runtime | --storage | --lines | --poll | --worker | --slices)
        mistake "$1: a value is missing; flags are written $1=VALUE"
        ;;
      *) mistake "$1: not a flag of this script; what the workers run stands after --" ;;
    esac
    shift
  done
}

check_flags() {
  local flag variable
  for flag in name zone; do
    variable=TPU_${flag^^}
    [[ ${!flag} ]] || mistake "--$flag ($variable) is missing: the $flag of the slice"
  done
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    mistake "--name=$name: use lower-case letters, digits and dashes, a letter first"
  [[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || mistake "--poll=$poll: must be a number of seconds, such as 60"
  [[ $lines =~ ^([0-9]+|all|follow)$ ]] || mistake "--lines=$lines: must be a number, or all"
  [[ $workers =~ ^([0-9]+|all|)$ ]] || mistake "--worker=$workers: must be a number, or all"
  nodes=("$name")
  if [[ $multislice ]]; then
    [[ $slices =~ ^[0-9]+$ && $slices -ge 2 ]] ||
      mistake "--slices=$slices (TPU_SLICES): must be 2 or more; for one slice there is launch/tpu_vm.sh"
    mapfile -t nodes < <(seq -f "$name-%g" 0 $((slices - 1)))
  elif [[ $slices ]]; then
    mistake "--slices=$slices (TPU_SLICES): not here; several slices are launch/multislice.sh's"
  fi
  place=(--zone="$zone" ${project:+--project="$project"})
  case $action in create | run) check_slice ;; esac
  case $action in run | exec) check_command ;; esac
}

check_slice() {
  [[ $type ]] || mistake "--type (TPU_TYPE) is missing: an accelerator type, such as v6e-16"
  if [[ -z $runtime ]]; then
    case $type in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v4-*) runtime=tpu-ubuntu2204-base ;;
      v5e-*) mistake "--type=$type: Cloud TPU calls it v5litepod-${type#v5e-}" ;;
      *) mistake "--type=$type: use v6e-N, v5litepod-N, v5p-N or v4-N; another needs its --runtime as well" ;;
    esac
  fi
  [[ $storage != gs://* ]] || mistake "--storage=$storage: buckets are not mounted; use --workdir=$storage/FOLDER"
  [[ $storage =~ ^([^/:]+:/.+|)$ ]] || mistake "--storage=$storage: use HOST:/SHARE, of NFS"
}

check_command() {
  local arg file
  ((${#command[@]})) || mistake "what to run is missing: -- --config=configs/… --workdir=gs://… would train"
  if [[ ${command[0]} == --* ]]; then command=(python -m tokenformer_jax.train "${command[@]}"); fi
  [[ $action == run ]] || return 0
  for arg in "${command[@]}"; do
    case $arg in
      --workdir=gs://?*/?* | --source=gs://?*/?*) ;;
      --workdir=$shared/?* | --source=$shared/?*)
        [[ $storage ]] || mistake "--storage (TPU_STORAGE) is missing: HOST:/SHARE, of NFS, to mount at $shared"
        ;;
      --workdir=* | --source=*)
        mistake "$arg: must be gs://BUCKET/FOLDER, or lie in $shared: all workers share these, and they outlive them"
        ;;
      --config=*)
        file=${arg#--config=} file=${file%%:*}
        [[ $file == configs/* && -e $root/$file || $file != */* && -e $root/configs/$file.py ]] ||
          mistake "$arg: no such file in this project's configs/, which is all that the workers get; use one in there"
        ;;
      --config.mesh.slice=*)
        [[ ${arg#*=} == "${slices:-1}" ]] || mistake "$arg: must be the number of slices, ${slices:-1}"
        ;;
    esac
  done
  if [[ $multislice && " ${command[*]} " == *" --config="* && " ${command[*]} " != *" --config.mesh.slice="* ]]; then
    command+=(--config.mesh.slice="$slices")
  fi
  command+=(--distributed)
  check "$root" "$(devices)" "${command[@]}"
}

devices() { # PROCESSESxDEVICES, of all slices together; any where the type does not say it
  local chips=${type##*-} hosts=1
  [[ $chips =~ ^[1-9][0-9]{0,5}$ && $type =~ ^(v6e|v5litepod|v5p|v4)- ]] || { echo any && return; }
  [[ $type != v4-* && $type != v5p-* ]] || chips=$((chips / 2)) # these names count cores
  if ((chips > 8)) || [[ $type == v4-* || $type == v5p-* ]]; then hosts=$(((chips + 3) / 4)); fi
  echo "$((hosts * ${slices:-1}))x$((chips / hosts))"
}

# Calling gcloud. With --dry_run every call is printed, and answered as a first run that goes well would be.

quote() { # words, as a shell would read them again
  local word text=''
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    text+=" $word"
  done
  echo "${text# }"
}

call() {
  if [[ $dry_run ]]; then quote "$@" >&3; else "$@" </dev/null 3>&-; fi
}

each_slice() { # runs a function for every slice at once; fails if one of them does
  local node pid code=0 pids=()
  for node in "${nodes[@]}"; do
    if [[ $dry_run ]]; then
      "$@"
    else
      "$@" &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return $code
}

on_workers() { # WORKERS COMMAND, where `node` is set
  call gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker="$1" --command="$2"
}

copy_project() { call gcloud compute tpus tpu-vm scp "$archive" "$node:tokenformer_jax.tar.gz" "${place[@]}" --worker=all; }

describe() { # COLLECTION NAME KEY DRY_ANSWER: prints its state, or ABSENT
  local line errors
  line=(gcloud compute tpus "$1" describe "$2" "${place[@]}" --format="value($3)")
  if [[ $dry_run ]]; then
    call "${line[@]}"
    echo "$4" && return
  fi
  errors=$(mktemp)
  if ! call "${line[@]}" 2>"$errors"; then
    grep -qi 'not.found' "$errors" || { cat "$errors" >&2 && rm "$errors" && return 1; }
    echo ABSENT
  fi
  rm "$errors"
}

state() { # DRY_ANSWER: ABSENT, READY, gone …, failed …, or waiting …; fails where gcloud does
  local node found=$1
  if [[ $queued ]]; then
    found=$(describe queued-resources "$name" state.state "${1/READY/ACTIVE}") || return
    case $found in
      ABSENT | ACTIVE) ;;
      SUSPENDED) found="gone $found" ;;
      FAILED) found="failed $found" ;;
      *) found="waiting $found" ;;
    esac
    [[ $found == ACTIVE ]] || { echo "$found" && return; }
  fi
  for node in "${nodes[@]}"; do
    found=$(describe tpu-vm "$node" state "$1") || return
    case $found in
      READY) continue ;;
      ABSENT) [[ -z $queued ]] || found="gone $found" ;;
      PREEMPTED | TERMINATED) found="gone $found" ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | DELETING) found="waiting $found" ;;
      *) found="failed $found" ;;
    esac
    break
  done
  echo "$found"
}

create() {
  say "creating $name"
  if [[ $multislice ]]; then
    call gcloud compute tpus queued-resources create "$name" "${place[@]}" --accelerator-type="$type" \
      --runtime-version="$runtime" --node-count="$slices" --node-prefix="$name" "${create_flags[@]}"
  elif [[ $queued ]]; then
    call gcloud compute tpus queued-resources create "$name" "${place[@]}" --accelerator-type="$type" \
      --runtime-version="$runtime" --node-id="$name" "${create_flags[@]}"
  else
    call gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" \
      --version="$runtime" "${create_flags[@]}"
  fi
}

delete() {
  if [[ $queued ]]; then
    call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    call gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

pause() { [[ $dry_run ]] || sleep "$poll" >/dev/null 2>&1; } # which may outlive us for a while, and holds no pipe

# The slice, and what runs on it.

ensure_ready() { # sets `fresh` if it made the slice
  local now said='' deleted=''
  fresh=''
  now=$(state ABSENT)
  while [[ $now != READY ]]; do
    case $now in
      ABSENT)
        if [[ $resuming && ! $deleted ]]; then
          say "$name was deleted, and is not made again"
          exit 1
        fi
        until create; do
          [[ $resuming ]] || exit 1
          say "$name cannot be created now; trying again"
          pause
        done
        fresh=yes
        ;;
      gone*)
        say "$name is ${now#gone }: deleting it"
        delete
        deleted=yes
        ;;
      failed*)
        say "$name is ${now#failed }: gcloud's describe tells why; delete it, and run again"
        exit 1
        ;;
      waiting*)
        [[ $now == "$said" ]] || say "$name is ${now#waiting }"
        said=$now
        pause
        ;;
    esac
    now=$(state READY)
  done
}

deploy() { # the project, as it is in this folder, to all workers
  archive=$HOME/.cache/tokenformer_jax/launch/$name.tar.gz
  call mkdir -p "${archive%/*}"
  call tar -czf "$archive" -C "$root" --exclude=__pycache__ README.md pyproject.toml requirements.txt \
    requirements-tpu.txt requirements-eval.txt configs launch tokenformer_jax
  each_slice copy_project
  local unpack='mkdir -p tokenformer_jax && cd tokenformer_jax && rm -rf configs launch tokenformer_jax'
  unpack+=' && tar -xzf ../tokenformer_jax.tar.gz && '
  each_slice on_workers all "$unpack$(quote bash launch/worker.sh install ${storage:+"$storage"})"
}

job_state() { # DRY_ANSWER: what the workers together are doing, or unreachable; the first that applies
  local answers word
  if [[ $dry_run ]]; then
    each_slice on_workers all "$worker status || echo \"\$HOSTNAME: idle\""
    echo "$1" && return
  fi
  answers=$(each_slice on_workers all "$worker status || echo \"\$HOSTNAME: idle\"" 2>/dev/null) || answers=': unreachable'
  for word in unreachable idle lost failed orphaned stopped running finished; do
    if grep -q "^[^ ]*: $word" <<<"$answers"; then break; fi
  done
  [[ $word != running ]] || say "$(head -n 1 <<<"$answers")"
  echo "$word"
}

follow() { # returns 0 when the command has finished, 1 when it failed or was stopped, 3 when the slice was lost
  local now word before='' unreachable=0
  while :; do
    word=unreachable
    if now=$(state READY); then
      if [[ $now != READY ]]; then
        say "$name is ${now#* }"
        return 3
      fi
      word=$(job_state finished)
    fi
    case $word in
      finished) return 0 ;;
      idle | lost | orphaned) # orphaned and none that failed: one is out of reach of the others
        say "a worker was restarted or lost"
        return 3
        ;;
      unreachable)
        ((++unreachable < 10)) || {
          say "the workers cannot be reached; what they do goes on: run again to follow it"
          return 1
        }
        ;;
      failed | stopped)
        # Twice, since the cloud may not tell at once that the slice went away.
        if [[ $word == "$before" ]]; then
          say "the command $word"
          [[ $word == stopped ]] || each_slice on_workers all "$worker logs 20" || true
          each_slice on_workers all "$worker stop" || true
          return 1
        fi
        ;;
    esac
    [[ $word == unreachable ]] || unreachable=0
    before=$word
    pause
  done
}

run() { # in the background and without SIGINT: one that gcloud took would not reach the trap
  trap 'kill "$!" || :; say "the command goes on: the same call follows it again, and stop ends it"; exit 130' INT
  trap 'kill "$!" || :; exit 143' TERM
  run_until_finished &
  wait "$!"
}

run_until_finished() {
  local code word
  trap '' INT
  resuming=''
  while :; do
    ensure_ready
    word=idle
    [[ $fresh ]] || word=$(job_state idle)
    if [[ $word != running ]]; then
      # A worker that still runs it waits for others that are gone.
      [[ $fresh || $word == finished ]] || each_slice on_workers all "[ ! -e tokenformer_jax ] || $worker stop"
      deploy
    fi
    each_slice on_workers all "$worker start $(quote "${command[@]}")"
    code=0
    follow || code=$?
    ((code == 3)) || return $code
    resuming=yes
    say "starting again"
  done
}

main() {
  exec 3>&1
  read_flags "$@"
  check_flags
  local node=${nodes[0]}
  case $action in
    create)
      resuming=''
      ensure_ready
      deploy
      ;;
    run) run ;;
    exec) on_workers "${workers:-0}" "$worker exec $(quote "${command[@]}")" ;;
    logs)
      if [[ $workers == all ]]; then
        each_slice on_workers all "$worker logs $lines"
      else
        on_workers "${workers:-0}" "$worker logs $lines"
      fi
      ;;
    status)
      local now
      now=$(state READY)
      [[ $dry_run ]] || echo "$name: $now"
      [[ $now != READY ]] || each_slice on_workers all "$worker status"
      ;;
    stop) each_slice on_workers all "$worker stop" ;;
    delete) delete ;;
  esac
}
