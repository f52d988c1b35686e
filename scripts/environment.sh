# Sourced by scripts/quickstart and scripts/test: a Python, a virtual environment, what goes in it.

# Prints the path of a Python that is at least VERSION; with EXACT as second word, of that VERSION.
# Looks on the PATH first, then at what pyenv holds whether activated or not.
find_python() {
  local version=$1 exact=${2:-} candidate
  local pyenv=${PYENV_ROOT:-$HOME/.pyenv}
  for candidate in ${PYTHON:-} "python$version" python3.12 python3.13 python3.14 python3 \
      "$pyenv"/versions/"$version"*/bin/python3 "$pyenv"/versions/*/bin/python3; do
    # A pyenv shim that is not activated exists and fails, so each candidate is run.
    if "$candidate" - "$version" "$exact" 2>/dev/null <<'PYTHON'
import ensurepip, sys, venv
wanted = tuple(map(int, sys.argv[1].split(".")))
sys.exit(sys.version_info[:2] != wanted if sys.argv[2] else sys.version_info[:2] < wanted)
PYTHON
    then
      "$candidate" -c 'import sys; print(sys.executable)'
      return 0
    fi
  done
  return 1
}

# Makes the virtual environment FOLDER with PYTHON unless it is there, and installs the rest into it.
make_environment() {
  local folder=$1 python=$2
  shift 2
  if [ ! -x "$folder/bin/python" ]; then
    echo "making $folder with $python" >&2
    "$python" -m venv "$folder"
  fi
  echo "installing into $folder: $*" >&2
  # Most of what is installed is never imported, and compiling it took longer than unpacking it.
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}
