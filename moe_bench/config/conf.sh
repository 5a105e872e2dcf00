# shellcheck shell=bash disable=SC2016
# Sources the .conf files given as arguments, in order, in this one shell, and writes to descriptor MOE_BENCH_CONF_FD what
# they did, as NUL-ended fields: F file (begins), C file line command (about to run), D name value (what the command would
# have set had the caller not), V name value exported (after a file), E (file done). Values are written, never expanded again.
__mb_out="$MOE_BENCH_CONF_FD"
__mb_given=" $MOE_BENCH_CONF_GIVEN "
unset MOE_BENCH_CONF_FD MOE_BENCH_CONF_GIVEN
set -euo pipefail

__mb_note() { # before each simple command of a .conf: where it stands, and the default it would have used
  printf 'C\0%s\0%s\0%s\0' "$2" "$3" "$1" >&"$__mb_out"
  local __mb_name="${1#: }" __mb_rest __mb_default="" __mb_none="" __mb_flags
  __mb_name="${__mb_name#export }"
  if [[ "$1" == 'export "${'*'}='* && "$1" != *'`'* && "$1" != *'$('[!\(]* ]]; then # export "${NAMES[i]}=${!NAMES[i]:-default}"
    __mb_rest="${1#*\}=}"
    __mb_name="${1#'export "'}"
    eval "__mb_name=\"${__mb_name%%=*}\""
    printf 'A\0%s\0' "$__mb_name" >&"$__mb_out"
    [[ "$__mb_rest" != '${!'*':-'* ]] || __mb_name="$__mb_name=\"\${$__mb_name:-${__mb_rest#*:-}"
  fi
  if [[ "$__mb_name" == [\"]* || "$__mb_name" == '${'* ]]; then # : "${NAME:=default}"
    __mb_rest="${__mb_name#\"}"
    __mb_rest="${__mb_rest%\"}"
    __mb_name="${__mb_rest#'${'}"
    __mb_name="${__mb_name%%:=*}"
    __mb_rest="${__mb_rest/:=/:-}"
  else
    __mb_rest="${__mb_name#*=}"
    __mb_name="${__mb_name%%=*}"
  fi
  [[ "$__mb_given" == *" $__mb_name "* ]] || return 0
  case "$__mb_rest" in
    *'`'* | *'$('[!\(]* | *'<('* | *':?'* | *':='* | *'++'* | *'--'* | *$'\n'*) return 0 ;; # would do more than read
    '${'"$__mb_name"':-'*) __mb_rest="\${__mb_none:-${__mb_rest#'${'"$__mb_name"':-'}" ;;
    '"${'"$__mb_name"':-'*) __mb_rest="\"\${__mb_none:-${__mb_rest#'"${'"$__mb_name"':-'}" ;;
    *) return 0 ;;
  esac
  __mb_flags="$-"
  set +eu
  eval "__mb_default=$__mb_rest" 2>/dev/null
  [[ "$__mb_flags" != *e* ]] || set -e
  [[ "$__mb_flags" != *u* ]] || set -u
  printf 'D\0%s\0%s\0' "$__mb_name" "$__mb_default" >&"$__mb_out"
}

__mb_dump() { # every scalar variable and whether it is exported
  local __mb_name __mb_exported
  __mb_exported=" $(compgen -e | tr '\n' ' ') "
  for __mb_name in $(compgen -v); do
    case "$__mb_name" in __mb_* | BASH* | FUNCNAME | DIRSTACK | GROUPS | PIPESTATUS | LINENO | RANDOM | SRANDOM | SECONDS | EPOCH* | _) continue ;; esac
    if [[ -n "${!__mb_name+set}" ]]; then
      if [[ "$__mb_exported" == *" $__mb_name "* ]]; then
        printf 'V\0%s\0%s\0001\0' "$__mb_name" "${!__mb_name}" >&"$__mb_out"
      else
        printf 'V\0%s\0%s\0000\0' "$__mb_name" "${!__mb_name}" >&"$__mb_out"
      fi
    fi
  done
}

for __mb_file in "$@"; do
  printf 'F\0%s\0' "$__mb_file" >&"$__mb_out"
  set -T
  trap '__mb_note "$BASH_COMMAND" "${BASH_SOURCE[0]}" "$LINENO"' DEBUG
  # shellcheck disable=SC1090 # the user's file
  source "$__mb_file"
  trap - DEBUG
  set +T
  set -euo pipefail
  IFS=$' \t\n'
  __mb_dump
  printf 'E\0' >&"$__mb_out"
done
