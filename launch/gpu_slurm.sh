#!/usr/bin/env bash
# Runs a command, train by default, as a Slurm job on GPUs, and again after its time limit until it has finished:
#   bash launch/gpu_slurm.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 -- --config=configs/… --workdir=…
# The workdir must lie on a file system that all nodes share. Ahead of the time limit the command gets SIGTERM, at which
# train saves and ends (exit code 85); the job is then put back into the queue, and train goes on from its workdir.
#   --nodes=N              (1 by default)
#   --gpus_per_node=N
#   --processes=node|gpu   one process a node, which has all its GPUs (the default), or one a GPU
#   --time=LIMIT           of one turn in the queue, as sbatch takes it
#   --grace=SECONDS        between SIGTERM and the time limit: what saving takes, at most (300 by default)
#   --cpus_per_gpu=N       (8 by default)
#   --sbatch=FLAG          one more flag for sbatch, such as --sbatch=--partition=gpu; may be repeated
#   --dry_run              prints what would be called here and in the job, and calls nothing
# Uses the virtual environment .venv of this folder if there is one. The command's flags and config are checked here
# first (PYTHON: by which interpreter).
set -euo pipefail

mistake() {
  echo "error: $1" >&2
  exit 2
}

quote() { # words, as a shell would read them again
  local word text=''
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    text+=" $word"
  done
  echo "${text# }"
}

# In the job, on its first node. JAX finds coordinator, processes and their numbers in Slurm's variables.
# Stopped, train ends with 85 on all of them, and none may be killed for that: no --kill-on-bad-exit. A process that fails
# ends the others itself; those it has not met yet are ended after a minute.
step=(srun --kill-on-bad-exit=0 --wait=60)
in_job() { # LOCAL_DEVICES COMMAND…
  local signalled='' stopping='' code pid
  [[ ! -d .venv ]] || export PATH="$PWD/.venv/bin:$PATH"
  # Slurm's integration in JAX gives each process one GPU unless told otherwise.
  [[ $1 == one ]] || export JAX_LOCAL_DEVICE_IDS=$1
  # srun turns a SIGTERM of its own into SIGKILL for the processes, so they are told through scancel.
  trap 'signalled=yes stopping=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  trap 'signalled=yes' TERM # of scancel or a preemption: Slurm tells the processes as well
  "${step[@]}" "${@:2}" &
  pid=$!
  while code=0; do
    wait "$pid" || code=$?
    [[ $signalled ]] || break
    signalled='' # the signal ended the wait, not the step
  done
  if [[ $stopping ]] && ((code == 85 || code == 143)); then
    exec scontrol requeue "$SLURM_JOB_ID"
  fi
  exit $code
}
if [[ ${1-} == in_job ]]; then in_job "${@:2}"; fi

root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/check.sh
source "$root/launch/check.sh"
nodes=1 gpus_per_node='' processes=node time='' grace=300 cpus_per_gpu=8 dry_run='' sbatch_flags=() command=()
while (($#)); do
  case $1 in
    --nodes=* | --gpus_per_node=* | --processes=* | --time=* | --grace=* | --cpus_per_gpu=*)
      flag=${1%%=*}
      printf -v "${flag#--}" %s "${1#*=}"
      ;;
    --sbatch=*) sbatch_flags+=("${1#*=}") ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      command=("$@")
      break
      ;;
    help | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0" && exit ;;
    *) mistake "$1: not a flag of this script; flags are written --name=value, and what the job runs stands after --" ;;
  esac
  shift
done
for flag in nodes gpus_per_node grace cpus_per_gpu; do
  [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || mistake "--$flag=${!flag}: must be a whole number above 0"
done
[[ $processes == node || $processes == gpu ]] || mistake "--processes=$processes: must be node or gpu"
[[ $time ]] || mistake "--time is missing: the limit of one turn in the queue, such as 24:00:00"
((${#command[@]})) || mistake "what to run is missing: -- --config=configs/… --workdir=… would train"
if [[ ${command[0]} == --* ]]; then command=(python -m tokenformer_jax.train "${command[@]}"); fi
command+=(--distributed)

if [[ $processes == node ]]; then
  tasks=1 devices=$(seq -s, 0 $((gpus_per_node - 1)))
  check "$root" "${nodes}x$gpus_per_node" "${command[@]}"
else
  tasks=$gpus_per_node devices=one
  check "$root" "$((nodes * gpus_per_node))x1" "${command[@]}"
fi
submit=(sbatch --job-name=tokenformer --chdir="$root" --output="$root/runs/slurm-%j.log" --open-mode=append --requeue
  --signal="B:USR1@$grace" --time="$time" --nodes="$nodes" --ntasks-per-node="$tasks" --gpus-per-node="$gpus_per_node"
  --cpus-per-gpu="$cpus_per_gpu" "${sbatch_flags[@]}" "$root/launch/gpu_slurm.sh" in_job "$devices" "${command[@]}")
if [[ $dry_run ]]; then
  quote mkdir -p "$root/runs"
  quote "${submit[@]}"
  echo "# in the job:"
  [[ $devices == one ]] || quote export JAX_LOCAL_DEVICE_IDS="$devices"
  quote "${step[@]}" "${command[@]}"
  exit
fi
command -v sbatch >/dev/null || mistake "sbatch: not found; this is for a machine that submits Slurm jobs"
mkdir -p "$root/runs"
exec "${submit[@]}"
