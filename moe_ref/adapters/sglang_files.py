"""Source files of SGLang that its experts live in, with what they import of the rest of it (seen: sglang 0.5.23)."""

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import torch
from torch.nn.functional import gelu, silu

from moe_ref.adapters.aligned_rows import aligned_rows
from moe_ref.adapters.interpreted import interpret_on_cpu, round_away
from moe_ref.adapters.single_file import absent, load

_KERNELS = "sglang.kernels.ops"
_MOE = "sglang.srt.layers.moe"
_TRITON = f"{_MOE}.moe_runner.triton_utils"


def _no(*_: object, **__: object) -> bool:
    return False


def _as_on(cuda: bool) -> dict[str, object]:
    """sglang.srt.utils, which says where one is."""
    return {"is_cuda": lambda: cuda, **dict.fromkeys(
        ("is_hip", "is_cpu", "is_xpu", "is_musa", "is_npu", "is_sm90_supported", "cpu_has_amx_support",
         "get_bool_env_var"), _no)}


_CONTEXT = {"get_exec": lambda: SimpleNamespace(
                moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
                deterministic=SimpleNamespace(enable_deterministic_inference=False, rl_on_policy_target=None)),
            "get_parallel": lambda: SimpleNamespace(tp_group=None), "publish_role": lambda: None}
_COMMON = {"sglang.kernels.jit.utils": {"is_arch_support_pdl": _no},
           "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": _no},
           "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_USE_AITER=SimpleNamespace(get=_no))},
           "sglang.srt.runtime_context": _CONTEXT,
           f"{_MOE}.utils": {"get_moe_padding_size": lambda *_: 0, **absent("get_moe_runner_backend")}}


def _align(topk_ids: torch.Tensor, block_size: int,
           num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The CUDA operator in plain torch: slots with id -1 get blocks of their own, whose expert is -1."""
    slots, experts, rows = aligned_rows(topk_ids, block_size, num_experts, keep_none=True)
    return slots, experts, torch.tensor([rows], dtype=torch.int32)


def _gated(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """A CUDA operator on (gate, up) in plain torch: in fp32, rounded once; filtered rows are computed, and not read."""
    def into(rows: torch.Tensor, output: torch.Tensor, **_: object) -> None:
        gate, up = rows.float().chunk(2, dim=-1)
        output.copy_(function(gate) * up)

    return into


def _add_up(rows_TKH: torch.Tensor, output_TH: torch.Tensor, scale: float) -> None:
    """sgl_kernel.moe_sum_reduce in plain torch."""
    output_TH.copy_(rows_TKH.float().sum(1) * scale)


def _per_token_quant_fp8(rows: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    """A CUDA operator in plain torch: in fp32, by the largest magnitude over 448."""
    output_s.copy_(rows.float().abs().amax(-1, keepdim=True) / 448)
    codes = rows.float() / output_s.where(output_s > 0, 1.0)
    output_q.copy_(codes.clamp(-448, 448).to(output_q.dtype))


def _quantizers(quantized: Callable[[torch.Tensor, torch.Tensor], None]) -> dict[str, dict[str, object]]:
    """The quantisers that fused_moe_triton_kernels.py imports, told that there is no CUDA: then its Triton kernels."""
    arguments = {"sglang.srt.utils": {**_as_on(cuda=False), **absent("ceil_align")}}
    fp8 = load(f"{_KERNELS}.quantization.fp8_kernel", {
        **_COMMON, **arguments, f"{_KERNELS}.quantization.fp8_utils": absent("fp8_dtype_to_triton"),
        "sglang.srt.utils.patch_torch": absent("register_fake_if_exists")})
    int8 = load(f"{_KERNELS}.quantization.int8_kernel", {
        **_COMMON, "sglang.srt.utils": {**_as_on(cuda=False), "is_hip": lambda: not torch.cuda.is_available()}})
    if not torch.cuda.is_available():
        vars(fp8)["sgl_per_token_quant_fp8"] = _per_token_quant_fp8
        vars(int8)["libdevice"] = SimpleNamespace(round=round_away)
    interpret_on_cpu(fp8, int8)

    def watched(function: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable:
        def call(*arguments: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
            codes, scales = function(*arguments, **named)
            quantized(codes, scales)
            return codes, scales

        return call

    return {f"{_KERNELS}.quantization.fp8_kernel": {
                "sglang_per_token_group_quant_fp8": watched(fp8.per_token_group_quant_fp8),
                "scaled_fp8_quant": watched(fp8.scaled_fp8_quant), **absent("per_token_group_quant_fp8")},
            f"{_KERNELS}.quantization.int8_kernel": {
                "per_token_quant_int8": watched(int8.per_token_quant_int8),
                **absent("per_token_group_quant_int8", "sglang_per_token_group_quant_int8")}}


def fused_moe(quantized: Callable[[torch.Tensor, torch.Tensor], None] = lambda codes, scales: None) -> ModuleType:
    """moe_runner/triton_utils/fused_moe.py with `fused_experts_impl`; its kernels are interpreted on CPU tensors.

    quantized: is shown codes and scales of the rows of each product, where they are rounded and tensors are on a CPU.
    """
    kernels = load(f"{_KERNELS}.moe.fused_moe_triton_kernels", {
        **_COMMON, "sglang.srt.utils": _as_on(cuda=True), **_quantizers(quantized)})
    interpret_on_cpu(kernels)
    tiles = load(f"{_TRITON}.fused_moe_triton_config", {
        **_COMMON, "sglang.srt.utils": {**_as_on(cuda=True), **absent("get_device_name")}})
    return load(f"{_TRITON}.fused_moe", {
        **_COMMON, "sglang.srt.utils": _as_on(cuda=True),
        f"{_KERNELS}.moe.fused_moe_triton_kernels": vars(kernels),
        f"{_KERNELS}.activation.activation": {
            "silu_and_mul": _gated(silu), "gelu_and_mul": _gated(gelu),
            "gelu_tanh_and_mul": _gated(lambda gate: gelu(gate, approximate="tanh")),
            **absent("silu_and_mul_with_activation_rounding")},
        f"{_KERNELS}.quantization.per_token_group_quant": absent("per_token_group_quant"),
        "sgl_kernel": {"moe_sum_reduce": _add_up},
        "sglang.srt.distributed.device_communicators.pynccl_allocator": {
            "use_symmetric_memory": lambda *_, **__: nullcontext()},
        "sglang.srt.layers.dp_attention": {"is_allocation_symmetric": _no},
        f"{_MOE}.moe_runner": {"MoeRunnerConfig": SimpleNamespace},
        # The functions are called as they are, not as operators of torch.
        "sglang.srt.utils.custom_op": {"register_custom_op": lambda **_: lambda function: function},
        # The lookup names a file by the device and imports the package; without one there are the defaults.
        f"{_TRITON}.fused_moe_triton_config": {
            "get_config_dtype_str": tiles.get_config_dtype_str,
            "try_get_optimal_moe_config": lambda w1, w2, top_k, dtype, M, block_shape=None, **_: (
                tiles.get_default_config(M, w2[0], w2[2], w1[2], top_k, dtype, False, block_shape), (None, None))},
        f"{_TRITON}.moe_align_block_size": {"moe_align_block_size": _align}})


class _FusedOp(torch.nn.Module):
    """SGLang's base class of operators, which takes the method of the platform; here there is one."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The subclass's torch code."""
        return self.forward_native(rows)  # type: ignore[not-callable]


def native_moe() -> ModuleType:
    """moe/fused_moe_native.py with `moe_forward_native`."""
    activation = load("sglang.srt.layers.activation", {
        **_COMMON, "sglang.srt.utils": {**_as_on(cuda=False), **absent("set_weight_attrs")},
        "sglang.kernels.fused_op": {"BaseFusedOp": _FusedOp}, "sglang.srt.distributed": absent("divide"),
        "sglang.srt.layers.quantization.base_config": absent("QuantizationConfig"),
        "sglang.srt.model_executor.cuda_graph_config": absent("Backend", "Phase", "check_cuda_graph_backend"),
        "sglang.utils": absent("resolve_obj_by_qualname")})
    names = ("GeluAndMul", "SiluAndMul", "SituAndMul")
    clamped = "swiglu_gpt_oss_sigmoid_alpha"
    return load(f"{_MOE}.fused_moe_native", {
        "sglang.srt.layers.activation": {name: getattr(activation, name) for name in names},
        f"{_MOE}.moe_runner": absent("MoeRunnerConfig"),
        f"{_TRITON}.fused_moe": {clamped: getattr(fused_moe(), clamped)},
        f"{_MOE}.token_dispatcher": absent("StandardCombineInput", "StandardDispatchOutput"),
        f"{_MOE}.topk": absent("StandardTopKOutput")})
