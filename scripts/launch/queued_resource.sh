#!/bin/bash
# A run on Cloud TPU VMs that the queue of Cloud TPU gives: docs/launching/queued_resources.md.
#
#     ZONE=... BUCKET=... IMAGE=... scripts/launch/queued_resource.sh v2_v5p_64 v5p-128 --spot
set -euo pipefail

run=${1:?name a run}
accelerator=${2:?name a type, such as v5p-128}
shift 2
: "${ZONE:?}" "${BUCKET:?}" "${IMAGE:?}"
case $accelerator in
  v5p-*) version=v2-alpha-tpuv5 ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) echo "$accelerator: must begin with v5p-, v5litepod- or v6e-" >&2 && exit 2 ;;
esac

# Each host runs this when it starts, so a slice that was taken away and came back goes on.
start=$(dirname "$0")/tpu_vm.sh
gcloud compute tpus queued-resources create "${run//_/-}" \
  --node-id "${run//_/-}" \
  --zone "$ZONE" \
  --accelerator-type "$accelerator" \
  --runtime-version "$version" \
  --scopes https://www.googleapis.com/auth/cloud-platform \
  --metadata "dsjax-run=$run,dsjax-bucket=$BUCKET,dsjax-image=$IMAGE" \
  --metadata-from-file "startup-script=$start" \
  "$@"
