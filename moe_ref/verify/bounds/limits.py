"""How many predicted standard deviations an element of a case may be off."""

from dataclasses import dataclass

from moe_ref.contract.case import Case
from moe_ref.tolerances.load import Tolerances
from moe_ref.tolerances.quantile import tau


@dataclass(frozen=True)
class Limits:
    """stage: from the subject's own inputs, beyond the cell of what is stored; output: of the whole layer; gradient: of
    its gradients.
    """

    stage: float
    output: float
    gradient: float


def likely_limits(tolerances: Tolerances, case: Case) -> Limits:
    """Multiples of the Gaussian quantile for the elements of the widest stage, a function of the case alone."""
    spec, checks = case.problem.spec, tolerances.file.checks
    widest = max(spec.experts.num_projections * spec.intermediate_size, case.parallel.tp * spec.hidden_size)
    outputs = max(1, case.problem.num_tokens * spec.hidden_size)
    parameters = spec.num_experts * spec.experts.num_projections * spec.intermediate_size * spec.hidden_size
    return Limits(stage=checks.stage.sigmas_factor * tau(max(1, case.problem.num_tokens * spec.top_k * widest),
                                                         checks.stage.alpha),
                  output=checks.output.sigmas_factor * tau(outputs, checks.output.alpha),
                  gradient=checks.output.sigmas_factor * tau(max(outputs, parameters), checks.output.alpha))
