"""One run of a simulated layer, judged as the harness judges a subject, and how near each check came to its limit."""

from dataclasses import dataclass, replace

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.vocabulary import Stage
from moe_ref.inputs.build import Inputs
from moe_ref.records.schema import from_number
from moe_ref.simulated.layer import STAGES, capabilities
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.limits import likely_limits
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.judge import Judgement, RunFacts, judge
from moe_ref.verify.measure.measurement import Measurement
from moe_ref.verify.measure.placing import RankTensors
from moe_ref.verify.measure.stages import measure

FACTS = RunFacts(calls=(), wanted_calls=(), same_bits=True, differing_stages=(), promised_deterministic=True,
                 promised_equal_ranks=True, changed_inputs=())
"""A simulated layer returns the same bits to every rank whenever it is run, and has no collectives to count."""


@dataclass(frozen=True)
class Judged:
    """A verdict, and the largest value of every check over what it may be, by the name of the check.

    "act sigmas": of an element beyond the cell of its store. "act": of an element to the smaller of that limit and the
    bound, stores included, so that a right store comes near 1. "output rms", "output sign" and so on: of the
    statistics.
    """

    judgement: Judgement
    power: float
    shares: dict[str, float]


def judged(case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics, hardware: str = "cpu",
           shown: tuple[Stage, ...] = STAGES) -> Judged:
    """Measure and judge what a layer with this contract shows of all that it computed; shown: without the output."""
    declared: Capabilities = replace(capabilities("simulated", {case.problem.dtype: numerics}),
                                     stages=tuple(stage for stage in shown if stage is not Stage.REDUCED))
    visible = {*declared.stages, Stage.REDUCED}
    ranks = [{stage: tensor for stage, tensor in tensors.items() if stage in visible} for tensors in ranks]
    tolerances = load_tolerances()
    model = RoundingModel.of(tolerances, hardware, numerics, case.problem.dtype)
    measurement = measure(case, inputs, ranks, declared, model)
    judgement = judge(measurement, FACTS, tolerances.file.limits.ratio.max, tolerances.file.power_guard.zeros.factor)
    return Judged(judgement, measurement.power, shares(measurement, case))


def shares(measurement: Measurement, case: Case) -> dict[str, float]:
    """Values over thresholds; see Judged."""
    limits, found = likely_limits(load_tolerances(), case), {}
    for stage in measurement.stages:
        found[stage.stage] = from_number(stage.ratio)
        if not stage.exact:
            limit = limits.output if stage.stage == Stage.OUTPUT else limits.stage
            found[f"{stage.stage} sigmas"] = from_number(stage.sigmas) / limit
        for one in stage.statistics:
            found[f"{stage.stage} {one.name}"] = from_number(one.value) / from_number(one.allowed)
    return found
