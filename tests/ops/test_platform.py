"""platform: code may be traced for hardware that is not here."""

import jax
import jax.numpy as jnp
import pytest

from flax_encoder.ops.platform import cpu_multiplies_bfloat16, platform, platform_for_tracing, precision


def test_a_platform_for_tracing_holds_within_its_context():
    assert platform() == jax.default_backend()
    with platform_for_tracing("tpu"):
        assert platform() == "tpu"
    assert platform() == jax.default_backend()


def test_what_was_traced_for_one_platform_is_not_taken_for_another():
    traced_for = []
    function = jax.jit(lambda x: traced_for.append(platform()) or x)
    for _ in range(2):
        function(1.0)
        with platform_for_tracing("gpu"):
            function(1.0)
    assert traced_for == ["cpu", "gpu"]


def test_an_unknown_platform_lists_the_known():
    with pytest.raises(ValueError, match="'cpu', 'gpu' or 'tpu': got 'cuda'"):
        platform_for_tracing("cuda")


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu"])
def test_float32_is_float32_unless_jax_is_told_otherwise(name):
    exact = None if name == "cpu" else jax.lax.Precision.HIGHEST
    x, low = jnp.ones(1), jnp.ones(1, jnp.bfloat16)
    with platform_for_tracing(name):
        assert precision(x, x) == precision(low, x) == exact
        assert precision(low, low) is None
        with jax.default_matmul_precision("tensorfloat32"):
            assert precision(x, x) is None


@pytest.mark.parametrize(
    ("listed", "answer"),
    [("flags : avx2 avx512f", False), ("flags : fpu avx512_bf16", True), ("Features : asimd bf16", True), (None, True)],
)
def test_instructions_for_bfloat16_are_read_where_linux_lists_them(monkeypatch, tmp_path, listed, answer):
    path = tmp_path / "cpuinfo"
    if listed is not None:
        path.write_text(listed)
    monkeypatch.setattr("flax_encoder.ops.platform.pathlib.Path", lambda _: path)
    assert cpu_multiplies_bfloat16.__wrapped__() == answer
