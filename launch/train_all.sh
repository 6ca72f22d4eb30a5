#!/usr/bin/env bash
# The three stages in order; a stage starts from the one before (model.init_from in its YAML) and a finished one is not run again.
#   launch/train_all.sh janus_pro_1b hostfiles/a100_16x8 [key=value ...] [options of jp-train launch ...]
# A host or a rank that dies costs a restart from the newest checkpoint, MAX_RESTARTS of them a stage (default 5; 0: none).
# Stage 3 of the 7B feeds 128 ranks at most; give it its own hostfile:
#   STAGE3_HOSTFILE=hostfiles/a100_16x8 launch/train_all.sh janus_pro_7b hostfiles/a100_32x8
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 MODEL HOSTFILE [key=value ...] [options of jp-train launch ...]      MODEL: janus_pro_1b or janus_pro_7b" >&2
    exit 2
fi
model=$1
hostfile=$2
shift 2
for stage in 1 2 3; do
    if [ "$stage" = 3 ]; then hostfile=${STAGE3_HOSTFILE:-$hostfile}; fi
    echo "== $model stage $stage on $hostfile" >&2
    jp-train launch "launch/${model}_stage${stage}.yaml" --hostfile "$hostfile" --max-restarts "${MAX_RESTARTS:-5}" "$@"
done
