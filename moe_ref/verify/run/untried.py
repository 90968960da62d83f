"""What an implementation declares of ways to spread a layer, and no case that ran has tried."""

from collections.abc import Iterable

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.case import Case
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Direction, SharedPlacement


def untried(capabilities: Capabilities, executed: Iterable[Case]) -> list[str]:
    """In words, in the order of the fields; a case without tokens tries nothing."""
    cases = [case for case in executed if case.problem.num_tokens]
    spread = [case.parallel for case in cases]
    declared: list[tuple[str, object, set]] = [("tp > 1", capabilities.max_tp > 1, {one.tp > 1 for one in spread}),
                                               ("ep > 1", capabilities.max_ep > 1, {one.ep > 1 for one in spread})]
    declared += [(f"schedule {one}", one, {other.schedule for other in spread}) for one in capabilities.schedules]
    declared += [(f"tokens {one}", one, {other.tokens for other in spread}) for one in capabilities.tokens]
    declared += [(f"hosting {one}", one, {other.hosting for other in spread}) for one in capabilities.hostings]
    declared.append(("redundant experts", capabilities.redundant, {bool(one.redundant) for one in spread}))
    if Feature.SHARED_EXPERT in capabilities.features:
        with_shared = {case.parallel.shared for case in cases if case.problem.spec.shared}
        declared += [(f"shared expert {one}", one, with_shared) for one in capabilities.shared_placements
                     if one is not SharedPlacement.SHARDED or not with_shared]
    declared += [(f"direction {one}", one, {case.direction for case in cases}) for one in capabilities.directions
                 if one is not Direction.FORWARD]
    return [words for words, value, tried in declared if value and value not in tried]
