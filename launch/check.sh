# shellcheck shell=bash
# Sourced by the launchers: a mistake in a command's flags or config shows here, before anything is paid for.

# Ends the launcher with the command's own line where its flags or config are wrong, for so many PROCESSESxDEVICES (or
# any). It runs the command in the folder with --check_for, which uses no device, with $PYTHON, .venv's or python3. Where
# that lacks the packages, a line says that nothing was checked, and the launcher goes on.
check() { # FOLDER DEVICES COMMAND…
  local python=${PYTHON-} said line code=0
  [[ ${*:4:2} == "-m tokenformer_jax."* ]] || return 0 # another program
  if [[ ! $python ]]; then
    python=$1/.venv/bin/python
    [[ -x $python ]] || python=python3
  fi
  said=$(cd "$1" && JAX_PLATFORMS=cpu "$python" "${@:4}" --check_for="$2" 2>&1 >/dev/null) || code=$?
  line=${said##*$'\n'}
  if ((code == 2)) && [[ $line == "error: "* && $line != *": has no module "* ]]; then
    echo "$line" >&2
    exit 2
  elif ((code)); then
    line=${line#error: }
    echo "warning: flags and config are not checked before the start ($python: ${line##*: line *: }):" \
      "to have them checked, run bash -c 'source launch/setup.sh requirements.txt'" >&2
  fi
}
