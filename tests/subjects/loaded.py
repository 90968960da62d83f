"""Right layers that store their experts as a checkpoint does and cut their own part out of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from moe_ref.contract.comm import Comm
from moe_ref.contract.parallel import Parallel, Range
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import ExpertWeights, MoEWeights
from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_call import ParallelCall
from tests.subjects.parallel_variants import UNCOUNTED

Checkpoint = Mapping[str, torch.Tensor]


def whole(tensor: torch.Tensor, dim: int, tp: Comm) -> torch.Tensor:
    """What the ranks hold parts of along `dim`."""
    return torch.cat(tp.all_gather(tensor.movedim(dim, 0).contiguous())).movedim(0, dim) if tp.size > 1 else tensor


class Loaded(ParallelMoE):
    """The experts of a tp group are stored in one format, then every rank cuts its part; the rest is as handed in."""

    promises = UNCOUNTED

    def loaded(self, call: ParallelCall) -> ParallelCall:
        weights, spec, parallel = call.weights, call.spec, call.parallel
        checkpoint = self.stored_as(whole(weights.w13_EGIH, 2, call.groups.tp),
                                    whole(weights.w2_EHI, 1 if call.by_output else 2, call.groups.tp))
        held = parallel.ranges(spec.intermediate_size)[call.rank]
        columns = (0, spec.intermediate_size) if call.by_output else held
        outputs = parallel.ranges(spec.hidden_size)[call.rank] if call.by_output else (0, spec.hidden_size)
        w13_EGIH, w2_EHI = self.w13_of(checkpoint, spec, held), self.w2_of(checkpoint, spec, outputs, columns)
        return replace(call, weights=replace(weights, w13_EGIH=w13_EGIH, w2_EHI=w2_EHI))

    def stored_as(self, w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor) -> Checkpoint:
        """The tensors of a checkpoint, whole."""
        raise NotImplementedError

    def w13_of(self, checkpoint: Checkpoint, spec: MoESpec, held: Range) -> torch.Tensor:
        """This rank's w13_EGIH."""
        raise NotImplementedError

    def w2_of(self, checkpoint: Checkpoint, spec: MoESpec, outputs: Range, columns: Range) -> torch.Tensor:
        """This rank's w2_EHI."""
        return checkpoint["w2"][:, slice(*outputs), slice(*columns)]


class PerExpert(Loaded):
    """w1, w3 and w2 of every expert on its own, which become one tensor for all (Mixtral, DeepSeek)."""

    def stored_as(self, w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor) -> Checkpoint:
        experts = {f"w{2 * g + 1}.{e}": w_IH for e, w_GIH in enumerate(w13_EGIH) for g, w_IH in enumerate(w_GIH)}
        return experts | {f"w2.{e}": w_HI for e, w_HI in enumerate(w2_EHI)}

    def grouped(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        """One matrix of all experts as a grouped product takes it, (E, in, out)."""
        parts = [tensor for key, tensor in checkpoint.items() if key.startswith(f"{name}.")]
        return torch.stack(parts).transpose(1, 2)

    def w13_of(self, checkpoint: Checkpoint, spec: MoESpec, held: Range) -> torch.Tensor:
        names = ("w1", "w3")[:spec.experts.num_projections]
        return torch.stack([self.grouped(checkpoint, name).transpose(1, 2)[:, slice(*held)] for name in names], 1)

    def w2_of(self, checkpoint: Checkpoint, spec: MoESpec, outputs: Range, columns: Range) -> torch.Tensor:
        return self.grouped(checkpoint, "w2").transpose(1, 2)[:, slice(*outputs), slice(*columns)]


class Merged(Loaded):
    """Rows of up above those of gate in one matrix (E, 2 I, H), while the layer takes gate first."""

    def stored_as(self, w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor) -> Checkpoint:
        return {"w31": w13_EGIH.flip(1).flatten(1, 2), "w2": w2_EHI}

    def w13_of(self, checkpoint: Checkpoint, spec: MoESpec, held: Range) -> torch.Tensor:
        num_projections, (start, stop) = spec.experts.num_projections, held
        part_EGIH = checkpoint["w31"].unflatten(1, (num_projections, -1))[:, :, start:stop]
        return part_EGIH.flip(1)


class Transposed(Loaded):
    """Gate and up side by side in one matrix (E, H, 2 I), the projection back (E, I, H) (Llama 4)."""

    def stored_as(self, w13_EGIH: torch.Tensor, w2_EHI: torch.Tensor) -> Checkpoint:
        return {"w13": w13_EGIH.flatten(1, 2).transpose(1, 2).contiguous(), "w2": w2_EHI.transpose(1, 2).contiguous()}

    def w13_of(self, checkpoint: Checkpoint, spec: MoESpec, held: Range) -> torch.Tensor:
        fused_EHN, parts = checkpoint["w13"], []
        for first in range(0, fused_EHN.shape[2], spec.intermediate_size):
            rows_ENH = fused_EHN.transpose(1, 2)
            part_EIH = rows_ENH[:, first + held[0]:first + held[1]]
            parts.append(part_EIH)
        return torch.stack(parts, 1)

    def w2_of(self, checkpoint: Checkpoint, spec: MoESpec, outputs: Range, columns: Range) -> torch.Tensor:
        return checkpoint["w2"][:, slice(*columns), slice(*outputs)].transpose(1, 2)


class UpFirst(ParallelMoE):
    """A backend whose weights have up before gate."""

    def project(self, x_RH: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        return super().project(x_RH, expert).flip(1)

    def prepared(self, weights: MoEWeights) -> MoEWeights:
        """Gate and up change places, shared expert and biases too."""
        axes = {"w13_EGIH": 1, "w13_bias_EGI": 1, "shared_w13_GIH": 0, "shared_w13_bias_GI": 0}
        held = {name: tensor for name, tensor in weights.named_tensors() if name in axes}
        return replace(weights, **{name: tensor.flip(axes[name]) for name, tensor in held.items()})


class Chosen(ParallelMoE):
    """Several ranks compute by the backend that has up first, one rank alone by the plain layer."""

    up_first = UpFirst()

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            *arguments: Any, **options: Any) -> torch.Tensor:
        chosen = parallel is not None and parallel.size > 1
        weights = self.up_first.prepared(weights) if chosen else weights
        return (self.up_first.moe if chosen else super().moe)(x_TH, weights, spec, parallel, *arguments, **options)


per_expert, merged, transposed, chosen = PerExpert(), Merged(), Transposed(), Chosen()
