# shellcheck shell=bash disable=SC2034  # the scripts use what is set here
# What the scripts here share: reading arguments and variables, printing or running a command, and
# addressing the workers of a pod. Sourced, never run.
#
# Variables of every script for Cloud TPU VMs:
#   TPU      name of the queued resource, and of its slices: $TPU, or $TPU-0, $TPU-1, ...
#   PROJECT  Google Cloud project
#   ZONE     its zone, such as us-east5-b
#   SLICES   number of slices, default 1
# A worker is one host of one slice. It is reached by
#   gcloud compute tpus tpu-vm ssh SLICE --worker=N --command=...
# with N from 0, whose shell starts in the home directory; the clone is ~/jaxgrpo there.
#   SSH_FLAGS  more flags for `gcloud compute tpus tpu-vm ssh` and `scp`, such as --internal-ip

here=$(dirname "${BASH_SOURCE[0]}")
script=$(basename "$0")
dry_run=""

say() { printf '%s: %s\n' "$script" "$*"; }
warn() { printf '%s: %s\n' "$script" "$*" >&2; }

# die CODE MESSAGE
die() {
  warn "$2"
  exit "$1"
}

# The comment at the top of the script.
usage() { sed -n '2,/^[^#]/{/^# shellcheck/d;s/^# \{0,1\}//p;}' "$0"; }

# Takes --help and --dry-run off the front of the arguments; the others are left in `arguments`.
read_options() {
  ((BASH_VERSINFO[0] >= 5)) || die 2 "bash 5 or newer is needed, this is $BASH_VERSION"
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      *) break ;;
    esac
    shift
  done
  arguments=("$@")
}

unknown_argument() { die 2 "unknown argument $1; '$script --help' shows the usage"; }

# Fails unless all the named variables are set; names every missing one.
need() {
  local name missing=()
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) ||
    die 2 "set ${missing[*]} in the environment; '$script --help' says what they mean"
}

need_number() {
  local name
  for name in "$@"; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || die 2 "$name is '${!name}', expected a whole number"
  done
}

# The words as one line that a shell reads back to the same words.
quoted() {
  local word line=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=("$word")
  done
  printf '%s' "${line[*]}"
}

# Runs a command, or prints it where --dry-run was given.
run() {
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# A remark between the printed commands; nothing when they are run.
note() { [[ -z $dry_run ]] || printf '# %s\n' "$*"; }

# Reads the variables of every script, which the caller has checked with `need`.
read_pod() {
  SLICES=${SLICES:-1}
  need_number SLICES
  ((SLICES >= 1)) || die 2 "SLICES is 0, expected 1 or more"
  where=(--project="$PROJECT" --zone="$ZONE")
  read -ra ssh_flags <<<"${SSH_FLAGS:-}"
}

# The name of the slice with this index.
slice_name() {
  if ((SLICES == 1)); then echo "$TPU"; else echo "$TPU-$1"; fi
}

# The state of the queued resource, such as ACTIVE; empty where there is none.
queued_state() {
  local answer
  if answer=$("${describe_queued[@]}" 2>&1); then
    grep -xE '[A-Z_]+' <<<"$answer" | tail -n 1 # gcloud's warnings left out
  elif [[ $answer != *NOT_FOUND* && $answer != *"not found"* ]]; then
    die 1 "cannot look up the queued resource $TPU: $answer"
  fi
}

set_describe_queued() {
  describe_queued=(gcloud compute tpus queued-resources describe "$TPU" "${where[@]}"
    "--format=value(state.state)")
}

# Lists the workers as lines "SLICE_INDEX WORKER_INDEX", asking how many hosts a slice has.
# WORKERS (hosts of a slice) saves the question; a dry run without it shows worker 0 alone.
list_workers() {
  local slice worker count
  for ((slice = 0; slice < SLICES; slice++)); do
    count=${WORKERS:-}
    if [[ -z $count && -n $dry_run ]]; then
      count=1
    elif [[ -z $count ]]; then
      count=$(gcloud compute tpus tpu-vm describe "$(slice_name "$slice")" "${where[@]}" \
        "--format=value(networkEndpoints.len())") ||
        die 1 "cannot look up slice $(slice_name "$slice"); is it created? see create.sh"
    fi
    [[ $count =~ ^[1-9][0-9]*$ ]] ||
      die 1 "slice $(slice_name "$slice") has '$count' workers, expected a number from 1"
    for ((worker = 0; worker < count; worker++)); do
      echo "$slice $worker"
    done
  done
}

# on_worker SLICE_INDEX WORKER COMMAND...: runs a command on a worker ("all": on all of the slice).
on_worker() {
  local slice=$1 worker=$2
  shift 2
  run gcloud compute tpus tpu-vm ssh "$(slice_name "$slice")" "${where[@]}" "${ssh_flags[@]}" \
    --quiet --worker="$worker" --command="$(quoted "$@")" </dev/null
}

# end_groups PID...: ends background processes and their connections; each was started under
# `set -m`, which makes it a process group of its own.
end_groups() {
  local leader
  for leader in "$@"; do kill -- "-$leader" 2>/dev/null || true; done
  wait 2>/dev/null || true # or bash would report each
}
