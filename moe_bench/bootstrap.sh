# shellcheck shell=bash
# Finds or makes the Python that runs moe_bench; sourced by the shell entry points, never run.
# bootstrap WHAT: WHAT is train, dev or login (a file under locks/). Sets PYTHON. Installs nothing where torch and
# megatron-core are already importable (an NGC container, an activated environment) or MOE_BENCH_PYTHON names an interpreter.

bootstrap_has() { # bootstrap_has [-I] PYTHON MODULE...: true when PYTHON finds every module, without importing them
  local isolated=()
  if [[ "$1" == -I ]]; then isolated=(-I); shift; fi
  local python="$1"; shift
  "$python" ${isolated[@]+"${isolated[@]}"} - "$@" >/dev/null 2>&1 <<'PY'
import importlib.util, sys
from pathlib import Path

def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False

sys.exit(sys.version_info < (3, 12) or not all(found(name) for name in sys.argv[1:]))
PY
}

bootstrap_python() { # prints a Python >= 3.12, or explains and fails
  local candidate
  for candidate in python3.12 python3 python3.13 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "error: no Python >= 3.12 on PATH (looked for python3.12, python3, python3.13, python); install Python 3.12, or set MOE_BENCH_PYTHON to one" >&2
  return 2
}

bootstrap_light_modules="click jinja2 msgspec rich yaml"

bootstrap_overlay() { # a ready environment that lacks some light packages: put just those beside the project, not into it
  local python="$1" deps="$WORKSPACE/.deps"
  export PYTHONPATH="$deps${PYTHONPATH:+:$PYTHONPATH}"
  # shellcheck disable=SC2086 # a list of words
  if PYTHONPATH="$deps" bootstrap_has "$python" $bootstrap_light_modules; then return 0; fi
  echo "moe_bench: $python has torch and megatron-core; adding click, jinja2, msgspec, rich, pyyaml to $deps (the environment itself is left alone)" >&2
  "$python" -m pip install --quiet --disable-pip-version-check --require-hashes --target "$deps" -r "$WORKSPACE/locks/login.txt"
}

bootstrap_venv() { # the project's own .venv, from the lock file, again when the lock file changed
  local what="$1" venv="$WORKSPACE/.venv" larger lock stamp
  PYTHON="$venv/bin/python"
  for larger in train dev; do # login is part of train, train of dev: what was set up once stays that large
    if [[ "$what" != dev && -f "$venv/.moe_bench-$larger" ]]; then what="$larger"; fi
  done
  lock="$WORKSPACE/locks/$what.txt" stamp="$venv/.moe_bench-$what"
  if [[ -x "$PYTHON" && -f "$stamp" ]] && cmp -s "$stamp" "$lock"; then return 0; fi
  local base uv
  base="$(bootstrap_python)" || return 2
  echo "moe_bench: setting up .venv from locks/$what.txt (first use, or the lock changed)" >&2
  exec {bootstrap_lock}>"$WORKSPACE/.venv.lock"
  flock "$bootstrap_lock"
  [[ -x "$PYTHON" ]] || "$base" -m venv "$venv"
  uv="$(command -v uv || true)"
  if [[ -z "$uv" ]]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$WORKSPACE/locks/uv.txt"
    uv="$venv/bin/uv"
  fi
  "$uv" pip install --quiet --compile-bytecode --python "$PYTHON" --require-hashes -r "$lock"
  cp "$lock" "$stamp.part" && mv "$stamp.part" "$stamp"
  flock -u "$bootstrap_lock"
}

bootstrap() {
  local what="$1" current
  export PYTHONPATH="$WORKSPACE${PYTHONPATH:+:$PYTHONPATH}"
  if [[ -n "${MOE_BENCH_PYTHON:-}" ]]; then
    PYTHON="$MOE_BENCH_PYTHON"
    bootstrap_overlay "$PYTHON"
    return
  fi
  current="$(command -v python3 || command -v python || true)"
  if [[ "$what" != dev && -n "$current" && "$current" != "$WORKSPACE/.venv/"* ]] && bootstrap_has -I "$current" torch megatron.core; then
    PYTHON="$current"
    bootstrap_overlay "$PYTHON"
    return
  fi
  bootstrap_venv "$what"
}
