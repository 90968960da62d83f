"""SGLang: are scales 0 and 255 of e8m0 read as 0 and infinity? 0: seen, 1: not seen, 2: cannot run here.

SGLang cannot be imported without its compiled extensions: the two functions are taken out of their file.
"""

import ast
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import torch

    VERSION = version("sglang")
    FOLDER = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])  # finds it, runs nothing of it
    FILE = FOLDER / "srt/layers/quantization/mxfp8_block_convert.py"
    FUNCTIONS = [node for node in ast.parse(FILE.read_text()).body if isinstance(node, ast.FunctionDef)
                 and node.name in ("_ue8m0_to_fp32", "dequant_mxfp8_2d_to_bf16")]
    assert len(FUNCTIONS) == 2, f"not both functions in {FILE.name}"
except (ImportError, PackageNotFoundError, AttributeError, OSError, AssertionError) as error:
    print(f"CANNOT RUN: {type(error).__name__}: {error}")
    sys.exit(2)

BLOCK = 32


def main() -> int:
    print(f"sglang {VERSION}, torch {torch.__version__}")
    namespace = {"torch": torch, "MXFP8_BLOCK_SIZE": BLOCK}
    exec(compile(ast.Module(FUNCTIONS, []), str(FILE), "exec"), namespace)
    codes = torch.arange(96, 96 + BLOCK, dtype=torch.uint8)
    codes[-1] = 0  # 127 is the NaN of e4m3; the others are 32 to 448
    numbers = codes.view(torch.float8_e4m3fn).double()
    seen = []
    for scale in (0, 1, 245, 255):
        block = namespace["dequant_mxfp8_2d_to_bf16"](
            codes.view(torch.float8_e4m3fn)[None], torch.tensor([[scale]], dtype=torch.uint8))[0].double()
        exact = torch.tensor([scale], dtype=torch.uint8).view(torch.float8_e8m0fnu).double()
        same = int(torch.isclose(block, numbers * exact, rtol=0, atol=0, equal_nan=True).sum())
        print(f"scale {scale}, {float(exact):.4g} in torch's float8_e8m0fnu: {same} of {BLOCK} as they should be, "
              f"{int((block == 0).sum())} zero, {int(block.isnan().sum())} NaN, {int(block.isinf().sum())} infinite")
        seen.append(scale in (0, 255) and same < BLOCK)
    print("SEEN" if any(seen) else "NOT SEEN")
    return 0 if any(seen) else 1


if __name__ == "__main__":
    sys.exit(main())
