#!/usr/bin/env bash
# One training run on a Cloud TPU, on all of its hosts; see README.md beside this file.
set -euo pipefail

usage() {
  cat >&2 <<'END'
usage: ZONE=us-central1-a TYPE=v5litepod-8 experiments/tpu/tpu.sh [--dry-run] COMMAND NAME [...]

  create NAME               ask for a TPU, and wait until it is there
  setup NAME                bring this commit and its packages to every host
  run NAME FLAG ...         train with these flags on all hosts, in the background
  follow NAME               show what the first host prints
  status NAME               say running, or the exit status, of each host
  fetch NAME FROM TO        copy a run's directory (gs://..., or one on the first host) to this machine
  delete NAME               give the TPU back
  keep NAME FLAG ...        create, setup, run; again after each preemption, until the run ends; then delete

ZONE, TYPE      where, and which: gcloud compute tpus accelerator-types list --zone=ZONE
VERSION         of the TPU's software (default: the one of TYPE)
SPOT=1          take a preemptible TPU
PROJECT         of Google Cloud (default: gcloud's own)
EVERY=60        seconds between two looks at it
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

# Its arguments as they could be pasted.
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

# Runs a command and gives its answer, "" where it fails; a dry run prints it, and gives the first argument.
ask() {
  local instead=$1
  shift
  if [ -n "$dry" ]; then
    do_it "$@" >&2
    echo "$instead"
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
      echo "tpu.sh: TYPE=${TYPE:-} is none of v4-N, v5litepod-N, v5p-N, v6e-N: set VERSION, too" >&2
      exit 2
      ;;
    *) echo "$VERSION" ;;
  esac
}

state() {
  ask ACTIVE gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)"
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
        say "it is $now"
        return 1
        ;;
    esac
    say "waiting, it is ${now:-not there yet}"
    pause
  done
}

setup() {
  local archive=mmfusion.tar.gz folder commit
  folder=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel) || return
  commit=$(git -C "$folder" rev-parse HEAD) || return
  if [ -n "$(git -C "$folder" status --porcelain)" ]; then
    say "changes that are not committed stay here: $commit is sent"
  fi
  do_it git -C "$folder" archive "--output=${TMPDIR:-/tmp}/$archive" --format=tar.gz \
    "--add-virtual-file=COMMIT:$commit" HEAD || return # results say of which commit they are
  do_it gcloud compute tpus tpu-vm scp "${TMPDIR:-/tmp}/$archive" "$name:" "${where[@]}" --worker=all || return
  # The hosts' own Python may be older than 3.11.
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

ended() {
  ask 0 gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 "--command=cat mmfusion/status"
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

# What it costs otherwise is worth some patience.
give_back() {
  local tries
  for tries in 1 2 3 4 5; do
    delete && return
    [ "$tries" -eq 5 ] || pause
  done
  say "it could not be given back and costs: delete it"
  return 1
}

# What cannot be begun now is tried again at the next look, which finds the same status.
go_on() { run "$@" || say "it could not be begun now"; }

keep() {
  case " $* " in
    *" --workdir=gs://"*) ;;
    *)
      echo "tpu.sh: keep needs --workdir=gs://BUCKET/DIR: a TPU's own disk is lost with it" >&2
      exit 2
      ;;
  esac
  local failed=0 unknown=0 lost=0 stopped=0 now
  while true; do
    if ! { create && setup && run "$@"; }; then
      delete || true
      if [ "$((failed += 1))" -ge 5 ]; then
        say "could not be begun, $failed times in a row: see above what is wrong"
        return 1
      fi
      say "could not be begun, another one is asked for"
      pause
      continue
    fi
    failed=0
    while pause; do
      now=$(state)
      case "$now" in
        ACTIVE) unknown=0 ;;
        "") # nothing could be asked for a moment, or it is no more
          [ "$((unknown += 1))" -lt 10 ] || break
          continue
          ;;
        *) break ;;
      esac
      case "$(ended)" in
        "") ;; # still running, or not to be asked for a moment
        0)
          give_back
          return
          ;;
        75 | 143) # it was stopped, and with 143 before it could hear of that; or the bucket was away
          if [ "$((stopped += 1))" -ge 100 ]; then
            say "it was stopped $stopped times; the TPU is still there: look, then delete it"
            return 1
          fi
          say "it was stopped, it goes on from its newest checkpoint"
          go_on "$@"
          ;;
        134 | 137) # another host was lost, without which this one cannot go on, or this process was killed
          if [ "$((lost += 1))" -ge 10 ]; then
            say "a host was lost $lost times; the TPU is still there: look, then delete it"
            return 1
          fi
          say "a host was lost, it goes on from its newest checkpoint"
          go_on "$@"
          ;;
        *)
          on_hosts 0 "tail -n 30 mmfusion/run.log" || true
          say "the run failed; the TPU is still there: look, then delete it"
          return 1
          ;;
      esac
    done
    say "it is ${now:-gone}, another one is asked for"
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
