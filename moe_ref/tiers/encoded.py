"""Cases of encoded experts: a pairwise cover for the default tiers, and every scheme under every degree for the rest.

Sizes hold whole blocks of 128, and parts of one; over three and eight ranks cuts fall inside blocks, and of the odd
width inside bytes of two codes.
"""

from itertools import cycle, product

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Data, Dtype, Pattern, Scheme
from moe_ref.tiers.cover import Cover, Row

SCHEMES = tuple(scheme for scheme in Scheme if scheme is not Scheme.PLAIN)

SIZES = {"T33.H256.I384.E4.K2": "whole blocks of 128", "T17.H160.I136.E6.K3": "blocks of 128 that are not whole",
         "T9.H96.I257.E5.K1": "an odd width, 65 columns of the last block of two"}

SPREADS = {"": "one all-reduce", "gather": "no row split", "split3.1": "uneven shares",
           "ep2": "experts over two ranks", "ep2-tokensep": "rows travel to their experts",
           "reducescatter-tokenstp": "sharded tokens"}
FURTHER_SPREADS = {"allreducerows": "one all-reduce before the merge",
                   "reducescatter": "reduce-scatter and all-gather",
                   "ep3-roundrobin-copy0.3": "experts in turn, two of them twice",
                   "split1.0": "a rank without columns, whose rows have a fixed scale all the same"}
"""Those that meet every scheme outside the default tiers alone."""

AXES: dict[str, tuple] = {
    "scheme": SCHEMES, "tp": (1, 2, 3, 4, 8), "dtype": (Dtype.BF16, Dtype.FP32, Dtype.FP16), "sizes": tuple(SIZES),
    "data": (Data.UNIT, Data.EXTREME, Data.OUTLIER, Data.LARGE, Data.EQUAL), "spread": tuple(SPREADS),
    "pattern": (Pattern.UNIFORM, Pattern.ZIPF, Pattern.EMPTY, Pattern.ALL_TO_ONE),
    "options": ("", "sh136-shgate-res", "mlpbias"),
}
"""Every axis and its values, the plainest first."""

PLAIN: Row = {name: values[0] for name, values in AXES.items()}

SMOKE = ("v1-T17.H160.I136.E6.K3-bf16-fp8block-norm-tp3", "v1-T17.H160.I136.E6.K3-bf16-gptqorder32-norm-tp2",
         "v1-T17.H160.I136.E6.K3-bf16-mxfp4-norm-tp2-ep2")


QUICK_MODELS = ("v1-granite3.1b.a400m.T8.E4-bf16-mxfp4-tp4", "v1-granite3.1b.a400m.T8.E4-bf16-fp8block-tp8")
"""Real widths that two cores manage in seconds; eight ranks cut the second's blocks of 128 in half."""

MODELS = ("v1-qwen3.30b.a3b.T4.E4-bf16-fp8block-tp8", "v1-gptoss.20b.T4.E4-bf16-mxfp4-tp2",
          "v1-qwen3.30b.a3b.T4.E4-bf16-awq-tp4", "v1-qwen3.30b.a3b.T4.E4-bf16-gptqorder-tp3",
          "v1-olmoe.1b.7b.T4.E4-bf16-fp8row-tp2", "v1-gptoss.20b.T4.E4-bf16-nvfp4-tp4")
"""As they are released, or as others have encoded them, with fewer experts, never with other widths."""


def row_case(row: Row) -> Case | None:
    """The case of a row; None where its values exclude each other."""
    tp, spread = int(str(row["tp"])), str(row["spread"])
    if tp == 1 and not spread.startswith("ep") and spread:
        return None
    if spread == "split3.1":
        spread = "split" + ".".join(str(1 + 2 * (rank % 2 == 0)) for rank in range(tp))
    # Words of an id stand in an order of their own: the degrees first, then how a layer is spread.
    words = [word for word in spread.split("-") if word]
    degrees = [f"tp{tp}"] * (tp > 1) + [word for word in words if word.startswith("ep")]
    words = [word for word in words if not word.startswith("ep")]
    options = [word for word in str(row["options"]).split("-") if word]
    pattern = [str(row["pattern"])] * (row["pattern"] is not Pattern.UNIFORM)
    data = [str(row["data"])] * (row["data"] is not Data.UNIT)
    try:
        return parse_case("-".join(["v1", str(row["sizes"]), str(row["dtype"]), str(row["scheme"]), "norm", *options,
                                    *pattern, *data, *degrees, *words]))
    except UsageValueError:
        return None


COVER = Cover(AXES, tuple(PLAIN | {"sizes": sizes, "tp": tp} for sizes in SIZES for tp in (1, 2, 4)),
              lambda row: row_case(row) is not None)


def encoded_cases(tier: str) -> list[tuple[Case, str]]:
    """(case, purpose) of a tier: pinned ones, a cover of all pairs, and for encoded and nightly every degree."""
    if tier == "smoke":
        return [(parse_case(text), "encoded experts") for text in SMOKE]
    rows = COVER.rows([])
    found: list[tuple[Row | Case, str]] = [*encoded_cases("smoke")]
    found += [(parse_case(text), "published widths, encoded") for text in QUICK_MODELS]
    found += [(row, "encoded experts, pairwise cover") for row in rows]
    if tier in ("encoded", "nightly"):
        found += [(parse_case(text), "published widths, encoded") for text in MODELS]
        kinds = cycle(product(AXES["data"], SIZES))
        grid = product(SCHEMES, AXES["tp"], ("", "ep2"), AXES["dtype"])
        for (scheme, tp, spread, dtype), (data, sizes) in zip(grid, kinds, strict=False):
            row = PLAIN | {"scheme": scheme, "tp": tp, "dtype": dtype, "data": data, "sizes": sizes, "spread": spread}
            found.append((row, f"{scheme} in {dtype}, tp {tp}" + f", {SPREADS[spread]}" * bool(spread)))
        for scheme, (spread, what) in product(SCHEMES, FURTHER_SPREADS.items()):
            found.append((PLAIN | {"scheme": scheme, "tp": 2, "spread": spread}, f"{scheme}: {what}"))
        # A weight on the input is in what is rounded, and so in scales: of tokens there is then no code that all share.
        found += [(PLAIN | {"scheme": scheme, "tp": 2, "options": "weightinput"}, f"{scheme}: weights on the input")
                  for scheme in SCHEMES]
    cases = [(row if isinstance(row, Case) else row_case(row), purpose) for row, purpose in found]
    unique = {format_case(case): (case, purpose) for case, purpose in cases if case is not None}
    return list(unique.values())
