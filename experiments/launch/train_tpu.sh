#!/usr/bin/env bash
# Runs one training run on all hosts of a Cloud TPU; see README.md in this folder.
set -euo pipefail

usage() {
  cat >&2 <<'END'
usage: ZONE=us-central1-a TYPE=v5litepod-8 experiments/launch/train_tpu.sh [--dry-run] COMMAND NAME [...]

  create NAME               request a TPU, and wait until it is active
  setup NAME                copy this commit to every host and install its packages
  run NAME FLAG ...         train with these flags on all hosts, in the background
  follow NAME               show the output of the first host
  status NAME               print "running" or the exit status of each host
  fetch NAME FROM TO        copy a run's directory (gs://..., or on the first host) to this machine
  delete NAME               delete the TPU
  keep NAME FLAG ...        create, setup, run, again after each preemption until the run ends; then delete

ZONE, TYPE      zone and accelerator type: gcloud compute tpus accelerator-types list --zone=ZONE
VERSION         TPU software version (default: chosen by TYPE)
SPOT=1          request a preemptible TPU
PROJECT         Google Cloud project (default: gcloud's own)
EVERY=60        seconds between two polls of its state
END
  exit 2
}

dry=""
if [ "${1:-}" = "--dry-run" ]; then
  dry=1
  shift
fi
[ "$#" -ge 2 ] && [ -n "${ZONE:-}" ] || usage
command=$1 name=$2
shift 2

where=("--zone=$ZONE")
if [ -n "${PROJECT:-}" ]; then
  where+=("--project=$PROJECT")
fi

say() { echo "tpu $name: $*" >&2; }

pause() { [ -n "$dry" ] || sleep "${EVERY:-60}"; }

# Prints its arguments quoted for a shell.
quoted() {
  local word line=""
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_./:=@%+,-]*) word=${word@Q} ;;
    esac
    line+="$word "
  done
  echo "${line% }"
}

# Runs a command, or prints it.
do_it() {
  if [ -n "$dry" ]; then
    quoted "$@"
  else
    "$@"
  fi
}

# Runs a command and prints its output, "" on failure; a dry run prints the command, and returns the first argument.
query() {
  local dry_answer=$1
  shift
  if [ -n "$dry" ]; then
    do_it "$@" >&2
    echo "$dry_answer"
  else
    "$@" 2>/dev/null || true
  fi
}

version() {
  case "${VERSION:-}:${TYPE:-}" in
    :v4-*) echo tpu-ubuntu2204-base ;;
    :v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    :v5p-*) echo v2-alpha-tpuv5 ;;
    :v6e-*) echo v2-alpha-tpuv6e ;;
    :*)
      echo "train_tpu.sh: TYPE=${TYPE:-} is not one of v4-N, v5litepod-N, v5p-N, v6e-N: set VERSION too" >&2
      exit 2
      ;;
    *) echo "$VERSION" ;;
  esac
}

state() {
  query ACTIVE gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)"
}

on_hosts() { # WORKER COMMAND
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

create() {
  local software more=()
  software=$(version) || return
  if [ -n "${SPOT:-}" ]; then
    more+=(--spot)
  fi
  do_it gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" \
    "--accelerator-type=$TYPE" "--runtime-version=$software" "${more[@]}" || return
  local now
  while now=$(state); [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED | SUSPENDED)
        say "state $now"
        return 1
        ;;
    esac
    say "waiting, state ${now:-unknown}"
    pause
  done
}

setup() {
  local archive=mmfusion.tar.gz folder commit
  folder=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel) || return
  commit=$(git -C "$folder" rev-parse HEAD) || return
  if [ -n "$(git -C "$folder" status --porcelain)" ]; then
    say "uncommitted changes are not copied: sending $commit"
  fi
  do_it git -C "$folder" archive "--output=${TMPDIR:-/tmp}/$archive" --format=tar.gz \
    "--add-virtual-file=COMMIT:$commit" HEAD || return # results record the commit
  do_it gcloud compute tpus tpu-vm scp "${TMPDIR:-/tmp}/$archive" "$name:" "${where[@]}" --worker=all || return
  # The hosts' Python may be older than 3.11.
  on_hosts all "mkdir -p mmfusion && tar xzf $archive -C mmfusion && cd mmfusion && python3 -m pip install --user uv && \
python3 -m uv venv --clear --python 3.12 env && python3 -m uv pip install --python env/bin/python -r requirements.txt \
\"jax[tpu]==\$(sed -n 's/^jax==//p' requirements.txt)\" gcsfs"
}

run() {
  local line
  line="$(quoted env/bin/python -m experiments.train --distributed=auto "$@") > run.log 2>&1; echo \$? > status"
  on_hosts all "cd mmfusion && rm -f status && { nohup bash -c ${line@Q} > /dev/null 2>&1 < /dev/null & }"
}

status() { on_hosts all "cat mmfusion/status 2> /dev/null || echo running"; }

follow() { on_hosts 0 "tail -n 100 -F mmfusion/run.log"; }

exit_status() {
  query 0 gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 "--command=cat mmfusion/status"
}

fetch() {
  case "$1" in
    gs://*) do_it gcloud storage cp --recursive "$1" "$2" ;;
    *) do_it gcloud compute tpus tpu-vm scp --recurse "$name:$1" "$2" "${where[@]}" --worker=0 ;;
  esac
}

delete() {
  do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Retries: a TPU that is not deleted keeps costing money.
delete_with_retries() {
  local tries
  for tries in 1 2 3 4 5; do
    delete && return
    [ "$tries" -eq 5 ] || pause
  done
  say "could not be deleted and still costs money: delete it"
  return 1
}

# A run that cannot be started now is retried at the next poll, which finds the same status.
resume() { run "$@" || say "could not be started now"; }

keep() {
  case " $* " in
    *" --workdir=gs://"*) ;;
    *)
      echo "train_tpu.sh: keep needs --workdir=gs://BUCKET/DIR: the TPU's own disk is lost with the TPU" >&2
      exit 2
      ;;
  esac
  local failed=0 unknown=0 lost=0 stopped=0 now
  while true; do
    if ! { create && setup && run "$@"; }; then
      delete || true
      if [ "$((failed += 1))" -ge 5 ]; then
        say "could not be started, $failed times in a row: see the errors above"
        return 1
      fi
      say "could not be started, requesting another TPU"
      pause
      continue
    fi
    failed=0
    while pause; do
      now=$(state)
      case "$now" in
        ACTIVE) unknown=0 ;;
        "") # a failed query, or the TPU no longer exists
          [ "$((unknown += 1))" -lt 10 ] || break
          continue
          ;;
        *) break ;;
      esac
      case "$(exit_status)" in
        "") ;; # still running, or a failed query
        0)
          delete_with_retries
          return
          ;;
        75 | 143) # stopped (143: before the signal handler was set), or the bucket was unreachable
          if [ "$((stopped += 1))" -ge 100 ]; then
            say "stopped $stopped times; the TPU still exists: inspect it, then delete it"
            return 1
          fi
          say "stopped, resuming from the newest checkpoint"
          resume "$@"
          ;;
        134 | 137) # another host was lost, or this process was killed
          if [ "$((lost += 1))" -ge 10 ]; then
            say "a host was lost $lost times; the TPU still exists: inspect it, then delete it"
            return 1
          fi
          say "a host was lost, resuming from the newest checkpoint"
          resume "$@"
          ;;
        *)
          on_hosts 0 "tail -n 30 mmfusion/run.log" || true
          say "the run failed; the TPU still exists: inspect it, then delete it"
          return 1
          ;;
      esac
    done
    say "state ${now:-gone}, requesting another TPU"
    unknown=0
    delete || true
  done
}

case "$command" in
  create | setup | status | follow | delete) [ "$#" -eq 0 ] || usage ;;
  run | keep) [ "$#" -ge 1 ] || usage ;;
  fetch) [ "$#" -eq 2 ] || usage ;;
  *) usage ;;
esac
if [ "$command" = create ] || [ "$command" = keep ]; then
  [ -n "${TYPE:-}" ] || usage
  version > /dev/null
fi
"$command" "$@"
