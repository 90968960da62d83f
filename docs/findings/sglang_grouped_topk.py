"""SGLang: does grouped_topk choose other groups than DeepSeek's gate? 0: seen, 1: not seen, 2: cannot run here.

SGLang cannot be imported without its compiled extensions: the two functions are taken out of their file.
"""

import ast
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional

try:
    import torch

    VERSION = version("sglang")
    FOLDER = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])  # finds it, runs nothing of it
    FILE = FOLDER / "srt/layers/moe/topk.py"
    TREE = ast.parse(FILE.read_text())
    FUNCTIONS = [node for node in TREE.body if isinstance(node, ast.FunctionDef)
                 and node.name in ("grouped_topk_gpu", "biased_grouped_topk_impl")]
    assert len(FUNCTIONS) == 2, f"not both functions in {FILE.name}"
except (ImportError, PackageNotFoundError, AttributeError, OSError, AssertionError) as error:
    print(f"CANNOT RUN: {type(error).__name__}: {error}")
    sys.exit(2)

TOKENS, EXPERTS, TOP_K, GROUPS, KEPT = 512, 64, 8, 8, 4


def functions():
    """Theirs without @torch.compile; the epsilon that they divide by does not change a choice."""
    for function in FUNCTIONS:
        function.decorator_list = []
    namespace = {"torch": torch, "Optional": Optional, "_RENORMALIZE_SUM_EPSILON": 1e-20}
    exec(compile(ast.Module(FUNCTIONS, []), str(FILE), "exec"), namespace)
    return namespace["grouped_topk_gpu"], namespace["biased_grouped_topk_impl"]


def reference(scores, rule):
    groups = scores.view(TOKENS, GROUPS, -1)
    of_group = groups.amax(-1) if rule == "max" else groups.topk(2).values.sum(-1)
    kept = torch.zeros(TOKENS, GROUPS, dtype=torch.bool).scatter_(1, of_group.topk(KEPT).indices, True)
    return groups.masked_fill(~kept[..., None], float("-inf")).flatten(1).topk(TOP_K).indices.sort().values


def main() -> int:
    print(f"sglang {VERSION}, torch {torch.__version__}")
    print(f"{TOKENS} tokens, {EXPERTS} experts in {GROUPS} groups, {KEPT} of them kept, top {TOP_K}")
    without, biased = functions()
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, EXPERTS)
    scores = torch.sigmoid(logits)
    chosen = {"no bias": without(logits, logits, TOP_K, True, GROUPS, KEPT, scoring_func="sigmoid")[1],
              "bias of zeros": biased(logits, logits, torch.zeros(EXPERTS), TOP_K, True, GROUPS, KEPT)[1]}
    seen = False
    # Gate.forward of DeepSeek-V3: the maximum of a group without a bias, the sum of its two largest with one.
    for name, rule in (("no bias", "max"), ("bias of zeros", "top2")):
        ids = chosen[name].long().sort().values
        apart = {other: int((ids != reference(scores, other)).any(1).sum()) for other in ("max", "top2")}
        print(f"sigmoid, {name}: tokens whose experts differ from the maximum rule {apart['max']}, "
              f"from the sum of the two largest {apart['top2']}, from DeepSeek's {apart[rule]}")
        seen |= apart[rule] > 0
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
