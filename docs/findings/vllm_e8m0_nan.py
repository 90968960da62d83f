"""vLLM: is the NaN of e8m0, scale 255, read as 2^128? 0: seen, 1: not seen, 2: cannot run here.

vLLM cannot be imported without its compiled extensions: the one function is taken out of its file.
"""

import ast
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import torch

    VERSION = version("vllm")
    FOLDER = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])  # finds it, runs nothing of it
    FILE = FOLDER / "model_executor/layers/quantization/utils/mxfp8_utils.py"
    [FUNCTION] = [node for node in ast.parse(FILE.read_text()).body
                  if isinstance(node, ast.FunctionDef) and node.name == "dequant_mxfp8_to_bf16"]
except (ImportError, PackageNotFoundError, AttributeError, OSError, ValueError) as error:
    print(f"CANNOT RUN: {type(error).__name__}: {error}")
    sys.exit(2)

BLOCK = 32


def main() -> int:
    print(f"vllm {VERSION}, torch {torch.__version__}")
    print(f"torch's float8_e8m0fnu: 255 is {torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu).item()}")
    namespace = {"torch": torch, "MXFP8_BLOCK_SIZE": BLOCK}
    exec(compile(ast.Module([FUNCTION], []), str(FILE), "exec"), namespace)
    codes = torch.arange(BLOCK, dtype=torch.uint8).repeat(2)[None].view(torch.float8_e4m3fn)  # two blocks, 0 to 2^-4
    seen = False
    for scale in (252, 255):
        scales = torch.tensor([[127, scale]], dtype=torch.uint8)
        block = namespace["dequant_mxfp8_to_bf16"](codes, scales).flatten()[BLOCK:]
        nan, infinite = int(block.isnan().sum()), int(block.isinf().sum())
        print(f"scale {scale}, dequant_mxfp8_to_bf16: {nan} of {BLOCK} NaN, {infinite} infinite")
        seen |= scale == 255 and nan < BLOCK
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
