# Set-up shared by examples/quickstart.sh and tests/run.sh. Source it, then call
#
#   meshloom_setup          everything that `build/env/bin/meshloom` needs
#   meshloom_setup tests    and what the tests need beyond that
#
# Installs the system packages that are missing (apt), makes a virtual environment at build/env,
# builds the libraries in build/cmake and installs the package and its command into build/env.
# What is up to date is left alone, so a second run takes a second.
#
#   MESHLOOM_PYTHON      an interpreter whose packages (torch above all) are used instead of new ones
#   MESHLOOM_JOBS        parallel compilations; default: what cores and memory allow
#   MESHLOOM_CMAKE_ARGS  more arguments for CMake, e.g. "-DMESHLOOM_WITH_MPI=OFF"
#   PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf, ...  pip reads them as always
#
# shellcheck shell=bash

MESHLOOM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
MESHLOOM_BUILD=$MESHLOOM_ROOT/build
MESHLOOM_ENV=$MESHLOOM_BUILD/env

meshloom_say() { printf '== %s\n' "$*"; }

meshloom_fail() {
  printf '\n'
  printf 'error: %s\n' "$1"
  shift
  [ $# -eq 0 ] || printf '  %s\n' "$@"
  exit 1
} >&2

# meshloom_step LOG WHAT ADVICE COMMAND...: runs quietly; a failure shows the end of the log.
meshloom_step() {
  local log=$MESHLOOM_BUILD/log/$1 what=$2 advice=$3
  shift 3
  mkdir -p "$MESHLOOM_BUILD/log"
  if ! "$@" > "$log" 2>&1; then
    printf '\n' >&2
    tail -n 25 "$log" | sed 's/^/  | /' >&2
    meshloom_fail "$what failed; the whole log is $log" "$advice"
  fi
}

# --- system packages --------------------------------------------------------------------------

meshloom_has_package() {
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

meshloom_at_least() { # meshloom_at_least 3.25 3.28.1
  [ "$(printf '%s\n%s\n' "$1" "${2:-0}" | sort -V | head -n 1)" = "$1" ]
}

meshloom_python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Python 3.11 to 3.14 with its headers and, for a new environment, ensurepip.
meshloom_python_serves() {
  local version
  version=$(meshloom_python_version "$1") || return 1
  meshloom_at_least 3.11 "$version" && meshloom_at_least "$version" 3.14 || return 1
  "$1" - "${MESHLOOM_PYTHON:+existing}" > /dev/null 2>&1 <<'PY'
import importlib.util, os, sys, sysconfig
assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
assert importlib.util.find_spec("venv")
assert importlib.util.find_spec("ensurepip") or sys.argv[1]
PY
}

meshloom_find_python() {
  local candidate
  if [ -n "${MESHLOOM_PYTHON:-}" ]; then
    command -v "$MESHLOOM_PYTHON" > /dev/null ||
      meshloom_fail "MESHLOOM_PYTHON is $MESHLOOM_PYTHON, which is no command"
    meshloom_python_serves "$MESHLOOM_PYTHON" ||
      meshloom_fail "MESHLOOM_PYTHON ($MESHLOOM_PYTHON, $(meshloom_python_version "$MESHLOOM_PYTHON")) does not serve" \
        "Expected: Python 3.11 to 3.14 with its C headers (Debian, Ubuntu: python3-dev) and the venv module."
    command -v "$MESHLOOM_PYTHON"
    return
  fi
  for candidate in python3 /usr/bin/python3 python3.13 python3.12 python3.11 python3.14; do
    if command -v "$candidate" > /dev/null && meshloom_python_serves "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  return 0
}

# Names of the Debian 12 / Ubuntu 24.04 packages that are missing. What is there in another form (a
# compiler of one's own, MPICH, ...) is not asked for.
meshloom_missing_packages() {
  local gcc_version cmake_version package
  gcc_version=$(${CXX:-g++} -dumpversion 2>/dev/null)
  meshloom_at_least 12 "$gcc_version" || echo g++
  cmake_version=$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p')
  meshloom_at_least 3.25 "$cmake_version" || echo cmake
  command -v ninja > /dev/null || echo ninja-build
  if ! command -v mpirun > /dev/null || ! command -v mpicc > /dev/null; then
    echo openmpi-bin libopenmpi-dev
  fi
  for package in libfmt-dev nlohmann-json3-dev libsentencepiece-dev libyaml-cpp-dev libxxhash-dev; do
    meshloom_has_package "$package" || echo "$package"
  done
  if [ "${1:-}" = tests ]; then
    for package in libgtest-dev librapidcheck-dev; do
      meshloom_has_package "$package" || echo "$package"
    done
    command -v clang-format-14 > /dev/null || echo clang-format-14
  fi
  [ -n "${MESHLOOM_PYTHON:-}" ] || [ -n "$(meshloom_find_python)" ] ||
    echo python3 python3-venv python3-dev
}

meshloom_system_packages() {
  local missing as_root=""
  if ! command -v dpkg-query > /dev/null || ! command -v apt-get > /dev/null; then
    meshloom_say "no apt here: taking for granted a C++20 compiler (GCC 12), CMake 3.25, Ninja," \
      "an MPI, fmt, nlohmann-json, sentencepiece, and for the tests GoogleTest and clang-format-14"
    return
  fi
  missing=$(meshloom_missing_packages "${1:-}" | tr '\n' ' ')
  [ -n "${missing// /}" ] || return 0
  if [ "$(id -u)" != 0 ]; then
    if command -v sudo > /dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
      as_root=sudo
    else
      meshloom_fail "system packages are missing, and installing them takes root or sudo" \
        "Have them installed, then run this again:" "" "  apt-get install $missing"
    fi
  fi
  meshloom_say "installing system packages: $missing"
  # shellcheck disable=SC2086
  meshloom_step apt-update.txt "apt-get update" \
    "Check the network and /etc/apt/sources.list, or install these yourself: $missing" \
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get update
  # shellcheck disable=SC2086
  meshloom_step apt-install.txt "apt-get install" \
    "Check the network and the package sources, or install these yourself: $missing" \
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
}

# --- the virtual environment ------------------------------------------------------------------

# A private environment. With MESHLOOM_PYTHON it also sees that interpreter's packages, and only
# what is missing there is installed, here: the existing environment is never changed.
meshloom_make_env() {
  local python=$1
  if [ -n "${MESHLOOM_PYTHON:-}" ]; then
    meshloom_step venv.txt "making the environment build/env from $python" \
      "Is its venv module complete?" "$python" -m venv --clear --without-pip "$MESHLOOM_ENV"
    "$python" - "$MESHLOOM_ENV" <<'PY'
import glob, site, sys, sysconfig
paths = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
(own,) = glob.glob(f"{sys.argv[1]}/lib/python3*/site-packages")
with open(f"{own}/meshloom_existing.pth", "w") as file:
    for path in paths:
        file.write(f"import site; site.addsitedir({path!r})\n")
PY
    "$MESHLOOM_ENV/bin/python" - <<'PY' || exit 1
import importlib.metadata, sys
wanted = "2.11.0"
try:
    found = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    found = "no torch"
if found.split("+")[0] != wanted:
    sys.exit(f"error: MESHLOOM_PYTHON has {found}, expected torch {wanted}\n"
             "  Install that version there, or unset MESHLOOM_PYTHON for a private environment.")
PY
  else
    meshloom_step venv.txt "making the environment build/env with $python" \
      "Debian, Ubuntu: apt-get install python3-venv" "$python" -m venv --clear "$MESHLOOM_ENV"
  fi
}

meshloom_pip_install() { # meshloom_pip_install requirements.txt
  "$MESHLOOM_ENV/bin/python" -m pip install --disable-pip-version-check \
    --no-warn-script-location -r "$MESHLOOM_ROOT/python/$1" |
    { grep --line-buffered -v '^Requirement already satisfied' || true; } ||
    meshloom_fail "pip could not install python/$1" \
      "Behind a proxy or a mirror: set PIP_INDEX_URL, PIP_FIND_LINKS or pip.conf as usual." \
      "A full disk? torch and its CUDA libraries take 5 GB in build/env; PIP_INDEX_URL may point at" \
      "an index with CPU-only wheels. Or set MESHLOOM_PYTHON to an interpreter that has torch 2.11."
}

meshloom_python_packages() {
  local list stamp key
  local lists="requirements.txt"
  [ "${1:-}" != tests ] || lists="$lists requirements-test.txt"
  stamp=$MESHLOOM_ENV/meshloom-interpreter
  if [ ! -x "$MESHLOOM_ENV/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "${MESHLOOM_PYTHON:-own}" ]; then
    local python
    python=$(meshloom_find_python) || exit 1
    [ -n "$python" ] || meshloom_fail "no Python 3.11 to 3.14 with its headers was found" \
      "Install one (Debian, Ubuntu: python3 python3-venv python3-dev), or set MESHLOOM_PYTHON."
    meshloom_say "making the environment build/env with $python ($(meshloom_python_version "$python"))"
    meshloom_make_env "$python"
    echo "${MESHLOOM_PYTHON:-own}" > "$stamp"
  fi
  for list in $lists; do
    stamp=$MESHLOOM_ENV/meshloom-$list
    key=$(sha256sum < "$MESHLOOM_ROOT/python/$list")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
      meshloom_say "installing the Python packages of python/$list"
      [ "$list" != requirements.txt ] || [ -n "${MESHLOOM_PYTHON:-}" ] ||
        meshloom_say "(torch with its CUDA libraries is a download of up to 3 GB)"
      meshloom_pip_install "$list"
      echo "$key" > "$stamp"
    fi
  done
}

# --- build ------------------------------------------------------------------------------------

meshloom_jobs() {
  local cores memory_kb limit
  cores=$(nproc 2>/dev/null || echo 2)
  memory_kb=$(awk '/^MemTotal/ {print $2}' /proc/meminfo 2>/dev/null || echo 4000000)
  limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || echo max)
  if [ "$limit" != max ] && [ $((limit / 1024)) -lt "$memory_kb" ]; then
    memory_kb=$((limit / 1024))
  fi
  local by_memory=$((memory_kb / 2000000))
  [ "$by_memory" -ge 1 ] || by_memory=1
  echo "${MESHLOOM_JOBS:-$((cores < by_memory ? cores : by_memory))}"
}

# Warnings are errors with the compiler that the project is tested with; a newer one may know more.
meshloom_werror() {
  case $(${CXX:-g++} -dumpversion 2>/dev/null) in
    12 | 12.*) echo ON ;;
    *) echo OFF ;;
  esac
}

# meshloom_configure FOLDER ARGUMENTS...: the settings that every build here shares.
meshloom_configure() {
  local folder=$1
  shift
  # shellcheck disable=SC2086
  meshloom_step "configure-$(basename "$folder").txt" "configuring with CMake" \
    "The lines above name what is missing. After a change of compiler or Python: rm -r $folder" \
    cmake -S "$MESHLOOM_ROOT" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DPython_EXECUTABLE="$MESHLOOM_ENV/bin/python" -DMESHLOOM_WERROR="$(meshloom_werror)" \
    "$@" ${MESHLOOM_CMAKE_ARGS:-}
}

meshloom_compile() { # meshloom_compile FOLDER [TARGET...]
  local folder=$1
  shift
  cmake --build "$folder" --parallel "$(meshloom_jobs)" ${1:+--target "$@"} ||
    meshloom_fail "the build in $folder failed" \
      "The first error is above. Killed, or out of memory? Try MESHLOOM_JOBS=1."
}

# Changes with everything that the installed package is made from.
meshloom_source_key() {
  (
    cd "$MESHLOOM_ROOT" || exit 1
    echo "${MESHLOOM_PYTHON:-} ${CXX:-} ${CXXFLAGS:-} ${MESHLOOM_CMAKE_ARGS:-}"
    find CMakeLists.txt pyproject.toml examples/setup.sh include src python \
      -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
  ) | sha256sum
}

meshloom_build_package() {
  local stamp=$MESHLOOM_ENV/meshloom-package key
  key=$(meshloom_source_key)
  if [ -x "$MESHLOOM_ENV/bin/meshloom" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    return 0
  fi
  meshloom_say "building in build/cmake with $(meshloom_jobs) jobs"
  meshloom_configure "$MESHLOOM_BUILD/cmake" -DCMAKE_UNITY_BUILD=ON \
    -DCMAKE_UNITY_BUILD_BATCH_SIZE=8 -DMESHLOOM_BUILD_TESTS=OFF -DMESHLOOM_BUILD_EXAMPLES=OFF
  meshloom_compile "$MESHLOOM_BUILD/cmake"
  meshloom_step install.txt "installing the package into build/env" \
    "If the log does not help: rm -r build/cmake build/env, and run this again." \
    "$MESHLOOM_ENV/bin/python" -m pip install --disable-pip-version-check --no-deps \
    --no-build-isolation --force-reinstall "$MESHLOOM_ROOT" \
    --config-settings build-dir="$MESHLOOM_BUILD/cmake" \
    --config-settings cmake.define.MESHLOOM_WERROR="$(meshloom_werror)"
  [ -x "$MESHLOOM_ENV/bin/meshloom" ] ||
    meshloom_fail "the package was installed without its command build/env/bin/meshloom"
  echo "$key" > "$stamp"
}

meshloom_setup() {
  local started=$SECONDS key stamp
  mkdir -p "$MESHLOOM_BUILD/log" || meshloom_fail "cannot write to $MESHLOOM_BUILD"
  # The question whether system packages are missing is asked once for each list of them.
  stamp=$MESHLOOM_BUILD/system-packages${1:+-$1}
  key=$(sha256sum < "${BASH_SOURCE[0]}")
  if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
    meshloom_system_packages "${1:-}"
    echo "$key" > "$stamp"
  fi
  meshloom_python_packages "${1:-}"
  meshloom_build_package
  [ $((SECONDS - started)) -lt 5 ] || meshloom_say "set-up took $((SECONDS - started)) s"
}
