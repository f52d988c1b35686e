#!/bin/bash
# A run on TPUs through XPK, which writes the JobSet itself: docs/launching/gke.md.
#
#     CLUSTER=... IMAGE=... BUCKET=... scripts/launch/xpk.sh v2_v5p_64 v5p-128
#     CLUSTER=... IMAGE=... BUCKET=... scripts/launch/xpk.sh v2_v6e_2x256 v6e-256 2
set -euo pipefail

run=${1:?name a run}
tpu_type=${2:?name a type, such as v5p-128}
num_slices=${3:-1}
: "${CLUSTER:?names the GKE cluster that xpk made}"
: "${IMAGE:?names the container: docs/launching/containers.md}"
: "${BUCKET:?names the XPK storage that is mounted at /bucket}"

command="exec dsjax train $run directory=/bucket/runs/$run"
command+=" data.sources.0.path=/bucket/data/packed/train data.tokenizer=/bucket/data/tokenizer"
command+=" --status-if-stopped 75"

xpk workload create \
  --cluster "$CLUSTER" \
  --workload "${run//_/-}" \
  --tpu-type "$tpu_type" \
  --num-slices "$num_slices" \
  --docker-image "$IMAGE" \
  --storage "$BUCKET" \
  --max-restarts 1000 \
  --restart-on-exit-codes 75 \
  --termination-grace-period-seconds 900 \
  --command "$command" \
  "${@:4}"
