"""Source files of vLLM that its experts live in, with what they import of the rest of it (seen: vllm 0.33.0)."""

import logging
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
import triton
import triton.language as tl

from moe_ref.adapters.aligned_rows import aligned_rows
from moe_ref.adapters.interpreted import interpret_on_cpu, round_int8
from moe_ref.adapters.single_file import absent, load

_LAYERS = "vllm.model_executor.layers"
_MOE = f"{_LAYERS}.fused_moe"
_QUANTIZATION = f"{_LAYERS}.quantization"
_PLATFORM = SimpleNamespace(is_rocm=lambda: False, is_xpu=lambda: False, is_cpu=lambda: True,
                            is_cuda=lambda: False, is_cuda_alike=lambda: False, is_fp8_fnuz=lambda: False,
                            is_device_capability=lambda _: False, simple_compile_backend="eager",
                            fp8_dtype=lambda: torch.float8_e4m3fn)
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


def activations() -> ModuleType:
    """layers/activation.py: `SiluAndMul.forward_native` and the like."""
    return load(f"{_LAYERS}.activation", {
        **_COMMON, "vllm": absent("ir"), f"{_LAYERS.rpartition('.')[0]}.custom_op": {"CustomOp": _CustomOp},
        "vllm.utils.collection_utils": {"LazyDict": dict}})


def _quantizers() -> ModuleType:
    """fused_moe/utils.py with `moe_kernel_quantize_input`, and the files with its kernels; of rows with one scale the
    CUDA operator is QuantFP8.forward_native of quantization/input_quant_fp8.py.
    """
    utils = f"{_QUANTIZATION}.utils"
    words = load(f"{utils}.quant_utils", {
        **_COMMON, "vllm.distributed.parallel_state": absent("get_ep_group", "get_tp_group"),
        "vllm.scalar_type": vars(load("vllm.scalar_type", {}))})
    scales = {"is_deep_gemm_e8m0_used": lambda: False,
              **absent("DeepGemmQuantScaleFMT", "get_tma_aligned_size", "is_deep_gemm_supported",
                       "transform_sf_into_required_layout")}
    operators = {"vllm._aiter_ops": absent("rocm_aiter_ops"), "vllm.utils.deep_gemm": scales,
                 f"{utils}.quant_utils": vars(words)}
    rows = load(f"{_QUANTIZATION}.input_quant_fp8", {
        **_COMMON, **operators, "vllm": absent("_custom_ops"),
        "vllm.model_executor.custom_op": {"CustomOp": _CustomOp}}).QuantFP8

    def scaled_fp8_quant(input: torch.Tensor, scale: None, use_per_token_if_dynamic: bool) -> object:
        assert use_per_token_if_dynamic
        options = SimpleNamespace(is_group_quant=False, static=False, group_shape=words.GroupShape.PER_TOKEN,
                                  num_token_padding=None)
        return rows.forward_native(options, input, scale)

    fp8 = load(f"{utils}.fp8_utils", {
        **_COMMON, **operators, "vllm.envs": {}, "vllm._custom_ops": {},
        f"{utils}.w8a8_utils": absent("all_close_1d", "per_tensor_dequantize"),
        "vllm.model_executor.parameter": absent("BlockQuantScaleParameter", "ChannelQuantScaleParameter",
                                                "PerTensorScaleParameter"),
        "vllm.model_executor.utils": absent("set_weight_attrs"),
        "vllm.utils.platform_utils": absent("get_device_name_as_file_name")})
    int8 = load(f"{utils}.int8_utils", _COMMON)
    if not torch.cuda.is_available():
        vars(int8)["round_int8"] = round_int8
    interpret_on_cpu(fp8, int8)
    return load(f"{_MOE}.utils", {
        **_COMMON, **operators, "vllm.envs": {}, "vllm._custom_ops": {"scaled_fp8_quant": scaled_fp8_quant},
        f"{utils}.config_utils": absent("is_shared_expert_quant_fse_compatible"),
        f"{utils}.fp8_utils": vars(fp8), f"{utils}.int8_utils": vars(int8),
        f"{utils}.mxfp4_utils": absent("quant_dequant_mxfp4", "xpu_mxfp4_quantize"),
        f"{utils}.mxfp6_utils": absent("quant_dequant_mxfp6"),
        f"{utils}.mxfp8_utils": absent("mxfp8_e4m3_quantize", "xpu_mxfp8_quantize"),
        f"{utils}.nvfp4_emulation_utils": absent("ref_nvfp4_quant_dequant"),
        f"{utils}.w8a8_utils": absent("per_tensor_dequantize"),
        "vllm.model_executor.models.utils": absent("PPMissingLayer"),
        "vllm.utils.math_utils": {"cdiv": triton.cdiv}})


def fused_moe(activate: Callable[..., None], add_up: Callable[..., None],
              quantized: Callable[[torch.Tensor, torch.Tensor], None]) -> ModuleType:
    """fused_moe/fused_moe.py with `fused_experts_impl`; its kernels are interpreted on CPU tensors.

    activate, add_up: stand for the CUDA operators behind apply_moe_activation and moe_sum. quantized: is shown codes
    and scales of the rows of each product, where they are rounded and tensors are on a CPU.
    """
    quantizers = _quantizers()

    def quantize(**arguments: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, scales = quantizers.moe_kernel_quantize_input(**arguments)
        if scales is not None:
            quantized(rows, scales)
        return rows, scales

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
        f"{_MOE}.config": {"_get_config_dtype_str": _config_dtype,
                           **absent("FUSED_MOE_UNQUANTIZED_CONFIG", "FusedMoEQuantConfig")},
        f"{_MOE}.moe_align_block_size": {"moe_align_block_size": align.moe_align_block_size},
        f"{_MOE}.utils": {"moe_kernel_quantize_input": quantize, "enable_swap_ab": quantizers.enable_swap_ab,
                          "resolve_moe_use_td": lambda: False, "warn_if_moe_use_td_ineffective": lambda *_, **__: None},
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


def _config_dtype(dtype: torch.dtype, **uses: bool) -> str | None:
    """The word for encoded weights by which default tiles are chosen; plain ones need none."""
    return next((name.removeprefix("use_") for name, is_used in uses.items() if is_used), None)


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
