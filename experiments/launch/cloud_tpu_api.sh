# shellcheck shell=bash disable=SC2154  # read by train_tpu.sh, which sets name, where and dry
# Requests of the Cloud TPU API (gcloud compute tpus), which gets fixes only: TPU v4 to v6e.

check_type() {
  [ -z "${TOPOLOGY:-}" ] || refuse "TOPOLOGY goes with a machine type, TYPE=$TYPE already says how many chips"
  case "$TYPE" in
    v[7-9]*) refuse "TYPE=${TYPE@Q}: the Cloud TPU API ends at v6e; use a machine type, such as tpu7x-standard-4t" ;;
  esac
  [[ "$TYPE" =~ ^[a-z0-9]+-[1-9][0-9]{0,4}$ ]] || refuse "TYPE=${TYPE@Q}: expected an accelerator type, such as v5litepod-8"
  version > /dev/null
}

version() {
  case "${VERSION:-}:$TYPE" in
    :v4-*) echo tpu-ubuntu2204-base ;;
    :v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    :v5p-*) echo v2-alpha-tpuv5 ;;
    :v6e-*) echo v2-alpha-tpuv6e ;;
    :*) refuse "TYPE=$TYPE is not one of v4-N, v5litepod-N, v5p-N, v6e-N: set VERSION too" ;;
    *) echo "$VERSION" ;;
  esac
}

request_tpu() {
  local software more=()
  software=$(version) || return
  if [ -n "${SPOT:-}" ]; then
    more+=(--spot)
  fi
  request gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" \
    "--accelerator-type=$TYPE" "--runtime-version=$software" "${more[@]}"
}

# Prints the state; fails where it cannot be read.
state() {
  query ACTIVE gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)"
}

# Prints the name of the request if there is one; fails where that cannot be known.
listed() {
  query "" gcloud compute tpus queued-resources list "${where[@]}" "--filter=name~/$name\$" "--format=value(name)"
}

on_hosts() { # all|first COMMAND
  local worker=$1
  [ "$worker" = all ] || worker=0
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$worker" "--command=$2"
}

copy_to_hosts() { do_it gcloud compute tpus tpu-vm scp "$1" "$name:" "${where[@]}" --worker=all; }

fetch_from_host() { do_it gcloud compute tpus tpu-vm scp --recurse "$name:$1" "$2" "${where[@]}" --worker=0; }

# Prints the exit status of the run, nothing while it runs.
exit_status() {
  query 0 gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 "--command=cat mmfusion/status"
}

delete() { do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }
