"""Which format a checkpoint's experts are stored in, by the quantization_config of its config.json."""

import json
from pathlib import Path

from moe_ref.checkpoints import awq, compressed_tensors, deepseek_fp8, gpt_oss_mxfp4, gptq
from moe_ref.checkpoints.config_values import Config
from moe_ref.checkpoints.quantised_format import QuantisedFormat
from moe_ref.contract.errors import UsageValueError

FORMATS = {module.METHOD: module.read_format
           for module in (deepseek_fp8, compressed_tensors, gptq, awq, gpt_oss_mxfp4)}
"""quant_method -> reader of the rest of the configuration."""


def find_format(path: str | Path) -> QuantisedFormat:
    """The format that config.json beside the checkpoint's files says; multimodal models have it in text_config.

    Raises UsageValueError where there is no such file or no quantization_config, and for one that is not known.
    """
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageValueError(f"{file}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageValueError(f"{file}: {type(config).__name__}, but should be a mapping")
    text = config.get("text_config")
    held = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if held is None:
        raise UsageValueError(f"{file}: no quantization_config; plain checkpoints are read by open_checkpoint")
    return read_format(f"{file}: quantization_config", held)


def read_format(where: str, config: Config) -> QuantisedFormat:
    """The format that a quantization_config says; `where` begins the message of a UsageValueError."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in FORMATS:
        raise UsageValueError(f"{where}: quant_method={method!r}, but should be one of {', '.join(FORMATS)}")
    return FORMATS[method](where, config)
