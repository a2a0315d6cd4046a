#!/usr/bin/env bash
# Prepares one TPU VM: a virtual environment beside the clone with jaxgrpo and the libtpu that
# matches its jax. Safe to run again. Run it on every worker, for example with
#   gcloud compute tpus tpu-vm ssh "$TPU" --worker=all --command='jaxgrpo/tpu_scripts/setup.sh'
# Usage: setup.sh [--dry-run]
set -euo pipefail

cd "$(dirname "$0")/.."
run() { echo "+ $*"; [[ -n "${dry_run:-}" ]] || "$@"; }
case "${1:-}" in
  --dry-run) dry_run=1 ;;
  "") ;;
  *) echo "setup.sh: unknown argument $1; usage: setup.sh [--dry-run]" >&2; exit 2 ;;
esac

python=""
for candidate in python3.13 python3.12 python3.11 python3; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [[ -z "$python" ]]; then
  echo "setup.sh: Python 3.11 or newer is needed; install it, for example apt-get install python3.11-venv" >&2
  exit 1
fi
[[ -d .venv ]] || run "$python" -m venv .venv
run .venv/bin/pip install --quiet --upgrade pip
run .venv/bin/pip install --quiet -e '.[tpu]'
run .venv/bin/python -c 'import jax; print(jax.device_count(), jax.devices()[0].device_kind)'
