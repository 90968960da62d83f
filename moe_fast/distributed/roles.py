"""What a mesh dimension does in the layer, and how it places every tensor; all rules here follow from it."""

from enum import StrEnum

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from moe_ref.contract.placements import PLACEMENTS


class Role(StrEnum):
    """What the ranks along one mesh dimension divide among them.

    REPLICATED: nothing. TOKENS: rows of x and of the routing. COLUMNS: the intermediate axis of every expert (tensor
    parallelism). EXPERTS: the routed experts (expert parallelism), and the intermediate axis of the shared one, which
    would otherwise be added once per rank.
    """

    REPLICATED = "replicated"
    TOKENS = "tokens"
    COLUMNS = "columns"
    EXPERTS = "experts"

    @property
    def adds_up(self) -> bool:
        """Whether each rank has a partial sum of every row of the result."""
        return self in (Role.COLUMNS, Role.EXPERTS)


def of_tensor(name: str, role: Role) -> Placement:
    """Placement of an argument of an operator or of a parameter, by its name; the first axis of x_TH are tokens."""
    if name in ("act_RI", "grad_RI", "shared_act_TI"):
        cut = role is Role.COLUMNS or (role is Role.EXPERTS and name == "shared_act_TI")
        return Shard(1) if cut else Replicate()
    if name.rpartition("_")[2].startswith("T"):
        return Shard(0) if role is Role.TOKENS else Replicate()
    if name == "hosted_E":
        return Shard(0) if role is Role.EXPERTS else Replicate()
    placement = PLACEMENTS[name]
    dim = placement.shard_dim if role.adds_up else None
    if role is Role.EXPERTS and placement.expert_dim is not None:
        dim = placement.expert_dim
    return Replicate() if dim is None else Shard(dim)


def of_result(name: str, role: Role) -> Placement:
    """Placement of what ranks compute, a result or the gradient of an argument.

    Where they divide the work but not the tensor, each has one part of a sum; also of a row that another one has, and
    that is zero here.
    """
    placement = of_tensor(name, role)
    return placement if placement.is_shard() or role is Role.REPLICATED else Partial()


ADDED = {"w2_bias_EH": (Role.COLUMNS,), "shared_w2_bias_H": (Role.COLUMNS, Role.EXPERTS),
         "output_bias_H": (Role.COLUMNS, Role.EXPERTS)}
"""Biases, and the roles under which every rank holds them whole while each makes a partial sum of what they go into."""


def of_argument(name: str, role: Role) -> Placement:
    """Placement of a tensor as an operator takes it: as it is held, or a bias as parts of which the sum is the bias."""
    return Partial() if role in ADDED.get(name, ()) else of_tensor(name, role)


def of_gradient(name: str, role: Role) -> Placement:
    """Placement of the gradient of an argument; of a bias that is taken in parts each rank makes the whole."""
    return Replicate() if role in ADDED.get(name, ()) else of_result(name, role)
