#!/usr/bin/env bash
# Runs one training run on a TPU slice of a GKE cluster with the JobSet API; see README.md in this folder.
#   IMAGE=... TPU=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 CHIPS=4 experiments/launch/train_gke.sh [--dry-run] NAME FLAG ...
# IMAGE's working directory is this repository, with its requirements, jax[tpu] and gcsfs. HOSTS x CHIPS must equal the
# number of chips in TOPOLOGY. A dry run prints the command and the manifest.
set -euo pipefail

dry=""
if [ "${1:-}" = "--dry-run" ]; then
  dry=1
  shift
fi
if [ "$#" -lt 2 ] || [ -z "${IMAGE:-}" ] || [ -z "${TPU:-}" ] || [ -z "${TOPOLOGY:-}" ]; then
  echo 'usage: IMAGE=... TPU=tpu-v5-lite-podslice TOPOLOGY=2x4 HOSTS=2 CHIPS=4 train_gke.sh [--dry-run] NAME FLAG ...' >&2
  exit 2
fi
name=$1
shift
hosts=${HOSTS:-1} chips=${CHIPS:-4}
if [ "$((${TOPOLOGY//x/ * }))" -ne "$((hosts * chips))" ]; then
  echo "train_gke.sh: TOPOLOGY=$TOPOLOGY is not HOSTS=$hosts x CHIPS=$chips" >&2
  exit 2
fi

arguments=""
for flag in "$@"; do
  flag=${flag//\\/\\\\}
  arguments+=", \"${flag//\"/\\\"}\""
done

manifest() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
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
                cloud.google.com/gke-tpu-accelerator: $TPU
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
              containers:
                - name: train
                  image: $IMAGE
                  command: [python, -m, experiments.train, --distributed=auto]
                  args: [${arguments#, }]
                  resources:
                    requests: { google.com/tpu: $chips }
                    limits: { google.com/tpu: $chips }
END
}

if [ -n "$dry" ]; then
  echo "kubectl apply -f -"
  manifest
else
  manifest | kubectl apply -f -
fi
