#!/usr/bin/env bash
# Runs one training run on all hosts of a TPU, through preemptions; see README.md in this folder.
# compute_engine.sh and cloud_tpu_api.sh have the requests of the two ways to get a TPU.
set -euo pipefail

usage() {
  cat >&2 <<'END'
usage: ZONE=us-east5-b TYPE=ct6e-standard-8t experiments/launch/train_tpu.sh [--dry-run] COMMAND NAME [...]

  create NAME               request a TPU, and wait until it is active
  setup NAME                copy this commit to every host and install its packages
  run NAME FLAG ...         train with these flags on all hosts, in the background
  ablate NAME FLAG ...      run an ablation with these flags, likewise (ablate_tpu.sh: on several TPUs)
  follow NAME               show the output of the first host
  status NAME               print "running" or the exit status of each host
  fetch NAME FROM TO        copy a run's directory (gs://..., or on the first host) to this machine
  delete NAME               delete the TPU
  keep NAME FLAG ...        create, setup, run, again after each preemption until the run ends; delete the TPU however it ends

TYPE            a machine type of Compute Engine: ct5p-hightpu-Nt, ct6e-standard-Nt, tpu7x-standard-4t,
                or an accelerator type of the older Cloud TPU API: v4-N, v5litepod-N, v5p-N, v6e-N
TOPOLOGY        with a machine type: the chips of several hosts, as 4x4 or 2x2x2 (default: one host)
ZONE            where: gcloud compute machine-types list --filter=name=TYPE, or
                gcloud compute tpus accelerator-types list --zone=ZONE
VERSION         image family, or TPU software version of the Cloud TPU API (default: chosen by TYPE)
SPOT=1          request a preemptible TPU
PROJECT         Google Cloud project (default: gcloud's own)
EVERY=60        seconds between two polls of its state
END
  exit 2
}

refuse() {
  echo "train_tpu.sh: $*" >&2
  exit 2
}

dry=""
if [ "${1:-}" = "--dry-run" ]; then
  dry=1
  shift
fi
[ "$#" -ge 2 ] && [ -n "${ZONE:-}" ] && [ -n "${TYPE:-}" ] || usage
command=$1 name=$2
shift 2
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  refuse "NAME=${name@Q}: at most 40 lower-case letters, digits and hyphens, beginning with a letter"
[[ "$ZONE" =~ ^[a-z][a-z0-9-]*$ ]] || refuse "ZONE=${ZONE@Q}: expected a zone, such as us-central1-a"
[[ "${EVERY:-60}" =~ ^[0-9]{1,6}$ ]] || refuse "EVERY=${EVERY@Q}: expected a number of seconds"

project=()
if [ -n "${PROJECT:-}" ]; then
  project=("--project=$PROJECT")
fi
where=("--zone=$ZONE" "${project[@]}")
folder=$(dirname "${BASH_SOURCE[0]}")

say() { echo "tpu $name: $*" >&2; }

# Prints its arguments quoted for bash.
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

background="" # set by keep, which must hear of signals while a command runs

# Runs a command, or prints it.
do_it() {
  if [ -n "$dry" ]; then
    quoted "$@"
  elif [ -z "$background" ]; then
    "$@"
  else
    "$@" < /dev/null &
    wait "$!"
  fi
}

# Runs a request that no signal interrupts: one that is cut off may have been granted.
request() {
  if [ -n "$dry" ]; then
    quoted "$@"
  elif [ -n "$background" ]; then
    do_it uninterrupted "$@"
  else
    (uninterrupted "$@")
  fi
}

uninterrupted() {
  trap '' HUP INT TERM
  exec "$@"
}

# Runs a command and prints its output; a dry run prints the command, and returns the first argument.
query() {
  local dry_answer=$1
  shift
  if [ -n "$dry" ]; then
    quoted "$@" >&2
    echo "$dry_answer"
  else
    "$@"
  fi
}

# Sets `answer` to the output of a function, "" where it fails.
ask() {
  if [ -z "$background" ]; then
    answer=$("$@") || answer=""
  elif do_it "$@" > "$answer_file"; then
    answer=$(< "$answer_file")
  else
    answer=""
  fi
}

pause() { [ -n "$dry" ] || do_it sleep "${EVERY:-60}"; }

if [[ "$TYPE" == [a-u]* ]]; then
  # shellcheck source=experiments/launch/compute_engine.sh
  source "$folder/compute_engine.sh"
else
  # shellcheck source=experiments/launch/cloud_tpu_api.sh
  source "$folder/cloud_tpu_api.sh"
fi

create() {
  request_tpu || return
  local unknown=0
  while ask state; [ "$answer" != ACTIVE ]; do
    case "$answer" in
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        say "state $answer"
        return 1
        ;;
      "")
        if [ "$((unknown += 1))" -ge 10 ]; then
          say "its state could not be read, $unknown times in a row: see the errors above"
          return 1
        fi
        ;;
      *) unknown=0 ;;
    esac
    say "waiting, state ${answer:-unknown}"
    pause
  done
}

setup() {
  local archive=mmfusion-$name.tar.gz root commit tries=0
  root=$(git -C "$folder" rev-parse --show-toplevel) || return
  commit=$(git -C "$root" rev-parse HEAD) || return
  if [ -n "$(git -C "$root" status --porcelain)" ]; then
    say "uncommitted changes are not copied: sending $commit"
  fi
  do_it git -C "$root" archive "--output=${TMPDIR:-/tmp}/$archive" --format=tar.gz \
    "--add-virtual-file=COMMIT:$commit" HEAD || return # results record the commit
  until copy_to_hosts "${TMPDIR:-/tmp}/$archive"; do # a host that has just started may refuse connections
    [ "$((tries += 1))" -lt 5 ] || return 1
    pause
  done
  # The hosts' Python may be older than 3.11, without pip, or its packages those of the system.
  on_hosts all "mkdir -p mmfusion && tar xzf $archive -C mmfusion && cd mmfusion && \
{ python3 -m pip --version || { sudo apt-get update && sudo apt-get install --yes python3-pip; }; } && \
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user uv && \
python3 -m uv venv --clear --python 3.12 env && python3 -m uv pip install --python env/bin/python -r requirements.txt \
\"jax[tpu]==\$(sed -n 's/^jax==//p' requirements.txt)\" gcsfs"
}

run() { launch experiments.train --distributed=auto "$@"; }

ablate() { launch experiments.ablate "$@"; }

launch() { # MODULE FLAG ...
  local line
  line="$(quoted env/bin/python -m "$@") > run.log 2>&1; echo \$? > status"
  on_hosts all "cd mmfusion && rm -f status && { nohup bash -c ${line@Q} > /dev/null 2>&1 < /dev/null & }"
}

status() { on_hosts all "cat mmfusion/status 2> /dev/null || echo running"; }

follow() { on_hosts first "tail -n 100 -F mmfusion/run.log"; }

fetch() {
  case "$1" in
    gs://*) do_it gcloud storage cp --recursive "$1" "$2" ;;
    *) fetch_from_host "$1" "$2" ;;
  esac
}

# Prints the commands that delete the TPU.
delete_commands() {
  local dry=1
  delete
}

keep() {
  case " $* " in
    *" --workdir=gs://"*) ;;
    *) refuse "keep needs --workdir=gs://BUCKET/DIR: the TPU's own disk is lost with the TPU" ;;
  esac
  # shellcheck source=experiments/launch/keep_tpu.sh
  source "$folder/keep_tpu.sh"
  keep_until_done "$@"
}

case "$command" in
  create | setup | status | follow | delete) [ "$#" -eq 0 ] || usage ;;
  run | ablate | keep) [ "$#" -ge 1 ] || usage ;;
  fetch) [ "$#" -eq 2 ] || usage ;;
  *) usage ;;
esac
check_type
if [ "$command" = create ]; then
  trap 'say "not active, but it may exist and cost money; this deletes it:" && delete_commands >&2' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  create
  trap - EXIT
else
  "$command" "$@"
fi
