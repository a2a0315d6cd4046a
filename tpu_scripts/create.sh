#!/usr/bin/env bash
# Gets TPU slices through a queued resource and waits until they are there. Safe to run again: a
# queued resource that exists is waited for, one whose slices are gone (preempted or failed) is
# deleted and asked for again.
#
# Usage: create.sh [--dry-run]
#   TPU, PROJECT, ZONE  name, project and zone (needed)
#   ACCELERATOR_TYPE    one slice, such as v5litepod-64, v5p-128 (64 chips) or v6e-64 (needed)
#   SLICES              number of slices, default 1
#   PROVISIONING        spot, reserved or on-demand (the default)
#   RUNTIME_VERSION     TPU software version; by default the one that Google names for the type
#   SERVICE_ACCOUNT     whose rights the workers have; by default Compute Engine's default account
#   CREATE_FLAGS        more flags for `gcloud compute tpus queued-resources create`, such as
#                       --network=N or --valid-until-duration=6h
#   POLL_SECONDS        between looks at the state, default 30
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set -euo pipefail

runtime_version() {
  case $ACCELERATOR_TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5e-*) die 2 "ACCELERATOR_TYPE is $ACCELERATOR_TYPE: Google writes v5e as v5litepod-${ACCELERATOR_TYPE#v5e-}" ;;
    tpu7x-*) die 2 "TPU7x is given out through GKE: use gke.sh (or set RUNTIME_VERSION, if your project has it as TPU VMs)" ;;
    *) die 2 "no runtime version is known for ACCELERATOR_TYPE $ACCELERATOR_TYPE: set RUNTIME_VERSION; 'gcloud compute tpus tpu-vm versions list --zone=$ZONE' lists them" ;;
  esac
}

create() {
  local command=(gcloud compute tpus queued-resources create "$TPU" "${where[@]}"
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
  if ((SLICES == 1)); then
    command+=(--node-id="$TPU")
  else
    command+=(--node-count="$SLICES" --node-prefix="$TPU")
  fi
  case $PROVISIONING in
    spot) command+=(--spot) ;;
    reserved) command+=(--reserved) ;;
  esac
  [[ -z ${SERVICE_ACCOUNT:-} ]] || command+=(--service-account="$SERVICE_ACCOUNT")
  run "${command[@]}" "${create_flags[@]}" --quiet
}

delete() {
  run gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force --quiet
}

# Creates what is missing; then the state is one that leads to ACTIVE.
ask() {
  local state
  state=$(queued_state)
  while [[ $state == SUSPENDING || $state == DELETING ]]; do
    say "$TPU is $state, waiting for its end"
    sleep "$POLL_SECONDS"
    state=$(queued_state)
  done
  case $state in
    "") create ;;
    SUSPENDED | FAILED)
      say "$TPU exists but is $state: deleting it and asking again"
      delete
      create
      ;;
    *) say "$TPU exists already ($state)" ;;
  esac
}

wait_until_active() {
  local state
  SECONDS=0
  while true; do
    state=$(queued_state)
    case $state in
      ACTIVE)
        say "$TPU is ACTIVE: $SLICES x $ACCELERATOR_TYPE"
        return
        ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | "")
        die 1 "$TPU is ${state:-gone}; '$(quoted "${describe_queued[@]:0:8}")' says why"
        ;;
    esac
    say "$TPU is $state after $((SECONDS / 60)) min"
    sleep "$POLL_SECONDS"
  done
}

read_options "$@"
((${#arguments[@]} == 0)) || unknown_argument "${arguments[0]}"
POLL_SECONDS=${POLL_SECONDS:-30}
PROVISIONING=${PROVISIONING:-on-demand}
need TPU PROJECT ZONE ACCELERATOR_TYPE
read_pod
[[ $PROVISIONING =~ ^(spot|reserved|on-demand)$ ]] ||
  die 2 "PROVISIONING is '$PROVISIONING', expected spot, reserved or on-demand"
[[ -n ${RUNTIME_VERSION:-} ]] || RUNTIME_VERSION=$(runtime_version)
read -ra create_flags <<<"${CREATE_FLAGS:-}"
set_describe_queued

if [[ -n $dry_run ]]; then
  note "unless this finds it:"
  run "${describe_queued[@]}"
  create
  note "every $POLL_SECONDS seconds until it says ACTIVE:"
  run "${describe_queued[@]}"
  exit
fi
ask
wait_until_active
