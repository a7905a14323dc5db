"""Accelerators that are not there, for jax to compile for: how fast they are, and how they are asked for.

This file imports the standard library alone until a device is asked for: the peer's environment uses it too.
"""

import importlib.util
from typing import Any, NamedTuple


class Chip(NamedTuple):
    clock_hertz: float
    peak_flops: float
    """Of dense bfloat16 products."""
    bytes_per_second: float
    """Of HBM."""
    kernel_fraction: float
    """Of the peak, at which an attention kernel's products are counted."""
    product_fraction: float = 1.0
    """Of the peak, at which a library's matrix products are counted that the compiler has no estimate of."""


# Peak and bandwidth of v5e as published at cloud.google.com/tpu/docs; 197e12 is 4 units x 128 x 128 x 2 at 1.5 GHz.
# On TPUs heads of 64 fill half of a unit's 128 lanes, so a kernel's products can reach half the peak; softmax and masks
# are made meanwhile by other units, which takes some of that.
# Those of an H100 SXM from NVIDIA's data sheet, and the fractions measured on one (LOG.md): a step's products ran at
# 0.76 of it, `flash` at 0.26 to 0.35 without dropout and 0.17 to 0.27 with it.
CHIPS = {"v5e": Chip(1.5e9, 197e12, 819e9, 0.4), "h100": Chip(1.98e9, 989e12, 3.35e12, 0.3, 0.76)}
TOPOLOGIES = {"tpu": "v5e:2x2", "gpu": "h100:1x1x1"}
# For jax, before it is imported: not to look for accelerators here, and their plugins not to say at length that there
# are none.
WITHOUT_ACCELERATOR = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
PACKAGES = {
    "tpu": "pip install libtpu",
    "gpu": "pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12, the first two of jax's own version; "
    "programs with cuDNN's attention need nvidia-cudnn-cu12 too",
}
# What the compiler asks of a GPU, as stream_executor.GpuTargetConfigProto; the figures are of an H100 SXM with 80 GB,
# as openxla/xla has them in xla/backends/gpu/target_config/specs/h100_sxm.txtpb and the CUDA programming guide in its
# table of compute capabilities.
GPU_TARGETS = {
    "h100": """
        platform_name: "CUDA"
        device_description_str: "NVIDIA H100 80GB HBM3"
        dnn_version_info { major: 9 minor: 10 }
        gpu_device_info {
          cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
          clock_rate_ghz: 1.98  core_count: 132  fpus_per_core: 128
          device_memory_size: 84942979072  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
          shared_memory_per_core: 233472  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
          registers_per_core_limit: 65536  registers_per_block_limit: 65536
          threads_per_core_limit: 2048  threads_per_block_limit: 1024  threads_per_warp: 32
          block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
        }
    """
}


def compiler_options(platform: str, products: str | None) -> dict[str, Any]:
    """For `jax.stages.Lowered.compile`, so that the text has what estimate.py reads.

    Args:
      products: on a GPU a run times, for each matrix product, cuBLAS against kernels of the compiler's own, into which
        it takes elementwise work around the product. Nothing can be timed here, so all are "cublas"'s or "triton"'s,
        the latter with tiles that no run would choose. None on a TPU.
    """
    if platform == "tpu":
        return {}
    return {
        "xla_gpu_autotune_level": 0,
        "xla_gpu_enable_triton_gemm": products == "triton",
        "xla_gpu_collect_cost_model_stats": True,
    }


def devices(platform: str, topology: str) -> list[Any]:
    """Devices to compile for; the compiler is loaded, so what it reads from the environment must be there.

    Args:
      topology: a chip's name, a colon and its layout: "v5e:2x2" is four chips, "h100:1x1x4" four GPUs of one process.

    Raises:
      ValueError: a chip that is not known or not the platform's, or a compiler that is not installed.
    """
    name, _, layout = topology.partition(":")
    known = [chip for chip in CHIPS if (chip in GPU_TARGETS) == (platform == "gpu")]
    if name not in known:
        raise ValueError(f"--topology must begin with a known {platform}: got {name}, known are {', '.join(known)}.")
    if not is_installed(platform):
        raise ValueError(f"compiling for a {platform} takes no {platform}, but its compiler: {PACKAGES[platform]}.")
    from jax.experimental import topologies

    if platform == "tpu":
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    target = {"target_config": GPU_TARGETS[name], "topology": layout or "1x1x1"}
    return list(topologies.get_topology_desc(platform="cuda", **target).devices)


def is_installed(platform: str) -> bool:
    names = ("libtpu",) if platform == "tpu" else ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")
    try:
        return all(importlib.util.find_spec(name) for name in names)
    except ModuleNotFoundError:  # not even the package around it
        return False
