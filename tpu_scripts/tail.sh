#!/usr/bin/env bash
# Prints and follows the log of the newest job, of all workers or of one, each line after
# "[slice/worker]". Ctrl-C ends the printing, not the job.
#
# Usage: tail.sh [--dry-run] [SLICE/WORKER]      such as 0/3: worker 3 of the first slice
#   TPU, PROJECT, ZONE  name, project and zone of the queued resource (needed)
#   SLICES              number of slices, default 1
#   LINES_BEFORE        lines from before now, default 20
#   WORKERS, SSH_FLAGS  as for launch.sh
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set -euo pipefail

read_options "$@"
set -- "${arguments[@]}"
[[ $# -eq 0 || ($# -eq 1 && $1 =~ ^[0-9]+/[0-9]+$) ]] || unknown_argument "'$*' (expected SLICE/WORKER)"
need TPU PROJECT ZONE
read_pod
LINES_BEFORE=${LINES_BEFORE:-20}
need_number LINES_BEFORE

if (($# == 1)); then
  ((${1%/*} < SLICES)) || die 2 "there is no slice ${1%/*}: SLICES is $SLICES, counted from 0"
  workers=("${1/\// }")
else
  listed=$(list_workers)
  mapfile -t workers <<<"$listed"
fi

followers=()
set -m # see end_groups
trap 'end_groups "${followers[@]}"' EXIT
trap 'exit 130' INT TERM HUP
for key in "${workers[@]}"; do
  if [[ -n $dry_run ]]; then
    # shellcheck disable=SC2086  # two words
    on_worker $key jaxgrpo/tpu_scripts/worker.sh tail "$LINES_BEFORE"
  else
    # shellcheck disable=SC2086
    on_worker $key jaxgrpo/tpu_scripts/worker.sh tail "$LINES_BEFORE" |
      while IFS= read -r line; do printf '[%s] %s\n' "${key/ //}" "$line"; done &
    followers+=("$(jobs -p %%)")
  fi
done
wait
