#!/bin/bash
# What each host of a Cloud TPU slice runs when it starts; queued_resource.sh gives it to them.
set -euo pipefail

metadata() {
  curl --fail --silent --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
run=$(metadata dsjax-run)
bucket=$(metadata dsjax-bucket)
image=$(metadata dsjax-image)

if ! command -v gcsfuse; then
  release=gcsfuse-$(lsb_release --codename --short)
  keys=/usr/share/keyrings/cloud.google.asc
  curl --fail --silent https://packages.cloud.google.com/apt/doc/apt-key.gpg --output $keys
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt $release main" \
    > /etc/apt/sources.list.d/gcsfuse.list
  apt-get update
  apt-get install --yes gcsfuse
fi
mkdir -p /bucket
mountpoint --quiet /bucket || gcsfuse --implicit-dirs -o allow_other "$bucket" /bucket

gcloud auth configure-docker "${image%%/*}" --quiet
# 75 asks to be started again: a signal stopped the run after a save, or another host was lost.
status=75
while [ "$status" -eq 75 ]; do
  status=0
  docker run --rm --privileged --network host --stop-timeout 900 \
    --volume /bucket:/bucket "$image" \
    dsjax train "$run" "directory=/bucket/runs/$run" \
    data.sources.0.path=/bucket/data/packed/train data.tokenizer=/bucket/data/tokenizer \
    --status-if-stopped 75 || status=$?
done
exit "$status"
