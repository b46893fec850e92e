#!/usr/bin/env bash
# Runs one training run on a TPU slice of a GKE cluster with the JobSet API; see README.md in this folder.
#   IMAGE=... TPU=tpu-v6e-slice TOPOLOGY=4x4 HOSTS=4 CHIPS=4 experiments/launch/train_gke.sh [--dry-run] NAME FLAG ...
# IMAGE's working directory is this repository, with its requirements, jax[tpu] and gcsfs. HOSTS x CHIPS must equal the
# number of chips in TOPOLOGY. QUEUE is a local queue of Kueue, SPOT=1 asks for spot nodes. A dry run prints the command.
set -euo pipefail

refuse() {
  echo "train_gke.sh: $*" >&2
  exit 2
}

dry=""
if [ "${1:-}" = "--dry-run" ]; then
  dry=1
  shift
fi
if [ "$#" -lt 2 ] || [ -z "${IMAGE:-}" ] || [ -z "${TPU:-}" ] || [ -z "${TOPOLOGY:-}" ]; then
  echo 'usage: IMAGE=... TPU=tpu-v6e-slice TOPOLOGY=4x4 HOSTS=4 CHIPS=4 [QUEUE=...] [SPOT=1] train_gke.sh [--dry-run] NAME FLAG ...' >&2
  exit 2
fi
name=$1 hosts=${HOSTS:-1} chips=${CHIPS:-4} queue=${QUEUE:-}
shift
# Numbers are checked before arithmetic, which would run the commands in them.
[[ "$hosts" =~ ^[1-9][0-9]{0,3}$ ]] || refuse "HOSTS=${hosts@Q}: expected a number"
[[ "$chips" =~ ^[1-9][0-9]?$ ]] || refuse "CHIPS=${chips@Q}: expected a number"
[[ "$TOPOLOGY" =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] ||
  refuse "TOPOLOGY=${TOPOLOGY@Q}: expected the chips of each axis, such as 2x4 or 2x2x2"
if [ "$((${TOPOLOGY//x/ * }))" -ne "$((hosts * chips))" ]; then
  refuse "TOPOLOGY=$TOPOLOGY is not HOSTS=$hosts x CHIPS=$chips"
fi
# Pods are called NAME-train-0-HOST-SUFFIX, and their names are labels of at most 63 characters.
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  refuse "NAME=${name@Q}: at most 40 lower-case letters, digits and hyphens, beginning with a letter"
[[ "$TPU" =~ ^[a-z0-9][a-z0-9-]{0,62}$ ]] || refuse "TPU=${TPU@Q}: expected a value of the label gke-tpu-accelerator"
[[ "$queue" =~ ^[a-z0-9.-]{0,63}$ ]] || refuse "QUEUE=${queue@Q}: expected the name of a local queue"
[[ "$IMAGE" =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] || refuse "IMAGE=${IMAGE@Q}: expected REGISTRY/NAME:TAG"

# Strings of JSON, which YAML reads alike. Kubernetes replaces \$(NAME) in arguments, and reads \$\$ as \$.
arguments=$(python3 -c '
import json, sys
json.dump([argument.encode().decode().replace("$", "$$") for argument in sys.argv[1:]], sys.stdout)
' "$@" 2> /dev/null) || refuse "the flags are not UTF-8"

manifest() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "$name"
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
END
  if [ -n "$queue" ]; then
    cat <<END
  labels:
    kueue.x-k8s.io/queue-name: "$queue"
END
  fi
  cat <<END
spec:
  failurePolicy:
    maxRestarts: 100 # all hosts restart together, from the newest checkpoint
    rules: # but not after an input error or diverged training
      - name: hopeless
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: { containerName: train, operator: In, values: [1, 2] }
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: "$TPU"
                cloud.google.com/gke-tpu-topology: "$TOPOLOGY"
END
  if [ -n "${SPOT:-}" ]; then
    cat <<END
                cloud.google.com/gke-spot: "true"
              tolerations:
                - { key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule }
END
  fi
  cat <<END
              containers:
                - name: train
                  image: "$IMAGE"
                  command: [python, -m, experiments.train, --distributed=auto]
                  args: $arguments
                  resources:
                    requests: { google.com/tpu: $chips }
                    limits: { google.com/tpu: $chips }
END
}

if [ -n "$dry" ]; then
  echo "kubectl apply -f - <<'MANIFEST'"
  manifest
  echo MANIFEST
else
  manifest | kubectl apply -f -
fi
