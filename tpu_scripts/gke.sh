#!/usr/bin/env bash
# Runs jaxgrpo on TPU slices of Google Kubernetes Engine with xpk (pip install xpk; it wants kubectl
# and gcloud). Kubernetes does what launch.sh does on TPU VMs: when a process ends badly, it ends the
# others and starts all of them again.
#
# Usage: gke.sh [--dry-run] create                           a cluster with the slices
#        gke.sh [--dry-run] launch train CONFIG key=value... (or sft, or eval)
#        gke.sh [--dry-run] tail                             follows the logs of all workers
#        gke.sh [--dry-run] stop [--delete]                  ends the job (and deletes the cluster)
#   CLUSTER, PROJECT, ZONE  of the cluster (needed)
#   WORKLOAD                name of the job (needed by launch, tail and stop)
#   ACCELERATOR_TYPE        one slice, such as v6e-64, v5p-128 or tpu7x-4x4x4 (needed by create, launch)
#   IMAGE                   container image, see Containerfile (needed by launch)
#   SLICES                  number of slices, default 1
#   PROVISIONING            spot or on-demand (the default); or name a RESERVATION
#   RESTARTS                default 50; Kubernetes counts every restart, also after exit code 75
#   GRACE_SECONDS           that a job may take to save after SIGTERM, default 300
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set -euo pipefail

create() {
  local capacity=(--on-demand)
  [[ $PROVISIONING != spot ]] || capacity=(--spot)
  [[ -z ${RESERVATION:-} ]] || capacity=(--reservation="$RESERVATION")
  # xpk leaves a cluster that exists, and the slices that it has, as they are.
  run xpk cluster create "${where[@]}" --tpu-type="$ACCELERATOR_TYPE" --num-slices="$SLICES" \
    "${capacity[@]}"
}

launch() {
  local list=(xpk workload list "${where[@]}" --filter-by-job="$WORKLOAD") listed
  if [[ -n $dry_run ]]; then
    note "unless this lists it:"
    run "${list[@]}"
  else
    listed=$("${list[@]}")
    if awk -v name="$WORKLOAD" '$1 == name { found = 1 } END { exit !found }' <<<"$listed"; then
      say "$WORKLOAD exists already: 'gke.sh tail' shows it, 'gke.sh stop' makes room for a new start"
      exit
    fi
  fi
  # xpk starts a job again after codes 42 and 127 to 255 by itself: killed, or lost. 1 is a crash;
  # 2, a mistake in the config, ends the job. `exec`, so that SIGTERM reaches jaxgrpo.
  run xpk workload create "${where[@]}" --workload="$WORKLOAD" --tpu-type="$ACCELERATOR_TYPE" \
    --num-slices="$SLICES" --docker-image="$IMAGE" --max-restarts="$RESTARTS" \
    --restart-on-exit-codes=1,75 --termination-grace-period-seconds="$GRACE_SECONDS" \
    --command="exec jaxgrpo $(quoted "$@")"
}

follow() {
  run kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$WORKLOAD" --all-containers --prefix \
    --follow --tail=20 --max-log-requests=1000
}

stop() {
  run xpk workload delete "${where[@]}" --workload="$WORKLOAD" --force
  [[ ${1:-} != --delete ]] || run xpk cluster delete "${where[@]}" --force
}

read_options "$@"
set -- "${arguments[@]}"
SLICES=${SLICES:-1} PROVISIONING=${PROVISIONING:-on-demand}
RESTARTS=${RESTARTS:-50} GRACE_SECONDS=${GRACE_SECONDS:-300}
need_number SLICES RESTARTS GRACE_SECONDS
[[ $PROVISIONING =~ ^(spot|on-demand)$ ]] ||
  die 2 "PROVISIONING is '$PROVISIONING', expected spot or on-demand (or set RESERVATION)"
case "$*" in
  create) need CLUSTER PROJECT ZONE ACCELERATOR_TYPE ;;
  "launch train "* | "launch sft "* | "launch eval "*)
    need CLUSTER PROJECT ZONE WORKLOAD ACCELERATOR_TYPE IMAGE
    ;;
  tail | stop | "stop --delete") need CLUSTER PROJECT ZONE WORKLOAD ;;
  *) unknown_argument "'$*' (expected create, launch COMMAND CONFIG, tail or stop)" ;;
esac
where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
case $1 in
  create) create ;;
  launch) launch "${@:2}" ;;
  tail) follow ;;
  stop) stop "${@:2}" ;;
esac
