"""Hardware that is not there, for jax to compile for: how fast it is, how much it holds, and how it is asked for."""

import importlib.util
import math
import os
import re
import sys
from typing import Any, NamedTuple

from flax_encoder.config import ConfigError
from flax_encoder.config.rules import counted


class Chip(NamedTuple):
    platform: str
    """`tpu`, `gpu` or `cpu`."""
    clock_hertz: float
    peak_flops: float
    """Of dense bfloat16 products, a second."""
    bytes_per_second: float
    """Of HBM."""
    memory_bytes: float
    """What a program can have of HBM."""
    link_bytes_per_second: float
    """That a chip sends to the others of its slice or host, all its links together."""
    kernel_fraction: float
    """Of the peak, at which an attention kernel's products are counted."""
    product_fraction: float = 1.0
    """Of the peak, at which a library's matrix products are counted that the compiler has no estimate of."""
    float32_share: float = 1.0
    """Of the peak, what products of float32 have."""


# TPUs: peak, bandwidth and links as published at cloud.google.com/tpu/docs; memory is what the compiler says is its
# limit; the clock is the peak over what the chip's matrix units do in a cycle (v5e: 4 units x 128 x 128 x 2 at 1.5 GHz;
# v5p: 8 of them at 1.75 GHz; v6e: 4 units x 256 x 256 x 2 at 1.75 GHz), of which the compiler expects a product of
# bfloat16 [8192, 8192] matrices to reach 0.88, 0.90 and 0.70.
# On TPUs heads of 64 fill half of a unit's 128 lanes, so a kernel's products can reach half the peak; softmax and masks
# are made meanwhile by other units, which takes some of that.
# GPUs (SXM): from NVIDIA's data sheets. The fractions were measured on an H100 (LOG.md): a step's products ran at 0.76
# of the peak, `flash` at 0.26 to 0.35 without dropout and 0.17 to 0.27 with it. Those of the others are taken to be the
# same. JAX takes 0.75 of a GPU's memory for its programs, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CHIPS = {
    "v5e": Chip("tpu", 1.5e9, 197e12, 819e9, 15.75 * 2**30, 200e9, 0.4),
    "v5p": Chip("tpu", 1.75e9, 459e12, 2765e9, 95.74 * 2**30, 600e9, 0.4),
    "v6e": Chip("tpu", 1.75e9, 918e12, 1640e9, 31.25 * 2**30, 448e9, 0.4),
    "h100": Chip("gpu", 1.98e9, 989e12, 3.35e12, 0.75 * 84942979072, 450e9, 0.3, 0.76, 67 / 989),
    "h200": Chip("gpu", 1.98e9, 989e12, 4.8e12, 0.75 * 150e9, 450e9, 0.3, 0.76, 67 / 989),
    "a100": Chip("gpu", 1.41e9, 312e12, 2.039e12, 0.75 * 85e9, 300e9, 0.3, 0.76, 19.5 / 312),
}
GPUS_PER_HOST = 8
NETWORK_BYTES_PER_SECOND = 50e9
"""That a GPU sends to another host: 400 Gbit/s each, as DGX and cloud hosts have."""
# For jax, before its first computation: not to look for accelerators here, and their plugins not to say at length that
# there are none.
WITHOUT_ACCELERATOR = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")}
# What the compiler asks of a GPU, as stream_executor.GpuTargetConfigProto, without what all have in common; the figures
# are of SXM boards, as openxla/xla has them in xla/backends/gpu/target_config/specs and the CUDA programming guide in
# its table of compute capabilities.
_GPU_COMMON = """
        platform_name: "CUDA"
        dnn_version_info { major: 9 minor: 10 }
        gpu_device_info {
          registers_per_core_limit: 65536  registers_per_block_limit: 65536
          threads_per_core_limit: 2048  threads_per_block_limit: 1024  threads_per_warp: 32
          block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
          shared_memory_per_block: 49152
          """
_HOPPER = """cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
          clock_rate_ghz: 1.98  core_count: 132  fpus_per_core: 128  l2_cache_size: 52428800
          shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
          """
_AMPERE = """cuda_compute_capability { major: 8 }
          clock_rate_ghz: 1.41  core_count: 108  fpus_per_core: 64  l2_cache_size: 41943040
          shared_memory_per_core: 167936  shared_memory_per_block_optin: 166912
          """
_GPU_OWN = {
    "h100": ("NVIDIA H100 80GB HBM3", _HOPPER, 84942979072, 3352320000000),
    "h200": ("NVIDIA H200", _HOPPER, 150754820096, 4800000000000),
    "a100": ("NVIDIA A100-SXM4-80GB", _AMPERE, 85899345920, 2039000000000),
}


class Hardware(NamedTuple):
    """Chips to compile for."""

    name: str
    """As it was asked for, such as tpu-v5e:16x16."""
    kind: str
    """Of CHIPS, or `cpu`."""
    platform: str
    num_chips: int
    topology: str
    """As jax's topologies name it."""


def parse_hardware(text: str) -> Hardware:
    """`tpu-v5e:16x16`, `h100:8`, `cpu:8` and the like.

    Raises:
      ConfigError: no such hardware, or not so many of it; the message lists the known.
    """
    found = re.fullmatch(r"(?:(tpu|gpu)-)?(\w+):(\d+(?:x\d+)*)", text)
    kind = found[2] if found else ""
    platform = "cpu" if kind == "cpu" else CHIPS[kind].platform if kind in CHIPS else None
    if found is None or platform is None or found[1] not in (None, platform):
        raise ConfigError(f"hardware is a kind and how many: {_known()}; got {text!r}.")
    sizes = [int(n) for n in found[3].split("x")]
    dimensions = {"v5e": 2, "v6e": 2, "v5p": 3}.get(kind, 1)
    if len(sizes) != dimensions or min(sizes) < 1:
        raise ConfigError(
            f"{kind} is counted in {counted(dimensions, 'dimension')}, each at least 1: got {text!r}. "
            f"Known are {_known()}."
        )
    count, topology = math.prod(sizes), f"{kind}:{found[3]}"
    if platform == "gpu":
        if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
            raise ConfigError(f"hosts have {GPUS_PER_HOST} GPUs each: got {text!r}, not so many in whole hosts.")
        hosts = -(-count // GPUS_PER_HOST)
        topology = f"{kind}:1x{hosts}x{count // hosts}"
    return Hardware(text, kind, platform, count, topology)


def _known() -> str:
    tpus = "tpu-v5e:4x4, tpu-v6e:16x16, tpu-v5p:4x4x4"
    gpus = ", ".join(f"{name}:8" for name, chip in CHIPS.items() if chip.platform == "gpu")
    return f"{tpus} (chips along each side of the slice), {gpus}, cpu:8 (how many)"


def compiler_options(platform: str, products: str | None) -> dict[str, Any]:
    """For `jax.stages.Lowered.compile`, so that the text has what estimate.py reads.

    Args:
      products: on a GPU a run times, for each matrix product, cuBLAS against kernels of the compiler's own, into which
        it takes elementwise work around the product. Nothing can be timed here, so all are "cublas"'s or "triton"'s,
        the latter with tiles that no run would choose. None on a TPU.
    """
    if platform != "gpu":
        return {}
    return {
        "xla_gpu_autotune_level": 0,
        "xla_gpu_enable_triton_gemm": products == "triton",
        "xla_gpu_collect_cost_model_stats": True,
    }


def topology_arguments(topology: str) -> dict[str, Any]:
    """For `jax.experimental.topologies.get_topology_desc`."""
    kind, _, layout = topology.partition(":")
    if CHIPS[kind].platform == "tpu":
        return {"platform": "tpu", "topology_name": topology}
    name, own, memory, bandwidth = _GPU_OWN[kind]
    target = f"{_GPU_COMMON}{own}device_memory_size: {memory}  memory_bandwidth: {bandwidth}\n}}"
    return {
        "platform": "cuda", "target_config": f'{target}\ndevice_description_str: "{name}"',
        "topology": layout or "1x1x1",
    }  # fmt: skip


def devices(platform: str, topology: str) -> list[Any]:
    """Devices to compile for; the compiler is loaded, so what it reads from the environment must be there.

    Args:
      topology: a chip's name, a colon and its layout: "v5e:2x2" is four chips, "h100:1x1x4" four GPUs of one host.

    Raises:
      ConfigError: a chip that is not known or not the platform's, a layout that there is not, or a compiler that is
        not installed, with the command that installs it.
    """
    name = topology.partition(":")[0]
    known = [kind for kind, chip in CHIPS.items() if chip.platform == platform]
    if name not in known:
        raise ConfigError(f"a {platform}'s topology begins with its kind, {', '.join(known)}: got {topology}.")
    if not is_installed(platform):
        raise ConfigError(
            f"compiling for a {platform} takes no {platform}, but its compiler, beside this library: "
            f"pip install {' '.join(packages(platform))} (or the extra: pip install -e '.[plan-{platform}]')."
        )
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(**topology_arguments(topology)).devices)
    except Exception as error:  # the compilers raise what they like
        raise ConfigError(f"there is no topology {topology}: {str(error).splitlines()[0]}") from error


def packages(platform: str) -> list[str]:
    """What pip installs to compile for a platform with the jax that is installed."""
    import importlib.metadata as metadata

    jax = metadata.version("jax")
    if platform == "gpu":
        return [f"jax-cuda12-plugin=={jax}", f"jax-cuda12-pjrt=={jax}", "nvidia-cuda-nvcc-cu12"]
    wanted = (re.match(r"libtpu\s*([=<>!~][^;]*)", line) for line in metadata.requires("jax") or [])
    version = next((found[1].strip() for found in wanted if found), "")
    return [f"'libtpu{version}'"]


def is_installed(platform: str) -> bool:
    """Whether the platform's compiler is."""
    try:
        return all(importlib.util.find_spec(name) for name in _COMPILERS[platform])
    except ModuleNotFoundError:  # not even the package around it
        return False


def hide_accelerators(num_cpus: int = 1) -> None:
    """Have jax, before its first computation, use this machine's CPU alone, as so many devices; programs for others are
    compiled, not run."""
    os.environ.update(WITHOUT_ACCELERATOR)
    if "jax" in sys.modules or num_cpus > 1:
        import jax

        jax.config.update("jax_platforms", "cpu")
        flags = os.environ.get("XLA_FLAGS", "")
        if "force_host_platform_device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={num_cpus}".strip()
