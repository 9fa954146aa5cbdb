#!/usr/bin/env bash
# Installs what is missing, builds, and trains a small mixture-of-experts model on four ranks.
#
#   examples/quickstart.sh                    on the sources of the Python packages just installed
#   examples/quickstart.sh --data PATH...     on your own folders of text files, or .jsonl files
#   examples/quickstart.sh ARGUMENTS...       more arguments of `meshloom train`, e.g. --steps 10
#
# The run is in runs/quickstart. Stopped (Ctrl-C) before its end, the same command continues it.
# Environment: see examples/setup.sh.
set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

data=()
arguments=()
ranks=4
while [ $# -gt 0 ]; do
  case $1 in
    --data)
      shift
      [ $# -gt 0 ] && [[ $1 != --* ]] || meshloom_fail "--data needs a folder or a .jsonl file"
      while [ $# -gt 0 ] && [[ $1 != --* ]]; do
        [ -e "$1" ] || meshloom_fail "--data $1: there is no such file or folder"
        data+=(--data "$(realpath "$1")")
        shift
      done
      ;;
    --ranks | -n)
      [ $# -ge 2 ] || meshloom_fail "$1 needs a number"
      ranks=$2
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      arguments+=("$1")
      shift
      ;;
  esac
done

meshloom_setup
cd "$MESHLOOM_ROOT"
if [ ${#data[@]} -eq 0 ]; then
  while IFS= read -r folder; do
    data+=(--data "$folder")
  done < <("$MESHLOOM_ENV/bin/python" - <<'PY'
import importlib.util, os
for name in ("torch", "sympy", "numpy", "networkx"):
    found = importlib.util.find_spec(name)
    if found and found.origin:
        print(os.path.dirname(os.path.realpath(found.origin)))
PY
  )
  meshloom_say "training on the sources of installed Python packages (--data PATH... takes your own)"
fi
exec "$MESHLOOM_ENV/bin/meshloom" train examples/quickstart.yaml --ranks "$ranks" \
  "${data[@]}" ${arguments[@]+"${arguments[@]}"}
