"""vLLM: does grouped_topk choose other groups than DeepSeek's gate? 0: seen, 1: not seen, 2: cannot run here.

vLLM cannot be imported without its compiled extensions: the one function is taken out of its file.
"""

import ast
import importlib.util
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import torch

    VERSION = version("vllm")
    FOLDER = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])  # finds it, runs nothing of it
    FILE = FOLDER / "model_executor/layers/fused_moe/router/grouped_topk_router.py"
    [FUNCTION] = [node for node in ast.parse(FILE.read_text()).body
                  if isinstance(node, ast.FunctionDef) and node.name == "grouped_topk"]
except (ImportError, PackageNotFoundError, AttributeError, OSError, ValueError) as error:
    print(f"CANNOT RUN: {type(error).__name__}: {error}")
    sys.exit(2)

TOKENS, EXPERTS, TOP_K, GROUPS, KEPT = 512, 64, 8, 8, 4


def grouped_topk():
    """Their function without @torch.compile, with the settings that leave the fused CUDA kernel alone."""
    FUNCTION.decorator_list = []
    settings = types.SimpleNamespace(VLLM_USE_FUSED_MOE_GROUPED_TOPK=False, VLLM_BATCH_INVARIANT=False)
    namespace = {"torch": torch, "envs": settings, "current_platform": None}
    exec(compile(ast.Module([FUNCTION], []), str(FILE), "exec"), namespace)
    return namespace["grouped_topk"]


def reference(scores, rule):
    groups = scores.view(TOKENS, GROUPS, -1)
    of_group = groups.amax(-1) if rule == "max" else groups.topk(2).values.sum(-1)
    kept = torch.zeros(TOKENS, GROUPS, dtype=torch.bool).scatter_(1, of_group.topk(KEPT).indices, True)
    return groups.masked_fill(~kept[..., None], float("-inf")).flatten(1).topk(TOP_K).indices.sort().values


def main() -> int:
    print(f"vllm {VERSION}, torch {torch.__version__}")
    print(f"{TOKENS} tokens, {EXPERTS} experts in {GROUPS} groups, {KEPT} of them kept, top {TOP_K}")
    function = grouped_topk()
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, EXPERTS)
    seen = False
    for scoring in ("softmax", "sigmoid"):
        scores = torch.softmax(logits, -1) if scoring == "softmax" else torch.sigmoid(logits)
        chosen = [function(logits, logits, TOP_K, True, GROUPS, KEPT, scoring, 1.0, bias)[1].long().sort().values
                  for bias in (None, torch.zeros(EXPERTS))]
        # Gate.forward of DeepSeek-V3: the maximum of a group without a bias, the sum of its two largest with one.
        for name, ids, rule in (("no bias", chosen[0], "max"), ("bias of zeros", chosen[1], "top2")):
            apart = {other: int((ids != reference(scores, other)).any(1).sum()) for other in ("max", "top2")}
            print(f"{scoring}, {name}: tokens whose experts differ from the maximum rule {apart['max']}, "
                  f"from the sum of the two largest {apart['top2']}, from DeepSeek's {apart[rule]}")
            seen |= apart[rule] > 0
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
