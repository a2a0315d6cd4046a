#!/usr/bin/env bash
# Copies this clone, at one git revision, to ~/jaxgrpo on every worker of every slice, and installs
# it there (setup.sh). Safe to run again, also with another revision.
#
# Usage: setup_workers.sh [--dry-run]
#   TPU, PROJECT, ZONE  name, project and zone of the queued resource (needed)
#   SLICES              number of slices, default 1
#   REVISION            branch, tag or commit of this clone, default HEAD
#   SSH_FLAGS           more flags for gcloud's ssh and scp, such as --internal-ip
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set -euo pipefail

read_options "$@"
((${#arguments[@]} == 0)) || unknown_argument "${arguments[0]}"
need TPU PROJECT ZONE
read_pod
REVISION=${REVISION:-HEAD}
clone=$(cd "$here/.." && pwd)
commit=$(git -C "$clone" rev-parse --verify --quiet "$REVISION^{commit}") ||
  die 2 "REVISION $REVISION is no revision of $clone"
if [[ -n $(git -C "$clone" status --porcelain --untracked-files=no) ]]; then
  warn "changes that are not committed stay here"
fi

# A bundle is a repository in one file: no worker needs rights to where the clone came from.
bundle=$(git -C "$clone" rev-parse --absolute-git-dir)/jaxgrpo.bundle
run git -C "$clone" update-ref refs/jaxgrpo/setup "$commit"
run git -C "$clone" bundle create --quiet "$bundle" refs/jaxgrpo/setup
unpack='git init --quiet jaxgrpo'
unpack+=' && git -C jaxgrpo fetch --quiet ~/jaxgrpo.bundle refs/jaxgrpo/setup'
unpack+=' && git -C jaxgrpo checkout --quiet --force --detach FETCH_HEAD && jaxgrpo/tpu_scripts/setup.sh'
for ((slice = 0; slice < SLICES; slice++)); do
  name=$(slice_name "$slice")
  run gcloud compute tpus tpu-vm scp "$bundle" "$name:jaxgrpo.bundle" "${where[@]}" \
    "${ssh_flags[@]}" --quiet --worker=all
  on_worker "$slice" all bash -c "$unpack"
done
[[ -n $dry_run ]] || say "$commit is set up on all workers"
