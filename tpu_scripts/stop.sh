#!/usr/bin/env bash
# Ends the job on all workers: SIGTERM, on which jaxgrpo saves, and SIGKILL for what has not ended
# after GRACE_SECONDS. A launch.sh that watches ends too. Safe to run again.
#
# Usage: stop.sh [--dry-run] [--delete]
#   --delete            then deletes the queued resource with its slices, so that nothing costs money
#   TPU, PROJECT, ZONE  name, project and zone of the queued resource (needed)
#   SLICES              number of slices, default 1
#   GRACE_SECONDS       default 300
#   SSH_FLAGS           more flags for gcloud's ssh, such as --internal-ip
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set -euo pipefail

read_options "$@"
set -- "${arguments[@]}"
[[ $# -eq 0 || ($# -eq 1 && $1 == --delete) ]] || unknown_argument "'$*' (expected --delete)"
need TPU PROJECT ZONE
read_pod
GRACE_SECONDS=${GRACE_SECONDS:-300}
need_number GRACE_SECONDS
set_describe_queued

if [[ -z $dry_run ]]; then
  state=$(queued_state)
  if [[ -z $state ]]; then
    say "there is no queued resource $TPU"
    exit
  fi
fi

enders=()
if [[ -n $dry_run || $state == ACTIVE ]]; then
  for ((slice = 0; slice < SLICES; slice++)); do
    command=(on_worker "$slice" all jaxgrpo/tpu_scripts/worker.sh stop "$GRACE_SECONDS")
    if [[ -n $dry_run ]]; then
      "${command[@]}"
    else
      "${command[@]}" & # slices together: none can save while another has ended
      enders+=($!)
    fi
  done
fi
failed=""
for ender in "${enders[@]}"; do wait "$ender" || failed=1; done
[[ -z $failed ]] || warn "not every worker could be told to stop"
if [[ ${1:-} == --delete ]]; then
  run gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force --quiet
  [[ -n $dry_run ]] || say "$TPU is deleted"
elif [[ -n $failed ]]; then
  exit 1
elif [[ -z $dry_run ]]; then
  say "the job has ended; $TPU still costs money until 'stop.sh --delete'"
fi
