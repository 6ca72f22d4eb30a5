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
# a signal to this script goes on to the launch, which lets the ranks save: bash alone would end, and the ranks train on unwatched
launcher="" asked="" sent=""
forward() {
    asked=$1
    [ -z "$launcher" ] || { sent=1 && kill -"$1" "$launcher" 2>/dev/null; } || true
}
trap 'forward TERM' TERM INT
trap 'forward USR1' USR1
trap '' HUP # nor does a terminal that goes away end anything
for stage in 1 2 3; do
    if [ "$stage" = 3 ]; then hostfile=${STAGE3_HOSTFILE:-$hostfile}; fi
    if [ -n "$asked" ]; then exit 143; fi # the signal came when a stage was over
    echo "== $model stage $stage on $hostfile" >&2 || true
    jp-train launch "launch/${model}_stage${stage}.yaml" --hostfile "$hostfile" --max-restarts "${MAX_RESTARTS:-5}" "$@" &
    launcher=$!
    if [ -n "$asked" ] && [ -z "$sent" ]; then forward "$asked"; fi # it came before the launch had a number
    while :; do
        code=0
        wait "$launcher" || code=$?
        kill -0 "$launcher" 2>/dev/null || break # else `wait` returned because a signal came
    done
    code=0
    wait "$launcher" || code=$?
    launcher=""
    [ "$code" = 0 ] || exit "$code"
done
