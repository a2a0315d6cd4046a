#!/usr/bin/env bash
# Runs one jaxgrpo command as a job on every worker of every slice, prints their logs, and keeps the
# job going. When one worker's process ends badly, the launcher names it, ends the others and starts
# the same command again on all of them:
#   exit code 75   saved after SIGTERM (preempted): started again, always
#   exit code 2    a mistake in the config or the command: not started again
#   anything else  a crash, or a worker out of reach: started again, RESTARTS times in a row
# Before that it gets slices back that are gone (create.sh, setup_workers.sh).
#
# Usage: launch.sh [--dry-run] train CONFIG key=value...     (or sft, or eval)
#   TPU, PROJECT, ZONE  name, project and zone of the queued resource (needed)
#   SLICES              number of slices, default 1
#   ACCELERATOR_TYPE, PROVISIONING, ...   as for create.sh; ACCELERATOR_TYPE is needed
#   REVISION            as for setup_workers.sh, for slices that are got back
#   RESTARTS            default 10; an attempt that lasts STEADY_SECONDS (3600) starts a new count
#   RESTART_SECONDS     pause before a restart, default 10
#   GRACE_SECONDS       that the others may take to save when one exits with 75, default 300
#   RECONNECTS          attempts to reach a worker again, RECONNECT_SECONDS (10) apart, default 30
#   WORKERS             hosts of a slice; asked from gcloud by default
#   SSH_FLAGS           more flags for gcloud's ssh, such as --internal-ip
#
# The processes on the workers do not depend on the launcher: if it or a connection ends, they go on.
# Start it again with the same command to watch and guard the same job; stop.sh ends the job.
#
# Exit code: 0 done on all workers, 2 as above, 143 ended by stop.sh, 1 given up.
#
# Workers are addressed as lib.sh says: slice $TPU (or $TPU-0, $TPU-1, ...), --worker=0, 1, ...; each
# runs ~/jaxgrpo/tpu_scripts/worker.sh, which starts ~/jaxgrpo/.venv/bin/jaxgrpo (or the first
# jaxgrpo on PATH) with ~/jaxgrpo as its working directory. The processes find each other.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set -euo pipefail

declare -A ended=() # "SLICE WORKER" -> exit code, or "lost"

# Watches one worker until its process has ended; writes "SLICE WORKER CODE [stopped]" to $ends.
watch_worker() {
  local slice=$1 worker=$2 attempt=$3 line next=1 failures=0 before status
  while true; do
    before=$next
    while IFS= read -r line; do
      if [[ $line == "jaxgrpo-exit "* ]]; then
        echo "$slice $worker ${line#* }" >>"$ends"
        return
      fi
      printf '[%s/%s] %s\n' "$slice" "$worker" "$line"
      next=$((next + 1))
    done < <(
      on_worker "$slice" "$worker" jaxgrpo/tpu_scripts/worker.sh run "$attempt" "$next" \
        jaxgrpo "${arguments[@]}"
    )
    status=0
    wait $! || status=$?
    if ((status == 126 || status == 127)); then
      warn "[$slice/$worker] has no ~/jaxgrpo/tpu_scripts/worker.sh: run setup_workers.sh"
      echo "$slice $worker $status" >>"$ends"
      return
    fi
    ((next == before)) || failures=0
    if ((++failures > RECONNECTS)); then
      echo "$slice $worker lost" >>"$ends"
      return
    fi
    warn "[$slice/$worker] connection lost; trying again ($failures of $RECONNECTS)"
    sleep "$RECONNECT_SECONDS"
  done
}

# Ends the processes whose watchers have not reported, and waits for the watchers.
end_others() {
  local slice worker enders=()
  for key in "${workers[@]}"; do
    if [[ -z ${ended[$key]:-} ]]; then
      read -r slice worker <<<"$key"
      on_worker "$slice" "$worker" jaxgrpo/tpu_scripts/worker.sh end 10 &
      enders+=($!)
    fi
  done
  ((${#enders[@]} == 0)) || wait "${enders[@]}" || true
  wait "${watchers[@]}" || true
  read_ends
}

# Takes in what the watchers have reported: `ended`, and `first_bad`, the first that did not end
# with 0.
read_ends() {
  local slice worker code stopped
  while read -r slice worker code stopped; do
    ended["$slice $worker"]=$code
    [[ -z $stopped ]] || was_stopped=1
    [[ $code == 0 || -n $first_bad ]] || first_bad="$slice $worker"
  done <"$ends"
}

# Runs one attempt to its end on all workers and sets `outcome`: done, stopped, mistake, setup,
# preempted or crashed.
attempt() {
  local key deadline codes=""
  ended=() first_bad="" was_stopped="" watchers=()
  : >"$ends"
  for key in "${workers[@]}"; do
    # shellcheck disable=SC2086  # two words
    watch_worker $key "$1" &
    watchers+=($!)
  done
  while [[ -z $first_bad ]] && ((${#ended[@]} < ${#workers[@]})); do
    sleep 0.2
    read_ends
  done
  outcome=finished
  [[ -n $first_bad ]] || return 0

  local code=${ended[$first_bad]}
  say "worker ${first_bad#* } of slice $(slice_name "${first_bad% *}") ended first: $(meaning "$code")"
  deadline=$SECONDS
  [[ $code != 75 ]] || deadline=$((SECONDS + GRACE_SECONDS))
  while ((SECONDS < deadline && ${#ended[@]} < ${#workers[@]})); do
    sleep 0.2
    read_ends
  done
  end_others
  for key in "${workers[@]}"; do codes+=" ${key/ //}:${ended[$key]:-unknown}"; done
  say "exit codes (slice/worker:code):$codes"
  judge "$code"
}

meaning() {
  case $1 in
    lost) echo "out of reach" ;;
    75) echo "exit code 75, saved after SIGTERM" ;;
    *) echo "exit code $1" ;;
  esac
}

# Sets `outcome` from the first bad exit code and all the others.
judge() {
  if [[ -n $was_stopped ]]; then
    outcome=stopped
  elif [[ " ${ended[*]} " == *" 2 "* ]]; then
    outcome=mistake
  elif [[ $1 == 126 || $1 == 127 ]]; then
    outcome=setup
  elif [[ $1 == 75 ]]; then
    outcome=preempted
  else
    outcome=crashed
  fi
}

# Gets slices back that were preempted. They are not the job's fault: `outcome` says so.
bring_back() {
  local state
  state=$(queued_state)
  [[ $state != ACTIVE ]] || return 0
  say "the queued resource is ${state:-gone}"
  outcome=preempted
  "$here/create.sh"
  "$here/setup_workers.sh"
}

# The attempt to watch: one that runs already with the same command, or a new one.
find_attempt() {
  local answer
  answer=$(on_worker 0 0 jaxgrpo/tpu_scripts/worker.sh current) ||
    die 1 "cannot ask worker 0 of slice $(slice_name 0) for its job; has setup_workers.sh run?"
  if [[ -z $answer ]]; then
    new_attempt
  elif [[ ${answer#* } == "jaxgrpo ${arguments[*]}" ]]; then
    attempt_id=${answer%% *}
    say "the job runs already (attempt $attempt_id): watching it"
  else
    die 1 "another job runs: '${answer#* }'; end it first with stop.sh"
  fi
}

new_attempt() {
  attempt_id=$(date -u +%Y%m%d-%H%M%S)-$$-$((++attempts))
  say "attempt $attempt_id: jaxgrpo $(quoted "${arguments[@]}") on ${#workers[@]} workers"
}

supervise() {
  local crashes=0 began
  find_attempt
  while true; do
    began=$SECONDS
    attempt "$attempt_id"
    case $outcome in
      finished) say "done" && return ;;
      stopped) die 143 "ended by stop.sh; the same command goes on from the last checkpoint" ;;
      mistake) die 2 "not started again: exit code 2 is a mistake in the config or the command, see above" ;;
      setup) die 1 "not started again: jaxgrpo is not installed there; run setup_workers.sh" ;;
    esac
    bring_back
    ((SECONDS - began < STEADY_SECONDS)) || crashes=0
    if [[ $outcome == preempted ]]; then
      crashes=0
      say "starting again"
    elif ((++crashes > RESTARTS)); then
      die 1 "given up: $RESTARTS restarts in a row have crashed too"
    else
      say "starting again (restart $crashes of $RESTARTS in a row)"
    fi
    sleep "$RESTART_SECONDS"
    new_attempt
  done
}

# Leaves the workers alone, ends what watches them.
leave() {
  end_groups "${watchers[@]}"
  rm -f "$ends"
}

interrupted() {
  warn "the job goes on without its launcher; start the same command again to watch it, or end it with stop.sh"
  exit 130
}

read_options "$@"
set -- "${arguments[@]}"
[[ ${1:-} =~ ^(train|sft|eval)$ ]] || unknown_argument "'${1:-}' (expected train, sft or eval)"
(($# >= 2)) || die 2 "$1 needs a config; '$script --help' shows the usage"
need TPU PROJECT ZONE ACCELERATOR_TYPE
read_pod
RESTARTS=${RESTARTS:-10} RESTART_SECONDS=${RESTART_SECONDS:-10}
RECONNECTS=${RECONNECTS:-30} RECONNECT_SECONDS=${RECONNECT_SECONDS:-10}
GRACE_SECONDS=${GRACE_SECONDS:-300} STEADY_SECONDS=${STEADY_SECONDS:-3600}
need_number RESTARTS RECONNECTS GRACE_SECONDS STEADY_SECONDS
set_describe_queued
listed=$(list_workers)
mapfile -t workers <<<"$listed"

if [[ -n $dry_run ]]; then
  note "on every worker; the others differ in --worker alone:"
  for key in "${workers[@]}"; do
    # shellcheck disable=SC2086  # two words
    on_worker $key jaxgrpo/tpu_scripts/worker.sh run ATTEMPT 1 jaxgrpo "${arguments[@]}"
  done
  exit
fi

attempts=0 watchers=()
ends=$(mktemp)
trap leave EXIT
trap interrupted INT TERM HUP
set -m # see end_groups
supervise
