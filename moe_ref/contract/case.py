"""A problem, and a case: the problem plus how it is spread. The text id is the case. Imports no torch."""

from dataclasses import dataclass, field

from moe_ref.contract.errors import is_integer, raise_faults
from moe_ref.contract.exact import exact_faults
from moe_ref.contract.parallel import Parallel, share_faults
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Data, Direction, Dtype, Pattern, Scheme, Storage, Tokens
from moe_ref.models.registry import cut_experts, find_model


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that fixes the inputs and the mathematical result.

    model names the published model whose dimensions `spec` has; "" for none. residual: a residual
    stream is handed in and added once. scheme: how the experts' matrices are encoded; they are drawn as codes and
    scales.
    """

    spec: MoESpec
    num_tokens: int
    dtype: Dtype
    pattern: Pattern = Pattern.UNIFORM
    data: Data = Data.UNIT
    residual: bool = False
    seed: int = 0
    model: str = ""
    scheme: Scheme = Scheme.PLAIN

    def __post_init__(self) -> None:
        faults = []
        if not is_integer(self.num_tokens) or self.num_tokens < 0:
            faults.append(f"num_tokens={self.num_tokens!r}, but should be an integer of at least 0")
        if not is_integer(self.seed) or not 0 <= self.seed < 2**32:
            faults.append(f"seed={self.seed!r}, but should be an integer in [0, 2^32)")
        if self.model:
            published = find_model(self.model).spec
            if self.spec not in (published, cut_experts(published, min(self.spec.num_experts, published.num_experts))):
                faults.append(f"model {self.model!r}, but the spec is not that model's, nor that with fewer experts")
        if self.spec.router is None and self.pattern is not Pattern.UNIFORM:
            faults.append(f"pattern {self.pattern}, but a layer without a router has none to force")
        if self.pattern is Pattern.EMPTY and self.spec.num_choices - self.spec.top_k < 2:
            faults.append(f"pattern empty needs two experts to spare, but E={self.spec.num_choices}, "
                          f"K={self.spec.top_k}")
        if self.data is Data.EXACT:
            if self.pattern not in (Pattern.UNIFORM, Pattern.HOLES):
                faults.append(f"pattern {self.pattern} with data exact, but its routing is injected whole")
            faults += exact_faults(self.spec, self.residual)
        elif self.pattern is Pattern.HOLES:
            faults.append(f"pattern holes with data {self.data}, but it is of an injected routing: data exact")
        raise_faults("Problem", faults + self._scheme_faults())

    def _scheme_faults(self) -> list[str]:
        if self.scheme is Scheme.PLAIN:
            of_encoded = self.data in (Data.EQUAL, Data.EXTREME)
            return [f"data {self.data}, but it is of encoded weights, and these are plain"] if of_encoded else []
        if self.data is Data.EXACT:
            return [f"data exact with scheme {self.scheme}, but exact weights are drawn as numbers, not as codes"]
        return []


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem, its parallelism, how its weights lie in memory, its direction; equal to its id, see case_id.py.

    token_shares: one share per part of sharded tokens, in rank order (tp, ep or ep * tp of them); None: equal shares.
    """

    problem: Problem
    parallel: Parallel = field(default_factory=Parallel)
    token_shares: tuple[int, ...] | None = None
    storage: Storage = Storage.OUT_IN
    direction: Direction = Direction.FORWARD

    def __post_init__(self) -> None:
        if self.direction is Direction.BACKWARD and self.problem.data is Data.NON_FINITE:
            raise_faults("Case", [f"direction {self.direction} with data {self.problem.data}, but one token that is "
                                  "not finite makes every gradient of a parameter so"])
        if self.direction is Direction.BACKWARD and self.problem.scheme is not Scheme.PLAIN:
            raise_faults("Case", [f"direction {self.direction} with scheme {self.problem.scheme}, but codes have no "
                                  "gradient: training in fp8 encodes plain weights as it goes"])
        if self.storage is not Storage.OUT_IN and self.problem.scheme is not Scheme.PLAIN:
            raise_faults("Case", [f"storage {self.storage} with scheme {self.problem.scheme}, but codes have one "
                                  "order"])
        if self.direction is Direction.BACKWARD and self.problem.data is Data.EXACT:
            raise_faults("Case", [f"direction {self.direction} with data exact, but gradients are exact in no order"])
        router, tokens = self.problem.spec.router, self.parallel.tokens
        if router is not None and router.capacity is not None and tokens is not Tokens.REPLICATED:
            raise_faults("Case", [f"tokens={tokens}, but the router's capacity counts all tokens of the batch"])
        self.parallel.check_redundant(self.problem.spec.num_experts)
        raise_faults("Case", self._share_faults())

    def _share_faults(self) -> list[str]:
        shares, tokens, parts = self.token_shares, self.parallel.tokens, self.num_token_parts
        if shares is None:
            return []
        if tokens is Tokens.REPLICATED:
            return [f"token_shares={shares}, but with tokens={tokens} nothing is shared out"]
        faults = share_faults("token_shares", shares)
        if len(shares) != parts:
            faults.append(f"token_shares has {len(shares)} shares, but tokens={tokens} has {parts} parts")
        return faults

    @property
    def num_token_parts(self) -> int:
        """Into how many parts the tokens are cut."""
        tokens = self.parallel.tokens
        return (self.parallel.tp if tokens.over_tp else 1) * (self.parallel.ep if tokens.over_ep else 1)
