"""The check of attention's benchmark: it takes large shapes apart rightly, and it can fail."""

import json
import os
import pathlib
import subprocess
import sys

import bench_attention
import jax
import numpy as np
import pytest
from bench_attention import arguments, definition, errors, passes
from cases import ATTENTION_CASES


@pytest.mark.parametrize("name", ["small_packed", "small_local"])
def test_a_large_shape_is_defined_head_by_head(name, monkeypatch):
    case = ATTENTION_CASES[name]
    operands = arguments(case, "float32")
    whole = definition(case, *operands)
    monkeypatch.setattr(bench_attention, "_QUADRATIC_AT_MOST", 1)
    for got, want in zip(definition(case, *operands), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["grouped_1024", "bert_512_dropout", "t5_bias_512"])
def test_a_large_shape_whose_heads_differ_has_no_definition(name):
    assert definition(ATTENTION_CASES[name]._replace(B=128), None, None, None) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_error_past_rounding_is_seen(dtype):
    case = ATTENTION_CASES["small_packed"]
    operands = arguments(case, dtype)
    want = definition(case, *operands)
    got = [np.array(x, np.float32) for x in jax.jit(passes(case, "chunked")[1])(*operands)]
    assert errors(got, want, dtype, case.T)[2]
    for i in range(len(got)):
        wrong = [x.copy() for x in got]
        wrong[i][0, 0, 0] += 0.1
        assert not errors(wrong, want, dtype, case.T)[2]
        wrong[i][0, 0, 0] = np.nan
        assert not errors(wrong, want, dtype, case.T)[2]


@pytest.mark.skipif(not pathlib.Path("/dev/nvidiactl").exists(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_every_implementation_is_the_definition():
    """In a process of its own: tests run on CPUs."""
    small = [name for name, case in ATTENTION_CASES.items() if case.is_small]
    command = [sys.executable, bench_attention.__file__, "--json", "--repeats", "1", "--case", *small]
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    rows = json.loads(run.stdout)["rows"]
    assert {row["implementation"] for row in rows if row["is_right"]} == {"reference", "chunked", "flash", "cudnn"}
