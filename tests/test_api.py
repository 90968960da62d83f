"""Protects the one API: same names, same signatures, module equal to function, and no torch operator doing the work."""

import inspect
from collections import Counter

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fast
import moe_ref
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import Groups
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.weights import parameter_shapes
from moe_ref.inputs.build import Inputs, build_inputs
from moe_ref.inputs.shards import build_shards

PACKAGES = [moe_ref, moe_fast]


@pytest.mark.parametrize("name", ["route", "experts", "moe", "MoELayer"])
def test_both_packages_export_the_same_signature(name: str) -> None:
    """A user swaps one import; names, order, defaults, kinds and annotations are equal."""
    one, two = (inspect.signature(getattr(package, name)) for package in PACKAGES)
    assert one == two


@pytest.mark.parametrize("method", ["__init__", "forward", "load_weights"])
def test_methods_of_the_layer_agree(method: str) -> None:
    """The module form too."""
    one, two = (inspect.signature(getattr(package.MoELayer, method)) for package in PACKAGES)
    assert one == two


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_advertised_name_exists(package: object) -> None:
    """`from package import *` must not fail on a name that moved."""
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError):
        _ = package.no_such_name


SPECS = {
    "plain": "v1-T9.H40.I24.E6.K2-bf16-norm",
    "groups, bias, gated shared, residual":
        "v1-T9.H40.I24.E8.K3-fp32-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-sh11-shgate-res",
    "shared, gelu": "v1-T9.H40.I24.E6.K2-fp16-gelu-sh10-shgelu",
    "softmax groups": "v1-T9.H40.I24.E8.K2-fp32-g4.2-scale16-gelutanh",
    "dense": "v1-T9.H40.I24-fp32-res",
    "tp 2": "v1-T9.H40.I24.E6.K2-bf16-norm-tp2",
    "tp 3, no tokens": "v1-T0.H40.I25.E6.K2-fp32-tp3",
}


def run_ranks(package: object, text: str, form: str, mode: object = None) -> list[torch.Tensor]:
    """The output of every rank of a case, by function or by module."""
    case = parse_case(text)
    inputs, spec = build_inputs(case.problem), case.problem.spec
    shards, whole = build_shards(case.problem, case.parallel), build_shards(case.problem, Parallel())[0]

    def body(comm: LocalComm) -> torch.Tensor:
        groups = Groups(tp=comm) if comm.size > 1 else None
        if form == "function":
            return call(package, inputs, shards[comm.rank], case.parallel, groups, mode)
        layer = package.MoELayer(spec, case.parallel, groups, dtype=inputs.x_TH.dtype)
        layer.load_weights(whole)
        with torch.no_grad():
            return layer(inputs.x_TH, inputs.residual_TH)

    return run_virtual_ranks(case.parallel.tp, body)


def call(package: object, inputs: Inputs, weights: object, parallel: Parallel, groups: Groups | None,
         mode: TorchDispatchMode | None) -> torch.Tensor:
    """moe of a package, under a dispatch mode if one is given; modes belong to the thread that enters them."""
    arguments = (inputs.x_TH, weights, inputs.problem.spec, parallel, groups)
    with torch.no_grad():
        if mode is None:
            return package.moe(*arguments, residual_TH=inputs.residual_TH)
        with mode:
            return package.moe(*arguments, residual_TH=inputs.residual_TH)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("name", SPECS)
def test_the_layer_is_the_function(package: object, name: str) -> None:
    """Bit by bit on every rank: the module holds parameters and adds no mathematics."""
    for one, two in zip(*(run_ranks(package, SPECS[name], form) for form in ("function", "module")), strict=True):
        assert torch.equal(one, two)
        assert one.dtype == two.dtype


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("name", SPECS)
def test_a_layer_builds_on_the_meta_device(package: object, name: str) -> None:
    """A rank allocates its own shard and nothing else: shapes without memory, for every rank."""
    case = parse_case(SPECS[name])
    spec, parallel = case.problem.spec, case.parallel

    def body(comm: LocalComm) -> dict[str, tuple[int, ...]]:
        layer = package.MoELayer(spec, parallel, Groups(tp=comm), dtype=torch.bfloat16, device="meta")
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        assert all(tensor.is_meta for tensor in tensors.values())
        assert {tensor.dtype for key, tensor in tensors.items() if key != "selection_bias_E"} == {torch.bfloat16}
        return {key: tuple(tensor.shape) for key, tensor in tensors.items()}

    for rank, shapes in enumerate(run_virtual_ranks(parallel.tp, body)):
        assert shapes == parameter_shapes(spec, parallel, rank)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("different", ["spec", "splits"])
def test_ranks_that_disagree_are_told_on_every_rank(package: object, different: str) -> None:
    """Rank 1 builds something else: each rank raises by itself, so none is left waiting."""
    spec, other = (parse_case(f"v1-T9.H40.I{width}.E6.K2-bf16").problem.spec for width in (24, 26))

    def body(comm: LocalComm) -> str:
        odd = comm.rank == 1
        parallel = Parallel(tp=3, splits=(1, 1, 2) if odd and different == "splits" else (1, 1, 1))
        try:
            package.MoELayer(other if odd and different == "spec" else spec, parallel, Groups(tp=comm), device="meta")
        except UsageValueError as error:
            return str(error)
        return "built"

    messages = run_virtual_ranks(3, body)
    for rank, other_rank in ((0, 1), (1, 0), (2, 1)):
        assert messages[rank].startswith(f"rank {rank} builds ")
        assert f"but rank {other_rank} builds " in messages[rank]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_group_of_the_wrong_size_is_refused(package: object) -> None:
    """Before any weight exists."""
    with pytest.raises(UsageValueError, match=r"the tp group has 1 ranks, but parallel\.tp is 2"):
        package.MoELayer(parse_case(SPECS["plain"]).problem.spec, Parallel(tp=2))


BANNED = frozenset({
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "vdot", "matmul", "einsum", "linear", "sort",
    "argsort", "msort", "topk", "kthvalue", "index_add", "index_add_", "scatter_add", "scatter_add_",
    "scatter_reduce", "scatter_reduce_", "index_put", "index_put_", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm",
    "cumsum", "cumsum_", "bincount", "histc", "unique", "_unique2", "unique_consecutive", "nonzero", "_softmax",
    "sigmoid", "sigmoid_", "silu", "silu_", "gelu", "gelu_", "one_hot", "_weight_int4pack_mm", "searchsorted",
})
"""What the layer is made of: if torch did it, our kernels would be a facade."""


class Forbid(TorchDispatchMode):
    """Counts every operator that reaches the dispatcher, and raises at a banned one unless only counting."""

    def __init__(self, *, only_count: bool = False) -> None:
        super().__init__()
        self.only_count = only_count
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        if name in BANNED and not self.only_count:
            raise AssertionError(f"aten.{name} inside the fast layer")
        if func.namespace == "moe_fast":
            # A mode is off while it handles an operator, so the layer's own ones are run with it on again.
            with self:
                return OPDEFS[func.name().partition(".")[0]]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SPECS)
def test_torch_does_none_of_the_work(name: str) -> None:
    """Groups, bias, shared gate, residual, dense and tensor parallel: no banned operator is dispatched at all."""
    mode = Forbid()
    run_ranks(moe_fast, SPECS[name], "function", mode)
    assert mode.seen["empty"] > 0, "the mode saw nothing, so it proves nothing"


@pytest.mark.parametrize("name", SPECS)
def test_the_ban_would_be_noticed(name: str) -> None:
    """Around the reference, which is written with these very operators, the same mode fires."""
    with pytest.raises(AssertionError, match=r"aten\.\w+ inside the fast layer"):
        run_ranks(moe_ref, SPECS[name], "function", Forbid())
    counting = Forbid(only_count=True)
    run_ranks(moe_ref, SPECS["plain"], "function", counting)
    assert {"mm", "sort", "index_add_"} <= set(counting.seen)


@pytest.mark.parametrize("operation", [
    lambda x: x @ x, lambda x: torch.bmm(x[None], x[None]), lambda x: torch.einsum("ij,jk->ik", x, x),
    lambda x: torch.addmm(x, x, x), lambda x: torch.baddbmm(x[None], x[None], x[None]), lambda x: x.sort(),
    lambda x: x.argsort(), lambda x: x.topk(1), lambda x: x.cumsum(0), lambda x: torch.bincount(x[0].long()),
    lambda x: torch.histc(x), lambda x: x.index_add(0, torch.tensor([0]), x[:1]),
    lambda x: x.scatter_add(0, x[:1].long(), x[:1]), lambda x: torch.nn.functional.linear(x, x),
], ids=["matmul", "bmm", "einsum", "addmm", "baddbmm", "sort", "argsort", "topk", "cumsum", "bincount", "histc",
        "index_add", "scatter_add", "linear"])
def test_every_banned_operator_is_caught(operation: object) -> None:
    """Whatever name torch lowers it to."""
    with Forbid(), pytest.raises(AssertionError, match="inside the fast layer"):
        operation(torch.eye(3))
