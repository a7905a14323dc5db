"""What the compile benchmark adds up: a program's text, and model FLOPs."""

import numpy as np
import pytest

from flax_encoder.config import ConfigError, EncoderConfig
from flax_encoder.plan.compiled_text import num_bytes
from flax_encoder.plan.estimate import costliest, estimate, kernel_flops, kernel_times, memory_of, report
from flax_encoder.plan.flops import step_flops, visible_pairs
from flax_encoder.plan.schedules import bundle_cycles, stretch_shares
from flax_encoder.plan.targets import CHIPS, devices, is_installed

V5E, H100 = CHIPS["v5e"], CHIPS["h100"]

# A loop of 5 turns (7 to 17 by 2) whose body holds a fusion of 1,000 cycles, then a conditional of 30 or 40 cycles, a
# fusion of 500, a kernel whose attributes take two lines, a gather without estimate, and an overlapped copy.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/someone/encoder.py"
2 "/usr/lib/site-packages/jax/lax.py"

FunctionNames
1 "layer"

FileLocations
1 {file_name_id=1 function_name_id=1 line=31 end_line=31 column=4 end_column=10}
2 {file_name_id=2 function_name_id=1 line=41 end_line=41 column=4 end_column=10}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused_computation (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %w = bf16[128,128]{1,0} constant({...})
  ROOT %dot = bf16[8,128]{1,0} convolution(%a, %w), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"77"}
}

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kOutput, calls=%fused_computation, \
metadata={op_name="jit(step)/layers_3/dot_general" stack_frame_id=2}, backend_config={"estimated_cycles":"1000"}
  ROOT %made = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %fusion.1)
}

%condition (state.1: (s32[], bf16[8,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %last = s32[] constant(17)
  ROOT %less = pred[] compare(%i.1, %last), direction=LT
}

%cheap (b: bf16[8,128]) -> bf16[8,128] {
  %b = bf16[8,128]{1,0} parameter(0)
  ROOT %copy.1 = bf16[8,128]{1,0} copy(%b), backend_config={"estimated_cycles":"30"}
}

%dear (c: bf16[8,128]) -> bf16[8,128] {
  %c = bf16[8,128]{1,0} parameter(0)
  ROOT %copy.2 = bf16[8,128]{1,0} copy(%c), backend_config={"estimated_cycles":"40"}
}

ENTRY %main (p: bf16[8,128], q: bf16[2,256,128]) -> bf16[2,256,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[2,256,128]{2,1,0} parameter(1)
  %seven = s32[] constant(7)
  %start = s32[] copy(%seven)
  %tuple.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%start, %p)
  %while.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%tuple.1), condition=%condition, body=%body
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
  %choice = s32[] constant(0)
  %z = bf16[8,128]{1,0} conditional(%choice, %y, %y), branch_computations={%cheap, %dear}
  %fusion.2 = bf16[8,128]{1,0:T(8,128)S(1)} fusion(%z), kind=kLoop, calls=%fused_computation, \
metadata={op_name="jit(step)/layers_4/dot_general" stack_frame_id=2}, backend_config={"estimated_cycles":"500"}
  %copy-start = (bf16[8,128]{1,0}, bf16[8,128]{1,0:S(1)}, u32[]) copy-start(%p)
  %gather = f32[512,768]{1,0} fusion(%p), kind=kCustom, calls=%fused_computation
  ROOT %jvp_forward_kernel_.1 = bf16[2,256,128]{2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", \
operand_layout_constraints={bf16[2,256,128]{2,1,0}, bf16[2,256,128]{2,1,0}}, frontend_attributes={kernel_metadata={
 "rows": "2"}}, metadata={op_name="jit(step)/forward_kernel"}, backend_config={"custom_call_config":{"body":"TUz("}}
}
"""


def _cycles(made):
    return round(made.seconds * V5E.clock_hertz, 3)


def test_the_sum_is_loop_bodies_by_their_trips_and_the_dearest_branch():
    made = estimate(PROGRAM, V5E)
    assert _cycles(made) == 5 * 1000 + 40 + 500
    assert _cycles(estimate(PROGRAM.replace("constant(17)", "constant(18)"), V5E)) == 6 * 1000 + 40 + 500
    assert [line.instruction.name for line in made.unestimated] == ["gather"]


def test_a_branch_with_a_kernel_is_the_dearer():
    """What the kernel takes is added later; the other branch has more of the compiler's cycles."""
    kernel = '  ROOT %forward_kernel.9 = bf16[8,128]{1,0} custom-call(%b), custom_call_target="tpu_custom_call"\n'
    lines = PROGRAM.splitlines(keepends=True)
    text = "".join(kernel if "%copy.1 =" in line else line for line in lines)
    names = [line.instruction.name for line in estimate(text, V5E).kernels]
    assert sorted(names) == ["forward_kernel.9", "jvp_forward_kernel_.1"]


def test_a_stated_trip_count_is_taken():
    text = PROGRAM.replace(
        "condition=%condition, body=%body",
        'condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"9"}}',
    )
    assert _cycles(estimate(text, V5E)) == 9 * 1000 + 40 + 500


@pytest.mark.parametrize(
    "change",
    [
        ("%seven = s32[] constant(7)", "%seven = s32[] parameter(2)"),
        ("%last = s32[] constant(17)", "%last = s32[] get-tuple-element(%state.1), index=0"),
        ("direction=LT", "direction=NE"),
        ("add(%i, %two)", "multiply(%i, %two)"),
        ("add(%i, %two)", "add(%two, %two)"),
    ],
)
def test_a_loop_without_a_trip_count_is_an_error(change):
    assert change[0] in PROGRAM
    with pytest.raises(ValueError, match=r"trip count of while\.1"):
        estimate(PROGRAM.replace(*change), V5E)


def test_a_kernel_counts_its_products_its_bytes_and_its_bundles():
    (line,) = estimate(PROGRAM, V5E).kernels
    products, moved = 2 * 2 * (2 * 256 * 256 * 128), 4 * 2 * 256 * 128 * 2
    assert kernel_flops(line) == products
    times = kernel_times(line, V5E, 0.4, {"jvp_forward_kernel_.7": 300, "other.1": 5})
    assert times == (products / (0.4 * V5E.peak_flops), moved / V5E.bytes_per_second, 300 / V5E.clock_hertz)
    assert kernel_times(line, V5E, 0.4, {"other.1": 5}).bundles is None
    with pytest.raises(ValueError, match="arithmetic must be known"):
        kernel_flops(estimate(PROGRAM.replace("forward_kernel", "other"), V5E).kernels[0])


SCHEDULE = """\
LB: loop body
= control target key end

     0   :  { %s1 = smov.u32 0 }
   0x1   :  { %20 = vsyncpa [#allocation5], 0 } /* Start region 1 */
   0x2 LB: > { %s2 = sadd.s32 1, %s3
second_minor_factor: 1 */ } /* End region 33 */
   0x3   : > { %p28_p4 = scmp.ge.s32.totalorder %s2, 50 /* loop exit test */ }
   0x4 PF: > { %v1 = vlaneseq.b32 }
0x1005   :  {} /* End region 4 */
"""


def test_a_schedule_counts_its_loop_by_its_turns():
    assert bundle_cycles(SCHEDULE) == 3 + 50 * 3
    assert bundle_cycles(SCHEDULE.replace("0x4 PF: > {", "0x4 PF: > > {")) is None


BRANCHES = """\
     0   :  { %s1 = smov.u32 0 } /* Start region 1 */
   0x1 LB: > { %s2 = sadd.s32 1, %s3 }
   0x2   : > { %2 = sbr.rel (%p1) target = $region9 }
   0x3   : > { %s2 = sadd.s32 1, %s3 } /* Start region 8 */
   0x4   : > { %s2 = sadd.s32 1, %s3 } /* End region 8 */
   0x5 PF: > { %s2 = sadd.s32 1, %s3 } /* Start/End empty region 9 */
   0x6   : > { %3 = sbr.rel (%p2) target = $region40 }
   0x7   : > { %s2 = sadd.s32 1, %s3 } /* Start region 39 */
   0x8   : > { %4 = sbr.rel (!%p3) target = $region50 }
   0x9   : > { %s2 = sadd.s32 1, %s3
second_minor_factor: 1 */ } /* Start region 49 */
   0xa   : > { %s2 = sadd.s32 1, %s3 } /* End region 49 */
   0xb PF: > { %s2 = sadd.s32 1, %s3 } /* Start/End empty region 50 */
   0xc PF: > { %p28_p4 = scmp.ge.s32.totalorder %s2, 40 /* loop exit test */ } /* Start/End empty region 40 */
"""


def test_what_a_kernel_does_for_some_blocks_counts_for_those():
    """The two bundles of region 49 within the body, not those of region 8, which brings blocks in."""
    assert bundle_cycles(BRANCHES) == 1 + 40 * 12
    assert bundle_cycles(BRANCHES, blocks=8) == 1 + 40 * 10 + 40 // 8 * 2
    assert bundle_cycles(BRANCHES, blocks=4, groups=5) == 1 + 40 * 10 + 40 // 20 * 2


# A kernel's body of eight bundles: two for a row's first block, then one or three by the keys of the documents.
ALTERNATIVES = """\
     0   :  { %s1 = smov.u32 0 } /* Start region 1 */
   0x1 LB: > { %1 = sbr.rel (%p1) target = $region40 }
   0x2   : > { %2 = sbr.rel (%p2) target = $region20 }
   0x3   : > { %s2 = sadd.s32 1, %s3 }
   0x4   : > { %s2 = sadd.s32 1, %s3 }
   0x5   : > { %3 = sbr.rel (%p3) target = $region21 } /* Start/End empty region 20 */
   0x6   : > { %s2 = sadd.s32 1, %s3 }
   0x7   : > { %4 = sbr.rel (%p4) target = $region22 } /* Start/End empty region 21 */
   0x8   : > { %s2 = sadd.s32 1, %s3 }
   0x9   : > { %s2 = sadd.s32 1, %s3 }
   0xa   : > { %s2 = sadd.s32 1, %s3 }
   0xb PF: > { %s2 = sadd.s32 1, %s3 } /* Start/End empty region 22 */
   0xc PF: > { %p28_p4 = scmp.ge.s32.totalorder %s2, 40 /* loop exit test */ } /* Start/End empty region 40 */
"""


def test_what_a_kernel_does_by_documents_counts_as_often_as_they_ask_for_it():
    assert bundle_cycles(ALTERNATIVES, 4, shares=(0.25, 0.75)) == 1 + 6 * 40 + round(40 * (2 / 4 + 0.25 * 1 + 0.75 * 3))
    assert bundle_cycles(ALTERNATIVES, 4, shares=(0.25, 0.25, 0.25, 0.25)) is None
    # A branch of one bundle for the first group of heads, one of two for the first block of each.
    first = "0x2   : > { %5 = sbr.rel (%p5) target = $region19 }\n   0x2   : > { %s2 = sadd.s32 1, %s3 }\n   "
    grouped = ALTERNATIVES.replace("0x2   :", f"{first}0x2   :").replace("region20 }", "region20 } /* region 19 */", 1)
    assert bundle_cycles(grouped, 4, 3, (0.25, 0.75)) == 1 + 7 * 40 + round(
        40 * (1 / 12 + 2 / 4 + 0.25 * 1 + 0.75 * 3)
    )

    name = "forward_kernel_of_128_by_256_512_pairs_in_4_blocks"
    halves = np.repeat([[1, 2]], 256, axis=1)
    assert stretch_shares(name, halves) == {256: 1.0, 512: 0.0}
    shifted = np.repeat([[1, 2]], [200, 312], axis=1)  # only the first part of 128 sees no more than 256 keys
    assert stretch_shares(name, shifted) == {256: 0.25, 512: 0.75}
    assert stretch_shares("forward_kernel_of_9_pairs_in_4_blocks", halves) == {}


def test_the_costliest_are_grouped_over_layers_and_say_where_they_come_from():
    first, second = costliest(PROGRAM, V5E, 2)
    assert first["shape"] == "bf16[8,128]" and first["op_name"] == "jit(step)/layers_N/dot_general"
    assert first["count"] == 5 and first["milliseconds"] == pytest.approx(5000 / 1.5e6)
    assert first["product_milliseconds"] == pytest.approx(1e3 * 5 * 2 * 8 * 128 * 128 / 197e12)
    assert first["source"] == "encoder.py:31"
    assert second["shape"] == "bf16[8,128]*" and second["count"] == 1


def test_a_product_over_a_batch_counts_its_batch_once():
    text = """ENTRY %main (a: bf16[6,4,5,7], b: bf16[6,4,11,7]) -> bf16[6,4,5,11] {
  %a = bf16[6,4,5,7]{3,2,1,0} parameter(0)
  %b = bf16[6,4,11,7]{3,2,1,0} parameter(1)
  ROOT %c = bf16[6,4,5,11]{3,2,1,0} convolution(%a, %b), window={size=6x4 stride=5x3 lhs_dilate=6x4}, \
dim_labels=01bf_01oi->01bf, backend_config={"estimated_cycles":"9"}
}
"""
    assert estimate(text, V5E).lines[0].product_flops == 2 * 6 * 4 * 5 * 7 * 11


# A loop of 3 turns around an elementwise fusion of 7 us; then a product of cuBLAS with its room to work in, a batched
# one of Triton's, a fusion of Triton's, cuDNN's attention of 512 queries to 504 keys, a sort, and a small copy.
GPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_add (p.0: f32[64,768]) -> f32[64,768] {
  %p.0 = f32[64,768]{1,0} parameter(0)
  ROOT %add.0 = f32[64,768]{1,0} add(%p.0, %p.0)
}

%gemm_fusion_dot_computation (l: bf16[6,64,32], r: bf16[6,96,32]) -> bf16[6,64,96] {
  %l = bf16[6,64,32]{2,1,0} parameter(0)
  %r = bf16[6,96,32]{2,1,0} parameter(1)
  ROOT %dot.1 = bf16[6,64,96]{2,1,0} dot(%l, %r), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, \
rhs_contracting_dims={2}
}

%body (state: (s32[], f32[64,768])) -> (s32[], f32[64,768]) {
  %state = (s32[], f32[64,768]{1,0}) parameter(0)
  %x = f32[64,768]{1,0} get-tuple-element(%state), index=1
  %loop_add_fusion = f32[64,768]{1,0} fusion(%x), kind=kLoop, calls=%fused_add, metadata={op_name="jit(step)/add"}, \
backend_config={"reification_cost":[{"end_to_end_cycles":1,"exec_time_us":7,"compute_time_us":1,\
"memory_access_time_us":6,"name":""},{"end_to_end_cycles":0,"exec_time_us":99,"compute_time_us":0,\
"memory_access_time_us":0,"name":"sol"}],"device_type":"DEVICE_TYPE_INVALID"}
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %made = (s32[], f32[64,768]{1,0}) tuple(%i, %loop_add_fusion)
}

%condition (state.1: (s32[], f32[64,768])) -> pred[] {
  %state.1 = (s32[], f32[64,768]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: bf16[64,768], b: bf16[768,3072], l.1: bf16[6,64,32], r.1: bf16[6,96,32]) -> f32[] {
  %a = bf16[64,768]{1,0} parameter(0)
  %b = bf16[768,3072]{1,0} parameter(1)
  %l.1 = bf16[6,64,32]{2,1,0} parameter(2)
  %r.1 = bf16[6,96,32]{2,1,0} parameter(3)
  %q = bf16[4,512,12,64]{3,2,1,0} parameter(4)
  %tuple.1 = (s32[], f32[64,768]{1,0}) tuple(%a, %b)
  %while.1 = (s32[], f32[64,768]{1,0}) while(%tuple.1), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"},"reification_cost":[],"device_type":"DEVICE_TYPE_INVALID"}
  %product = (f32[64,3072]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"lhs_stride":"49152"},\
"reification_cost":[{"exec_time_us":13929,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}]}
  %gemm_fusion_dot = bf16[6,64,96]{2,1,0} fusion(%l.1, %r.1), kind=kCustom, calls=%gemm_fusion_dot_computation, \
backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"},"reification_cost":[{"exec_time_us":4625,\
"compute_time_us":4621,"memory_access_time_us":76,"name":""}]}
  %softmax = f32[64,768]{1,0} fusion(%a), kind=kCustom, calls=%fused_add, \
backend_config={"fusion_backend_config":{"kind":"__triton"},"reification_cost":[{"exec_time_us":5636963852,\
"compute_time_us":3425165115,"memory_access_time_us":5465705596,"name":""},{"exec_time_us":5,"compute_time_us":2,\
"memory_access_time_us":4,"name":"indexing-cost-model"}]}
  %attention = (bf16[4,12,512,64]{3,1,2,0}, f32[4,12,512]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[4,512,12,64]{3,2,1,0}, \
bf16[4,504,12,64]{3,2,1,0}, bf16[4,504,12,64]{3,2,1,0}}, backend_config={"cudnn_fmha_backend_config": {\
"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["4", "12", "512", "504"], "tuple_shapes": []}}}
  %sort.1 = f32[64,3072]{1,0} sort(%product), dimensions={1}
  ROOT %copy.1 = f32[] copy(%sort.1)
}
"""


def test_for_gpus_each_fusion_counts_by_the_model_made_for_it_and_products_by_arithmetic_or_bytes():
    made = estimate(GPU_PROGRAM, H100)
    assert [(line.count, line.seconds, line.memory_seconds) for line in made.lines] == [
        (3, pytest.approx(7e-6), pytest.approx(6e-6)),
        (1, pytest.approx(5e-6), pytest.approx(4e-6)),
    ]
    plain, batched = made.products
    assert plain.product_flops == 2 * 64 * 768 * 3072 and batched.product_flops == 2 * 6 * 64 * 96 * 32
    assert plain.hbm_bytes == 2 * 64 * 768 + 2 * 768 * 3072 + 4 * 64 * 3072
    assert plain.seconds == plain.memory_seconds == plain.hbm_bytes / H100.bytes_per_second
    slow = H100._replace(product_fraction=0.01)
    assert estimate(GPU_PROGRAM, slow).products[0].seconds == plain.product_flops / (0.01 * 989e12)
    assert made.seconds == pytest.approx(26e-6 + plain.seconds + batched.seconds)
    assert [line.instruction.name for line in made.unestimated] == ["sort.1"]


def test_cudnn_attention_counts_its_products_and_its_bytes():
    (line,) = estimate(GPU_PROGRAM, H100).kernels
    products = 2 * 2 * (4 * 12 * 512 * 504 * 64)
    assert kernel_flops(line) == products
    moved = num_bytes("bf16[4,512,12,64]") * 4 + 4 * 4 * 12 * 512
    assert kernel_times(line, H100, 0.4, {}) == (products / (0.4 * 989e12), moved / H100.bytes_per_second, None)
    backward = GPU_PROGRAM.replace("fmhaSoftmax", "fmhaSoftmaxBackward")
    assert kernel_flops(estimate(backward, H100).kernels[0]) == products * 5 // 2


@pytest.mark.parametrize(
    ("window", "is_packed", "bias"),
    [(None, False, ""), (None, True, "f32[1,12,512,512]{3,2,1,0}, "), ((64, 32), True, "")],
)
def test_flash_attention_counts_the_tiles_that_meet(window, is_packed, bias):
    T, own, met = 512, 128, 64
    segments = np.repeat([[1, 1, 1, 2], [1, 2, 3, 0]], T // 4, axis=1).astype(np.int32)
    within = "" if window is None else "_within_{}_{}".format(*window)
    called = GPU_PROGRAM.replace("504", "512").replace("__cudnn$fmhaSoftmax", "__gpu$xla.gpu.triton").replace(
        "operand_layout_constraints={", "operand_layout_constraints={s32[4,4,2]{2,1,0}, " + bias
    )
    within += "_with_bias" * bool(bias)
    named = f', metadata={{op_name="jit(step)/query_gradient_kernel_of_{own}_by_{met}_tiles{within}/pallas_call"}}'
    called = called.replace('"tuple_shapes": []}}}', '"tuple_shapes": []}}}' + named)
    sees = np.ones((2, T, T), bool)
    if is_packed:
        sees = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, :, None]
    if window is not None:
        offset = np.arange(T) - np.arange(T)[:, None]
        sees &= (offset >= -window[0]) & (offset <= window[1])
    tiles = sees.reshape(2, T // own, own, T // met, met).any((2, 4)).sum()
    products = 3 * 2 * 4 * (own * met * tiles // 2) * 12 * 64
    assert kernel_flops(estimate(called, H100).kernels[0], segments if is_packed else None) == products


def test_hardware_that_cannot_be_compiled_for_is_an_error_that_says_what_can(monkeypatch):
    with pytest.raises(ConfigError, match="begins with its kind, h100, h200, a100: got v5e:2x2"):
        devices("gpu", "v5e:2x2")
    monkeypatch.setattr("flax_encoder.plan.targets.is_installed", lambda platform: False)
    with pytest.raises(ConfigError, match=r"its compiler.*pip install jax-cuda12-plugin==.*\[plan-gpu\]"):
        devices("gpu", "h100:1x1x1")


@pytest.mark.skipif(not is_installed("gpu"), reason="needs jax-cuda12-plugin, jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12")
def test_a_step_compiled_for_a_gpu_is_estimated_whole():
    from bench_compile import compile_step
    from bench_step import masked_rows

    from flax_encoder.config import MeshConfig
    from flax_encoder.training.sharding import make_mesh

    config = EncoderConfig(
        vocab_size=1024, num_layers=2, embed_dim=128, num_heads=2, mlp_dim=512, max_length=64, dtype="bfloat16"
    )
    mesh = make_mesh(MeshConfig(1, 1, 1), devices("gpu", "h100:1x1x1"))
    batch = masked_rows(config, 8, 64, 0.15, 0)
    compiled = compile_step(config, batch, mesh, "gpu", "cublas")
    made = estimate(compiled.as_text(), H100)
    flops = sum(line.count * line.product_flops for line in made.products)
    assert sum(line.count for line in made.kernels) == 3 * config.num_layers
    flops += sum(line.count * kernel_flops(line, batch["segment_ids"]) for line in made.kernels)
    model_flops = step_flops(config, batch["segment_ids"], batch["targets"].size)
    assert model_flops <= flops < 1.5 * model_flops
    assert made.lines and all(0 < line.seconds < 1e-3 for line in made.lines + made.products)
    seconds = report(compiled.as_text(), memory_of(compiled), H100, 0.4, {})["step_seconds"]
    assert seconds > model_flops / H100.peak_flops
    assert {line.instruction.opcode for line in made.unestimated} <= {"copy"}


@pytest.mark.parametrize("window", [None, 0, 3, 40, (2, 5), (0, 40)])
def test_visible_pairs_are_those_that_are_counted_one_by_one(window):
    segments = np.random.default_rng(0).integers(0, 4, (5, 23)).cumsum(1) // 9 % 5
    left, right = window if isinstance(window, tuple) else (23 if window is None else window,) * 2
    counted = sum(
        1 for row in segments for i in range(23) for j in range(23)
        if row[i] == row[j] != 0 and -left <= j - i <= right and len(set(row[min(i, j) : max(i, j) + 1])) == 1
    )  # fmt: skip
    assert 0 < visible_pairs(segments, window) == counted


def test_step_flops_are_the_sum_by_hand():
    config = EncoderConfig(
        vocab_size=41, num_layers=2, embed_dim=6, num_heads=3, mlp_dim=10, max_length=7, window=1, global_every=2
    )
    segments = np.asarray([[1, 1, 1, 2, 2, 0, 0]])  # 5 tokens; pairs: 9 + 4 in layer 0, 7 + 4 in layer 1
    projections, feed_forward, attention = 5 * 4 * 6 * 6, 5 * 2 * 6 * 10, 2 * 6 * (13 + 11)
    head = 3 * (6 * 6 + 6 * 41)
    assert step_flops(config, segments, 3) == 3 * 2 * (2 * (projections + feed_forward) + attention + head)
    head = 2 * (6 * 6 + 6 * 4)
    assert step_flops(config, segments, 2, 4) == 3 * 2 * (2 * (projections + feed_forward) + attention + head)
