# shellcheck shell=bash disable=SC2034,SC2154  # read by train_tpu.sh
# The loop of `train_tpu.sh keep`. A TPU that nobody watches costs money, so it is deleted however the loop ends, and a
# script that deletes it lies on the disk for as long as it may exist: also after a kill -9 or a power failure.

files=${XDG_STATE_HOME:-${HOME:?must be set}/.local/state}/mmfusion
delete_file=$files/delete-tpu-$name.sh
log_file=$files/tpu-$name.log
answer_file=$files/tpu-$name.answer
requested="" # whether a TPU may exist

keep_until_done() {
  if [ -z "$dry" ]; then
    claim_name
    background=1
    trap ended EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
  fi
  keep_running "$@" || return
  [ -z "$dry" ] || delete
}

# Refuses a name that another TPU has, which this command would delete; leaves the script that deletes ours.
claim_name() {
  mkdir -p "$files" || refuse "no folder $files for the script that deletes the TPU"
  local found
  found=$(listed) || {
    say "could not be looked up: see the error above"
    exit 1
  }
  if [ -n "$found" ]; then
    say "exists already: choose another name, or delete it:"
    delete_commands >&2
    exit 2
  fi
  (
    set -o noclobber # in one step, so that two of this command cannot share a name
    printf '#!/usr/bin/env bash\n# Deletes the TPU %s; then remove this file.\n' "$name" > "$delete_file"
  ) 2> /dev/null || {
    [ -e "$delete_file" ] || refuse "$delete_file cannot be written: it would delete the TPU"
    refuse "$delete_file exists: another keep of $name is running; if none is, remove that file"
  }
  delete_commands >> "$delete_file"
}

# Deletes the TPU and ends; a second signal must not leave it behind.
ended() {
  local status=$?
  trap '' HUP INT TERM PIPE
  trap - EXIT
  local running
  running=$(jobs -p)
  if [ -n "$running" ]; then
    # A request ignores this, and is waited for; a process that has just been forked can miss it.
    # shellcheck disable=SC2086
    (while kill $running; do sleep 0.2; done) > /dev/null 2>&1 &
    wait
  fi
  if [ -z "$requested" ] || remove; then
    rm -f "$delete_file" "$answer_file"
  else
    status=1
    say "COULD NOT BE DELETED AND STILL COSTS MONEY. Run this (it is also in $delete_file):"
    delete_commands >&2
  fi
  exit "$status"
}

# Deletes the TPU, in five tries; done if Google accepts it, or knows of no such TPU.
remove() {
  local tries
  say "deleting it"
  for tries in 1 2 3 4 5; do
    if delete || is_gone; then
      requested=""
      return 0 # a bare return in a trap has the status from before the trap
    fi
    [ "$tries" -eq 5 ] || pause
  done
  return 1
}

is_gone() {
  local found
  found=$(listed) && [ -z "$found" ]
}

start() {
  requested=1
  create && setup && run "$@"
}

# Trains until the run ends, and returns its exit status, or 1 where it cannot be run.
keep_running() {
  local failed=0 ended=""
  while true; do
    if start "$@"; then
      failed=0
      watch_run "$@"
      [ -z "$ended" ] || return "$ended"
      say "requesting another TPU"
    else
      if [ "$((failed += 1))" -ge 5 ]; then
        say "could not be started, $failed times in a row: see the errors above"
        return 1
      fi
      say "could not be started, requesting another TPU"
    fi
    remove || return 1
    pause
  done
}

# A run that cannot be started now is started at the next poll, which finds the same status.
resume() { run "$@" || say "could not be started now"; }

# Waits until the run ends and sets `ended` to its exit status, or until the TPU is lost; resumes a run that was stopped.
watch_run() {
  local unknown=0 lost=0 stopped=0
  while pause; do
    ask state
    case "$answer" in
      ACTIVE) unknown=0 ;;
      "") # a failed query, or the TPU no longer exists
        [ "$((unknown += 1))" -lt 10 ] || return 0
        continue
        ;;
      *)
        say "state $answer"
        return 0
        ;;
    esac
    ask exit_status 2> /dev/null # an error of ssh while there is no status yet
    case "$answer" in
      "") ;; # still running, or a failed query
      75 | 143) # stopped (143: before the signal handler was set), or the bucket was unreachable
        if [ "$((stopped += 1))" -ge 100 ]; then
          say "stopped $stopped times"
          ended=75
          return
        fi
        say "stopped, resuming from the newest checkpoint"
        resume "$@"
        ;;
      134 | 137) # another host was lost, or this process was killed
        if [ "$((lost += 1))" -ge 10 ]; then
          say "a host was lost $lost times"
          ended=75
          return
        fi
        say "a host was lost, resuming from the newest checkpoint"
        resume "$@"
        ;;
      *) run_ended "$answer" && return ;;
    esac
  done
}

run_ended() { # STATUS
  [[ "$1" =~ ^[0-9]{1,3}$ ]] || return # not yet written
  ended=$1
  if [ "$ended" -ne 0 ] && [ -z "$dry" ]; then
    say "the run failed with exit status $ended; its last lines, of which $log_file has more:"
    on_hosts first "tail -n 1000 mmfusion/run.log" > "$log_file" || true
    tail -n 30 "$log_file" >&2
  fi
}
