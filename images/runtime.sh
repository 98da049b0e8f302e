#!/bin/sh
# Puts what the venv of the GPU variant needs into a final stage: CUDA's base has no Python, and Triton (liger-kernel,
# FlexAttention) compiles its launchers with a C compiler when it first runs a kernel.
#
#   runtime.sh [compiler]
set -eu

case ${VARIANT:-cpu} in
cpu) exit 0 ;;
gpu) ;;
*)
  echo "VARIANT: $VARIANT is neither cpu nor gpu" >&2
  exit 2
  ;;
esac
packages="ca-certificates python3"
[ "${1:-}" = compiler ] && packages="$packages gcc libc6-dev python3-dev"
apt-get update
# shellcheck disable=SC2086 # names of packages
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages
rm -rf /var/lib/apt/lists/*
