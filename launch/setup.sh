# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with the given requirements file (once), and puts it first on the PATH.
# PYTHON names the interpreter to make it with, python3 by default.
requirements=$1
python=${PYTHON:-python3}
stamp=.venv/.$(basename "$requirements").$(cat requirements*.txt | cksum | cut -d' ' -f1)
if [[ ! -e $stamp ]]; then
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || {
    echo "error: $("$python" --version): use Python 3.11 to 3.14, such as PYTHON=python3.13" >&2
    exit 2
  }
  echo "installing $requirements into .venv (a few minutes, once)" >&2
  "$python" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -r "$requirements"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
