#!/usr/bin/env bash
# Prepares one TPU VM: a virtual environment in the clone with jaxgrpo and the libtpu that matches
# its jax. Safe to run again. setup_workers.sh runs it on every worker of a pod.
#
# Usage: setup.sh [--dry-run]
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set -euo pipefail

read_options "$@"
((${#arguments[@]} == 0)) || unknown_argument "${arguments[0]}"
cd "$here/.."

python=""
for candidate in python3.13 python3.12 python3.11 python3; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [[ -x .venv/bin/pip ]]; then
  note "there is an environment already"
elif [[ -n $python ]] && "$python" -c 'import ensurepip' 2>/dev/null; then
  run "$python" -m venv .venv
else # TPU VMs with Ubuntu 22.04 have Python 3.10; uv brings a newer one without root
  run env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  run python3 -m uv venv --quiet --seed --python 3.12 .venv
fi
run .venv/bin/pip install --quiet --upgrade pip
run .venv/bin/pip install --quiet -e '.[tpu,gcs]'
# jax starts and stops faster on TPU v5e and newer with them.
hugepages=/sys/kernel/mm/transparent_hugepage/enabled
if [[ -e /dev/vfio || -e /dev/accel0 ]]; then
  run sudo sh -c "echo always > $hugepages"
fi
# Not jax.devices(): it would wait for the other hosts of the slice.
run .venv/bin/python -c 'import jax, jaxgrpo; print("jaxgrpo", jaxgrpo.__version__, "on jax", jax.__version__)'
