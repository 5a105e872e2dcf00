# shellcheck shell=bash
# Finds or makes the Python that runs moe_bench; sourced by the shell entry points, never run.
# bootstrap WHAT: WHAT is train, dev or login (a file under locks/), or gpu: train's Python where one is ready, else dev's.
# Sets PYTHON. A ready environment is used and never changed: MOE_BENCH_PYTHON's, or the python3 on PATH when it has torch
# and megatron-core or Transformer Engine (an NGC container). What it lacks goes to .deps beside it.

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

bootstrap_is_ready() { # bootstrap_is_ready PYTHON: it has a torch that somebody chose for this machine
  bootstrap_has -I "$1" torch megatron.core || bootstrap_has -I "$1" torch transformer_engine
}

bootstrap_overlay() { # bootstrap_overlay WHAT PYTHON: put what a ready environment lacks beside the project, not into it
  local what="$1" python="$2" deps="$WORKSPACE/.deps"
  export PYTHONPATH="$deps${PYTHONPATH:+:$PYTHONPATH}"
  # shellcheck disable=SC2086 # a list of words
  if ! bootstrap_has "$python" $bootstrap_light_modules; then
    echo "moe_bench: adding click, jinja2, msgspec, rich, pyyaml for $python to $deps (the environment itself is left alone)" >&2
    bootstrap_add "$python" "$deps" login.txt
  fi
  if [[ "$what" == login || -n "${MEGATRON_PATH:-}" ]] || ! bootstrap_has "$python" torch || bootstrap_has "$python" megatron.training; then return 0; fi
  echo "moe_bench: $python has torch and no megatron-core with megatron.training; adding it and its needs, without torch, to $deps" >&2
  bootstrap_add "$python" "$deps" container.txt --no-deps
}

bootstrap_add() { # bootstrap_add PYTHON FOLDER LOCK [OPTION...]; a container's constraints are on the environment, which is left alone
  local python="$1" folder="$2" lock="$WORKSPACE/locks/$3" uv; shift 3
  uv="$(command -v uv || true)"
  if bootstrap_has "$python" pip; then
    env -u PIP_CONSTRAINT "$python" -m pip install --quiet --disable-pip-version-check --require-hashes --upgrade --target "$folder" -r "$lock" "$@"
  elif [[ -n "$uv" ]]; then
    "$uv" pip install --quiet --python "$python" --require-hashes --target "$folder" -r "$lock" "$@"
  else
    echo "error: $python has no pip, and there is no uv on PATH, to install $lock into $folder; install either" >&2
    return 2
  fi
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
    env -u PIP_CONSTRAINT "$PYTHON" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$WORKSPACE/locks/uv.txt"
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
    if ! bootstrap_has "$PYTHON"; then
      echo "error: MOE_BENCH_PYTHON=$PYTHON (environment) runs no Python >= 3.12; name one that does, or unset it" >&2
      return 2
    fi
    bootstrap_overlay "$what" "$PYTHON"
    return
  fi
  current="$(command -v python3 || command -v python || true)"
  if [[ "$what" != dev && -n "$current" && "$current" != "$WORKSPACE/.venv/"* ]] && bootstrap_is_ready "$current"; then
    PYTHON="$current"
    bootstrap_overlay "$what" "$PYTHON"
    return
  fi
  if [[ "$what" == gpu ]]; then what=dev; fi
  bootstrap_venv "$what"
}
