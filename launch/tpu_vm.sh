#!/usr/bin/env bash
# Runs a command, train by default, on every worker of a Cloud TPU slice, and again where it was preempted.
#   bash launch/tpu_vm.sh create --name=… --zone=… --type=v6e-16 [--storage=gs://BUCKET]    makes and prepares the slice
#   bash launch/tpu_vm.sh run    --name=… … -- --config=configs/… --workdir=gs://BUCKET/…   creates, trains, waits
#   bash launch/tpu_vm.sh run    --name=… … -- python -m tokenformer_jax.evaluate --workdir=gs://BUCKET/…
#   bash launch/tpu_vm.sh status|logs|stop|delete --name=… --zone=…
#   bash launch/tpu_vm.sh exec   --name=… --zone=… -- COMMAND…     in the foreground, on one worker
# run checks the command's flags and config here first (PYTHON: by which interpreter; .venv's by default).
# It may be interrupted: the command goes on, and the same call follows it again. Where the slice was preempted, run
# deletes it, makes a new one and starts the same command: train goes on from its --workdir.
# Flags, and the variables that stand in for them:
#   --name (TPU_NAME)        of the slice
#   --zone (TPU_ZONE)        such as us-east5-b
#   --project (TPU_PROJECT)  gcloud's by default
#   --type (TPU_TYPE)        the accelerator type: v6e-N, v5litepod-N, v5p-N or v4-N
#   --runtime (TPU_RUNTIME)  the runtime version; by default the one that goes with the type
#   --storage (TPU_STORAGE)  an NFS share HOST:/SHARE, mounted at /mnt/shared on every worker; buckets need no mount
#   --queued                 as a queued resource, which waits for capacity; else a TPU VM, made now or not at all
#   --spot, --reserved       spot capacity, which may be preempted, or your reservation's
#   --create_flag=FLAG       one more flag for gcloud's create, such as --create_flag=--network=mine; may be repeated
#   --worker=N|all           for logs and exec (0 by default)
#   --lines=N|all, --follow  for logs (40 by default)
#   --poll=SECONDS           between two looks at the slice (60 by default)
#   --dry_run                prints every command, in order, and runs none
set -euo pipefail
# shellcheck source=launch/tpu_common.sh
source "$(dirname "$0")/tpu_common.sh"
main "$@"
