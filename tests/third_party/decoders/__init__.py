"""Decoders that nobody here wrote."""

from tests.third_party.decoders import (
    of_checkpoint_makers,
    of_compressed_tensors,
    of_servers,
    of_torch,
    of_torchao,
    of_transformers,
)

DECODERS = (*of_torch.DECODERS, *of_transformers.DECODERS, *of_torchao.DECODERS, *of_compressed_tensors.DECODERS,
            *of_checkpoint_makers.DECODERS, *of_servers.DECODERS)
