#!/bin/bash
# Makes a TPU slice, or finds it, and runs the same command on all of its hosts. Again after an interruption: it goes on.
#   launch/cloud_tpu.sh my-slice us-west4-a v5litepod-256 64 --config configs/quickstart.py --run-dir /shared/runs/mine
# The run folder is on a disk that all hosts see (Filestore, or the like), mounted there.
# The arguments before train.py's own: name, zone, accelerator type, hosts (a v5e host has 4 chips).
set -euo pipefail
name=$1 zone=$2 accelerator=$3 hosts=$4
shift 4

tpu() { gcloud compute tpus tpu-vm "$1" "$name" --zone "$zone" "${@:2}"; }

tpu describe >/dev/null 2>&1 || tpu create --accelerator-type "$accelerator" --version v2-alpha-tpuv5-lite --spot
tpu scp --recurse --worker all . "$name:flax_encoder_source"
printf -v arguments ' %q' "$@"
tpu ssh --worker all --command "cd flax_encoder_source && pip install -q -e . 'jax[tpu]' && \
  python train.py --mesh.num-processes $hosts --stall-seconds 1800$arguments"
