"""How far the worst of many Gaussian errors may be off."""

from functools import cache
from statistics import NormalDist

from moe_ref.contract.errors import number_faults, positive_faults, raise_faults


@cache
def tau(count: int, alpha: float) -> float:
    """Sigmas that the largest of `count` Gaussian errors exceeds with a probability of at most alpha.

    The two-sided quantile of alpha / count (union bound). UsageValueError on a count below 1 or an alpha not in (0, 1).
    """
    faults = positive_faults(count=count) + number_faults("alpha", alpha, above=0.0)
    if not faults and alpha >= 1:
        faults.append(f"alpha={alpha}, but should be below 1")
    raise_faults("tau", faults)
    # The lower tail: near 1 the quantile would have no digits left.
    return -NormalDist().inv_cdf(alpha / count / 2)
