# shellcheck shell=bash disable=SC2154  # read by train_tpu.sh, which sets name, where, project and dry
# Requests of Compute Engine, the way to TPU v5p, v6e, 7x and later: a managed instance group whose template says which
# machine (and whether spot), and for several hosts a workload policy that says how their chips are connected.

check_type() {
  local one total=1 chips
  case "$TYPE" in
    ct4p-* | ct5l*) refuse "TYPE=${TYPE@Q}: v4 and v5e are served by GKE and, as v4-N and v5litepod-N, by the Cloud TPU API" ;;
    tpu7x-[0-9]*) refuse "TYPE=${TYPE@Q}: expected a machine type, such as tpu7x-standard-4t" ;;
  esac
  [[ "$TYPE" =~ ^[a-z0-9]+-[a-z]+-([1-9][0-9]{0,2})t(-tpu)?$ ]] ||
    refuse "TYPE=${TYPE@Q}: expected a machine type, such as ct6e-standard-8t, or an accelerator type, such as v5litepod-8"
  chips=${BASH_REMATCH[1]}
  hosts=1
  if [ -n "${TOPOLOGY:-}" ]; then
    [[ "$TOPOLOGY" =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] ||
      refuse "TOPOLOGY=${TOPOLOGY@Q}: expected the chips of each axis, such as 4x4 or 2x2x2"
    for one in ${TOPOLOGY//x/ }; do
      total=$((total * one))
    done
    hosts=$((total / chips))
    [ "$((hosts * chips))" -eq "$total" ] ||
      refuse "TOPOLOGY=$TOPOLOGY has $total chips, which hosts of $chips (TYPE=$TYPE) do not divide"
  fi
  version > /dev/null
}

version() {
  case "${VERSION:-}:$TYPE" in
    :ct5p-* | :ct6e-*) echo ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    :tpu7x-*) echo ubuntu-accel-2404-amd64-tpu-tpu7x ;;
    :*) refuse "TYPE=$TYPE is not one of ct5p-hightpu-Nt, ct6e-standard-Nt, tpu7x-standard-4t: set VERSION too" ;;
    *) echo "$VERSION" ;;
  esac
}

request_tpu() {
  local image region=${ZONE%-*} more=()
  image=$(version) || return
  case "$TYPE" in
    tpu7x-*) more+=(--boot-disk-type=hyperdisk-balanced) ;;
  esac
  if [ -n "${SPOT:-}" ]; then
    more+=(--provisioning-model=SPOT --instance-termination-action=STOP)
  fi
  request gcloud compute instance-templates create "$name" "${project[@]}" "--machine-type=$TYPE" \
    "--image-family=$image" --image-project=ubuntu-os-accelerator-images --boot-disk-size=100GB \
    --maintenance-policy=TERMINATE --scopes=cloud-platform "${more[@]}" || return
  more=()
  if [ "$hosts" -gt 1 ]; then
    request gcloud compute resource-policies create workload-policy "$name" "--region=$region" "${project[@]}" \
      --type=HIGH_THROUGHPUT "--accelerator-topology=$TOPOLOGY" || return
    more+=("--workload-policy=regions/$region/resourcePolicies/$name")
  fi
  # do-nothing: a slice that lost a host is deleted and requested again as a whole
  request gcloud compute instance-groups managed create "$name" "${where[@]}" "--template=$name" "--size=$hosts" \
    --default-action-on-vm-failure=do-nothing "${more[@]}"
}

instances() { # FORMAT [FLAG ...]
  local format=$1
  shift
  gcloud compute instance-groups managed list-instances "$name" "${where[@]}" "--format=value($format)" "$@"
}

# Prints the state; fails where it cannot be read.
state() {
  local found
  if [ -n "$dry" ]; then
    query ACTIVE gcloud compute instance-groups managed list-instances "$name" "${where[@]}" "--format=value(instanceStatus)"
    return
  fi
  found=$(instances instanceStatus) || return
  case "$found" in
    *STOP* | *TERMINATED* | *SUSPEND* | *DEPROVISIONING*) echo SUSPENDED ;;
    *) if [ "$(grep -c '^RUNNING$' <<< "$found")" -eq "$hosts" ]; then echo ACTIVE; else echo CREATING; fi ;;
  esac
}

# Prints the name of the group if there is one; fails where that cannot be known.
listed() {
  query "" gcloud compute instance-groups managed list "--zones=$ZONE" "${project[@]}" "--filter=name=$name" "--format=value(name)"
}

# Runs a line of shell on this machine for every host, all at once, with $host its name.
on_each_host() { # all|first LINE
  local host names more=() jobs=() status=0
  [ "$1" = all ] || more=(--limit=1)
  if [ -n "$dry" ]; then
    names=$(quoted gcloud compute instance-groups managed list-instances "$name" "${where[@]}" \
      "--format=value(instance.basename())" --sort-by=instance "${more[@]}")
    echo "for host in \$($names); do $2; done"
    return
  fi
  names=$(instances "instance.basename()" --sort-by=instance "${more[@]}") || return
  [ -n "$names" ] || return 1
  for host in $names; do
    eval "$2" &
    jobs+=("$!")
  done
  for host in "${jobs[@]}"; do
    wait "$host" || status=$?
  done
  return "$status"
}

each_host() {
  if [ -n "$dry" ]; then
    on_each_host "$@"
  else
    do_it on_each_host "$@"
  fi
}

on_hosts() { # all|first COMMAND
  each_host "$1" "gcloud compute ssh \"\$host\" $(quoted "${where[@]}" "--command=$2")"
}

copy_to_hosts() { each_host all "gcloud compute scp $(quoted "$1") \"\$host:\" $(quoted "${where[@]}")"; }

fetch_from_host() {
  each_host first "gcloud compute scp --recurse \"\$host:\"$(quoted "$1") $(quoted "$2" "${where[@]}")"
}

# Prints the exit status of the run, nothing while it runs.
exit_status() {
  if [ -n "$dry" ]; then
    on_hosts first "cat mmfusion/status" >&2
    echo 0
  else
    on_hosts first "cat mmfusion/status"
  fi
}

# Deletes the group, which costs money, and its template and policy, which do not.
delete() {
  local status=0
  do_it gcloud compute instance-groups managed delete "$name" "${where[@]}" --quiet || status=$?
  do_it gcloud compute instance-templates delete "$name" "${project[@]}" --quiet || true
  if [ "$hosts" -gt 1 ]; then
    do_it gcloud compute resource-policies delete "$name" "--region=${ZONE%-*}" "${project[@]}" --quiet || true
  fi
  return "$status"
}
