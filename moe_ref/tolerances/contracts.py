"""The usual rounding contracts, by name."""

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.tolerances.load import load_tolerances


def contract(name: str, dtype: Dtype) -> Numerics:
    """The contract of tolerances.yaml with that name, for cases of that dtype; UsageValueError on a name it has not."""
    contracts = load_tolerances().file.contracts
    if name not in contracts:
        raise UsageValueError(f"contract {name!r}, but should be one of {', '.join(contracts)}")
    entry = contracts[name]

    def stored(word: str) -> Format:
        return Format(dtype.value if word == "dtype" else word)

    return Numerics(storage={stage: stored(word) for stage, word in entry.storage.items()},
                    accumulate=stored(entry.accumulate), reduce=stored(entry.reduce), weight_at=entry.weight_at,
                    activation=entry.activation and stored(entry.activation),
                    merge=entry.merge and stored(entry.merge))
