# shellcheck shell=bash disable=SC2016
# Sources the .conf files given as arguments, in order, once for each environment of MOE_BENCH_CONF_INPUT, each time in a
# subshell of its own (far cheaper than a new bash), and writes to descriptor MOE_BENCH_CONF_FD what they did, as
# NUL-ended fields: P (an environment begins), F file (begins), C file line command (about to run), A name (the name it
# assigns), D name value (what the command would have set had the caller not), V declarations (after a file: all variables,
# as `declare -p` writes them), E (file done), X status (the subshell has ended). Values are written, never expanded again.
# The input: for each environment whether A and D are wanted (1 or 0: they are most of the work), the names that the caller
# gave, the number of variables that differ from this process's own, and those as name and value. What the files say goes to standard output, each time after a NUL.
__mb_out="$MOE_BENCH_CONF_FD"
mapfile -d '' -t __mb_input <&"$MOE_BENCH_CONF_INPUT"
unset MOE_BENCH_CONF_FD MOE_BENCH_CONF_INPUT
set -uo pipefail

__mb_note() { # before a simple command of a .conf: the default it would have used, where the caller gave a value
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

# Before each simple command: where it stands. What begins with these words assigns in none of the ways that __mb_note knows.
__mb_trap='printf "C\0%s\0%s\0%s\0" "${BASH_SOURCE[0]}" "$LINENO" "$BASH_COMMAND" >&"$__mb_out"
case "$BASH_COMMAND" in
  "declare "* | "local "* | "for "* | "case "* | "read "* | "source "* | "[["* | "(("*) ;;
  *) __mb_note "$BASH_COMMAND" ;;
esac'

# The same without A and D, written when the file is done.
__mb_short_trap='__mb_commands+=("${BASH_SOURCE[0]}" "$LINENO" "$BASH_COMMAND")'

__mb_at=0
while ((__mb_at < ${#__mb_input[@]})); do
  printf 'P\0' >&"$__mb_out"
  printf '\0'
  (
    [[ "${__mb_input[__mb_at]}" == 1 ]] || __mb_trap="$__mb_short_trap"
    __mb_given=" ${__mb_input[__mb_at + 1]} "
    for ((__mb_i = __mb_at + 3; __mb_i < __mb_at + 3 + 2 * __mb_input[__mb_at + 2]; __mb_i += 2)); do
      export "${__mb_input[__mb_i]}=${__mb_input[__mb_i + 1]}"
    done
    unset __mb_input
    set -e
    for __mb_file in "$@"; do
      printf 'F\0%s\0' "$__mb_file" >&"$__mb_out"
      __mb_commands=()
      set -T
      # shellcheck disable=SC2064 # expanded now: the trap's text
      trap "$__mb_trap" DEBUG
      # shellcheck disable=SC1090 # the user's file
      source "$__mb_file"
      trap - DEBUG
      set +T
      set -euo pipefail
      IFS=$' \t\n'
      ((${#__mb_commands[@]} == 0)) || printf 'C\0%s\0%s\0%s\0' "${__mb_commands[@]}" >&"$__mb_out"
      __mb_commands=()
      printf 'V\0' >&"$__mb_out"
      declare -p >&"$__mb_out"
      printf '\0E\0' >&"$__mb_out"
    done
  )
  printf 'X\0%s\0' "$?" >&"$__mb_out" # not `( ... ) ||`: that would switch errexit off within
  __mb_at=$((__mb_at + 3 + 2 * __mb_input[__mb_at + 2]))
done
