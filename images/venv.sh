#!/bin/sh
# Makes what an image holds, in a build stage, from the folder that has pyproject.toml and constraints.txt. Two layers:
# a new version of the code leaves the large one, the libraries, as it was.
#
#   venv.sh libraries REQUIREMENT…   /opt/venv; changes only with pyproject.toml, the constraints and the version
#   venv.sh medforge FOLDER          MedForge itself, into FOLDER, which becomes /app
#
# From the environment: VARIANT (cpu, gpu); TORCH_INDEX, an index of wheels beside the configured one; ALONE, packages
# that are wanted without what they require; WITHOUT, packages that are required and not used; FLASH_ATTN, a requirement
# that is built against the torch of the venv.
set -eu

venv=/opt/venv
# pip stays outside: an image that runs needs none
pip="python3 -m pip --python $venv/bin/python --disable-pip-version-check --no-cache-dir"
what=$1
shift

# A .pyc that is checked against its source's time would be stale once a builder rewrites times, and the root file
# system is read-only: unchecked ones are used always, and are the same in each build.
compile() {
  "$venv/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$@"
}

case $what in
libraries)
  case ${VARIANT:-cpu} in
  cpu | gpu) ;;
  *)
    echo "VARIANT: $VARIANT is neither cpu nor gpu" >&2
    exit 2
    ;;
  esac
  if [ -n "${FLASH_ATTN:-}" ] && [ "${VARIANT:-cpu}" = cpu ]; then
    echo "FLASH_ATTN has no effect without VARIANT=gpu" >&2
    exit 2
  fi
  if ! python3 -m venv --help >/dev/null 2>&1; then # a CUDA base has no Python; python's own has all
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-dev python3-pip python3-venv
  fi
  python3 -m venv --without-pip "$venv"
  touch README.md # pyproject.toml names it; it comes with the code
  # shellcheck disable=SC2086 # the command's words; the index is none or one
  $pip install --no-compile --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"
  # shellcheck disable=SC2086
  [ -z "${ALONE:-}" ] || $pip install --no-compile --no-deps --constraint constraints.txt $ALONE
  # shellcheck disable=SC2086
  [ -z "${FLASH_ATTN:-}" ] || $pip install --no-compile --no-build-isolation --constraint constraints.txt $FLASH_ATTN
  # shellcheck disable=SC2086
  [ -z "${WITHOUT:-}" ] || $pip uninstall --yes $WITHOUT
  # MedForge comes with the other layer: what stays of it is the command, and where to look, whatever PYTHONPATH is
  for site in "$venv"/lib/python3*/site-packages; do
    rm -rf "$site"/medforge "$site"/medforge-*.dist-info
    echo /app >"$site/medforge.pth"
  done
  # headers and tests, which only a C++ compiler or the packages' authors need
  find "$venv/lib" -type d \( -path '*/pyarrow/include' -o -path '*/torch/include' -o -path '*/pyarrow/tests' \
    -o -path '*/numpy/*tests' -o -path '*/pandas/tests' -o -path '*/matplotlib/tests' -o -path '*/mpl_toolkits/*tests' \
    -o -path '*/sympy/*tests' -o -path '*/networkx/*tests' \) -prune -exec rm -rf {} +
  # MedForge reads stores by its own client: of pyarrow it needs Parquet, not Flight and another S3 client
  find "$venv/lib" \( -path '*/pyarrow/*_flight.*' -o -path '*/pyarrow/*arrow_s3.*' -o -path '*/pyarrow/_s3fs.*' \) -delete
  # wheels hold files for other versions of Python, which this one could not import either
  compile "$venv/lib" || echo "venv.sh: the files that are named above stay as they are" >&2
  chmod -R a+rX "$venv"
  ;;
medforge)
  # shellcheck disable=SC2086
  $pip install --no-compile --no-deps --target "$1" .
  rm -rf "${1:?}/bin"
  compile "$1"
  chmod -R a+rX "$1"
  ;;
*)
  echo "usage: venv.sh libraries|medforge …" >&2
  exit 2
  ;;
esac
