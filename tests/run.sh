#!/usr/bin/env bash
# Installs what is missing, builds, and runs the tests. The last line is `N passed, M failed`; the
# exit code is 0 only if nothing failed.
#
#   tests/run.sh                  the tests, in a unity build with warnings as errors
#   tests/run.sh --full           and the long sweeps, a plain build, and the sanitizers
#   tests/run.sh -k PATTERN       only tests whose name matches (ctest -R, pytest -k)
#
# Environment: see examples/setup.sh.
set -euo pipefail
# shellcheck source=../examples/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"

full=""
pattern=""
while [ $# -gt 0 ]; do
  case $1 in
    --full) full=1 ;;
    -k)
      [ $# -ge 2 ] || meshloom_fail "-k needs a pattern"
      pattern=$2
      shift
      ;;
    -h | --help)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) meshloom_fail "unknown argument $1" "Known: --full, -k PATTERN" ;;
  esac
  shift
done

# Whatever stops the run, the last line tells.
closing="0 passed, 1 failed"
trap '[ -z "$closing" ] || printf "%s\n" "$closing"' EXIT
meshloom_setup tests
cd "$MESHLOOM_ROOT"
results=$MESHLOOM_BUILD/results
rm -rf "$results"
mkdir -p "$results"

# Ranks are processes and there may be more of them than cores; root is usual in containers.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export MESHLOOM_BUILD_DIR=$MESHLOOM_BUILD/cmake MESHLOOM_JOBS
MESHLOOM_JOBS=$(meshloom_jobs)
[ -z "$full" ] || export MESHLOOM_FULL=1

# run_ctest NAME FOLDER [ARGUMENTS...]
run_ctest() {
  local name=$1 folder=$2
  shift 2
  meshloom_say "C++ tests ($name)"
  ctest --test-dir "$folder" --parallel "$(meshloom_jobs)" --output-on-failure --no-tests=ignore \
    --test-output-size-passed 10000000 --test-output-size-failed 10000000 \
    --output-junit "$results/ctest-$name.xml" ${pattern:+-R "$pattern"} "$@" || failed=1
}

failed=""
meshloom_say "building the tests with $(meshloom_jobs) jobs"
# The package was installed from this tree: its install rules are a wheel's until told otherwise.
meshloom_configure "$MESHLOOM_BUILD/cmake" -DSKBUILD=OFF -DCMAKE_UNITY_BUILD=ON \
  -DCMAKE_UNITY_BUILD_BATCH_SIZE=8 -DMESHLOOM_BUILD_TESTS=ON -DMESHLOOM_BUILD_EXAMPLES=ON
meshloom_compile "$MESHLOOM_BUILD/cmake"
run_ctest unity "$MESHLOOM_BUILD/cmake"

meshloom_say "Python tests"
"$MESHLOOM_ENV/bin/python" -m pytest --numprocesses "$MESHLOOM_JOBS" --dist loadfile \
  --junitxml="$results/pytest.xml" ${pattern:+-k "$pattern"} || [ $? -eq 5 ] || failed=1

if [ -n "$full" ]; then
  unset MESHLOOM_FULL  # the long sweeps ran above
  meshloom_say "building without unity"
  meshloom_configure "$MESHLOOM_BUILD/plain" -DCMAKE_UNITY_BUILD=OFF -DMESHLOOM_BUILD_TESTS=ON
  meshloom_compile "$MESHLOOM_BUILD/plain"
  run_ctest plain "$MESHLOOM_BUILD/plain" -L unit
  # The planning library and the thread backend; Python and MPI bring leaks and races of their own.
  # -O1: the kernels take minutes more at -O3, and reports point at lines that are still there.
  for sanitizers in address,undefined thread; do
    name=${sanitizers%%,*}
    meshloom_say "building with -fsanitize=$sanitizers"
    meshloom_configure "$MESHLOOM_BUILD/$name" -DCMAKE_UNITY_BUILD=ON \
      -DCMAKE_UNITY_BUILD_BATCH_SIZE=8 -DMESHLOOM_SANITIZE="$sanitizers" \
      -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
      -DMESHLOOM_BUILD_TESTS=ON -DMESHLOOM_BUILD_PYTHON=OFF -DMESHLOOM_BUILD_EXAMPLES=OFF \
      -DMESHLOOM_WITH_MPI=OFF
    meshloom_compile "$MESHLOOM_BUILD/$name"
    run_ctest "$name" "$MESHLOOM_BUILD/$name" -L unit
  done
fi

closing=""
"$MESHLOOM_ENV/bin/python" tests/summary.py "$results" ${failed:+--failed}
