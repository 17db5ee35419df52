#!/usr/bin/env bash
# Like launch/tpu_vm.sh, whose header explains commands and flags, on several slices of one kind:
#   bash launch/multislice.sh run --name=… --zone=… --type=v6e-16 --slices=2 \
#       -- --config=configs/… --workdir=gs://BUCKET/…
#   --slices (TPU_SLICES)    how many; the slices are called NAME-0, NAME-1, …
# They are one queued resource, whose runtime tells each worker of its slice (MEGASCALE_… variables). A command with a
# --config gets --config.mesh.slice=SLICES as well.
set -euo pipefail
multislice=yes
# shellcheck source=launch/tpu_common.sh
source "$(dirname "$0")/tpu_common.sh"
main "$@"
