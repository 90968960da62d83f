"""The fp8 of DeepSeek-V3 and of what follows it: weights in e4m3, one scale for every 128 x 128 block.

    value = weight * weight_scale_inv[row // 128, column // 128]

The name says inverse, but the scale multiplies (DeepSeek-V3 inference/kernel.py, weight_dequant). Released files hold
fp32 scales, some bf16 (Qwen3) or powers of two (scale_fmt ue8m0); all are read into fp32.
"""

from functools import partial

from moe_ref.checkpoints.config_values import Config, check_values, strings
from moe_ref.checkpoints.not_converted import by_transformers
from moe_ref.checkpoints.quantised_format import QuantisedFormat
from moe_ref.checkpoints.scaled_weight import encode_scaled, scaled_parts, store_scaled
from moe_ref.contract.vocabulary import Scheme

METHOD, SCALE = "fp8", "weight_scale_inv"


def read_format(where: str, config: Config) -> QuantisedFormat:
    """The format that a quantization_config with quant_method fp8 says; raises UsageValueError for other blocks."""
    check_values(where, config, weight_block_size=([128, 128],), activation_scheme=("dynamic", None),
                 fmt=("e4m3", None), scale_fmt=("ue8m0", "float", None))
    return QuantisedFormat(
        name=METHOD, scheme=Scheme.FP8_BLOCK, parts=scaled_parts(Scheme.FP8_BLOCK, SCALE),
        encode=partial(encode_scaled, Scheme.FP8_BLOCK, SCALE), store=partial(store_scaled, SCALE),
        skips=partial(by_transformers, strings(where, config, "modules_to_not_convert")))
