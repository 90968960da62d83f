"""Source files of vLLM that its experts live in, with what they import of the rest of it (seen: vllm 0.33.0)."""

import logging
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
import triton
import triton.language as tl

from moe_ref.adapters.aligned_rows import aligned_rows
from moe_ref.adapters.interpreted import interpret_on_cpu
from moe_ref.adapters.single_file import absent, load

_LAYERS = "vllm.model_executor.layers"
_MOE = f"{_LAYERS}.fused_moe"
_PLATFORM = SimpleNamespace(is_rocm=lambda: False, is_xpu=lambda: False, is_cpu=lambda: True,
                            is_cuda_alike=lambda: False)
_COMMON = {"vllm.logger": {"init_logger": logging.getLogger},
           "vllm.platforms": {"current_platform": _PLATFORM, **absent("CpuArchEnum")},
           "vllm.triton_utils": {"triton": triton, "tl": tl}}


class _CustomOp(torch.nn.Module):
    """vLLM's base class of operators, which registers them by name."""

    @staticmethod
    def register(name: str) -> Callable[[type], type]:
        """Leaves the class as it is."""
        return lambda cls: cls


def _align(topk_ids: torch.Tensor, num_experts: int, block_size: int, sorted_ids: torch.Tensor,
           expert_ids: torch.Tensor, num_tokens_post_pad: torch.Tensor, expert_map: None, scatter_idx: None) -> None:
    """The CUDA operator in plain torch; ids that are no expert's are left out."""
    assert (expert_map, scatter_idx) == (None, None)
    slots, experts, rows = aligned_rows(topk_ids, block_size, num_experts, keep_none=False)
    sorted_ids[:rows], expert_ids[:len(experts)] = slots, experts
    num_tokens_post_pad.fill_(rows)


def _not_quantized(A: torch.Tensor, A_scale: None, quant_dtype: None, **_: object) -> tuple[torch.Tensor, None]:
    assert (quant_dtype, A_scale) == (None, None)
    return A, A_scale


def activations() -> ModuleType:
    """layers/activation.py: `SiluAndMul.forward_native` and the like."""
    return load(f"{_LAYERS}.activation", {
        **_COMMON, "vllm": absent("ir"), f"{_LAYERS.rpartition('.')[0]}.custom_op": {"CustomOp": _CustomOp},
        "vllm.utils.collection_utils": {"LazyDict": dict}})


def fused_moe(activate: Callable[..., None], add_up: Callable[..., None]) -> ModuleType:
    """fused_moe/fused_moe.py with `fused_experts_impl`; its kernels are interpreted on CPU tensors.

    activate, add_up: stand for the CUDA operators behind apply_moe_activation and moe_sum.
    """
    kinds = load(f"{_MOE}.activation", _COMMON)
    operators = {"moe_align_block_size": _align, "moe_sum": add_up}
    align = load(f"{_MOE}.moe_align_block_size", {
        **_COMMON, "vllm._custom_ops": operators,
        "vllm.utils.math_utils": {"round_up": lambda size, unit: -(-size // unit) * unit}})
    module = load(f"{_MOE}.fused_moe", {
        **_COMMON, "vllm._custom_ops": operators, "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        f"{_MOE}.modular_kernel": {"FusedMoEExpertsModular": SimpleNamespace(
            adjust_N_for_activation=lambda size, kind: size // 2 if kind.is_gated else size)},
        f"{_MOE}.activation": {"MoEActivation": kinds.MoEActivation, "apply_moe_activation": activate},
        f"{_MOE}.config": {"_get_config_dtype_str": lambda **_: None,
                           **absent("FUSED_MOE_UNQUANTIZED_CONFIG", "FusedMoEQuantConfig")},
        f"{_MOE}.moe_align_block_size": {"moe_align_block_size": align.moe_align_block_size},
        f"{_MOE}.utils": {"moe_kernel_quantize_input": _not_quantized, "resolve_moe_use_td": lambda: False,
                          "warn_if_moe_use_td_ineffective": lambda *_, **__: None, **absent("enable_swap_ab")},
        "vllm.triton_utils.allocation": absent("set_triton_allocator"),
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.platform_utils": absent("get_device_name_as_file_name"),
        # The functions are called as they are, not as operators of torch.
        "vllm.utils.torch_utils": {"direct_register_custom_op": lambda **_: None}})
    if not torch.cuda.is_available():
        # The lookup names a file by the device and imports the package; without one there are the defaults.
        vars(module)["try_get_optimal_moe_config"] = _default_config(module)
    interpret_on_cpu(module)
    return module


def _default_config(module: ModuleType) -> Callable[..., dict[str, int]]:
    def config(w1_shape: torch.Size, w2_shape: torch.Size, top_k: int, dtype: str | None, M: int,
               block_shape: list[int] | None = None) -> dict[str, int]:
        return module.get_default_config(M, w2_shape[0], w2_shape[2], w1_shape[2], top_k, dtype, block_shape)

    return config


def naive() -> SimpleNamespace:
    """The reference in three functions, `prepare`, `experts` and `reduce`, methods of classes made without their
    base.
    """
    kernel = {"ExpertTokensMetadata": SimpleNamespace, **{name: type(name, (), {}) for name in (
            "FusedMoEExpertsModular", "FusedMoEPrepareAndFinalizeModular", "TopKWeightAndReduce")},
        **absent("FusedMoEActivationFormat", "PrepareResultType")}
    reduce = load(f"{_MOE}.topk_weight_and_reduce", {"vllm._custom_ops": {}, f"{_MOE}.modular_kernel": kernel})
    reductions = {name: getattr(reduce, name) for name in
                  ("TopKWeightAndReduceDelegate", "TopKWeightAndReduceNaiveBatched")}
    config = absent("FusedMoEConfig", "FusedMoEParallelConfig", "FusedMoEQuantConfig")
    prepare = load(f"{_MOE}.prepare_finalize.batched", {
        f"{_MOE}.modular_kernel": kernel, f"{_MOE}.config": config, f"{_MOE}.topk_weight_and_reduce": reductions,
        f"{_MOE}.utils": {"normalize_scales_shape": lambda scales: scales, **absent("moe_kernel_quantize_input")}})
    batched = load(f"{_MOE}.experts.fused_batched_moe", {
        **_COMMON, f"{_MOE}.modular_kernel": kernel, f"{_MOE}.config": config,
        f"{_MOE}.activation": absent("MoEActivation", "apply_moe_activation_masked_supported"),
        f"{_MOE}.fused_moe": absent("try_get_optimal_moe_config"), f"{_MOE}.topk_weight_and_reduce": reductions,
        f"{_MOE}.utils": {"_resize_cache": lambda rows, shape: rows.flatten()[:shape[0] * shape[1]].view(*shape),
                          **absent("moe_kernel_quantize_input", "normalize_batched_scales_shape")},
        f"{_LAYERS}.quantization.utils.quant_utils": absent(
            "QuantKey", "group_broadcast", "kFp8Dynamic128Sym", "kFp8DynamicTensorSym", "kFp8DynamicTokenSym",
            "kFp8Static128BlockSym", "kFp8StaticChannelSym", "kFp8StaticTensorSym"),
        "vllm.triton_utils": {"triton": triton, "tl": tl, **absent("use_tensor_descriptor")},
        "vllm.triton_utils.allocation": absent("set_triton_allocator")})
    if not torch.cuda.is_available():
        # It asks for the current stream of an accelerator.
        vars(batched)["_is_capturing_or_compiling"] = lambda: False
    return SimpleNamespace(prepare=prepare.BatchedPrepareAndFinalize.prepare,
                           experts=batched.NaiveBatchedExperts.apply,
                           reduce=reduce.TopKWeightAndReduceNaiveBatched.apply)
