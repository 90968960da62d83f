"""What the experts' operator allocates: rows are computed in chunks, so that a long prefill needs no more than one.

A routed row has act (I) and down (H), a gradient of one besides gate and up, the weighted act and a row of x. Gradients
take all rows at once, since those of weights are sums over rows. What they need of gate and up is computed again, two
of three products once more, or kept from the forward pass inside `saving_activations`.
"""

CHUNK_ROWS = 2**16
"""Routed rows of one chunk: some hundred for each of 256 experts, which fill a GPU."""


def chunk_tokens(top_k: int) -> int:
    """Tokens of one chunk."""
    return max(1, CHUNK_ROWS // max(1, top_k))


def forward_bytes(num_tokens: int, top_k: int, hidden_size: int, intermediate_size: int, item_bytes: int,
                  shared_size: int = 0) -> int:
    """Peak of a forward pass on one rank: the result, and what one chunk holds besides; all sizes those of the rank.

    Of the tables of the sort those of rows are counted, 4 bytes each; the others are 12 bytes per block of rows.
    """
    tokens = min(num_tokens, chunk_tokens(top_k))
    rows = tokens * top_k
    later = intermediate_size * rows
    if shared_size:
        later = max(later, tokens * (shared_size + hidden_size))
    return item_bytes * (num_tokens * hidden_size + rows * hidden_size + later) + 8 * rows


def backward_bytes(num_tokens: int, top_k: int, num_experts: int, hidden_size: int, intermediate_size: int,
                   item_bytes: int, num_projections: int = 2) -> int:
    """Peak of a backward pass of the routed experts on one rank, gradients included; sums of parts are left out."""
    rows = num_tokens * top_k
    weights = (num_projections + 1) * num_experts * intermediate_size * hidden_size
    between = rows * ((num_projections + 1) * intermediate_size + hidden_size)
    return item_bytes * (weights + between) + 12 * rows


def saved_bytes(num_tokens: int, top_k: int, intermediate_size: int, num_projections: int = 2,
                shared_size: int = 0) -> int:
    """What `saving_activations` holds from the forward to the backward pass of a layer on one rank: products in fp32.

    The same number of projections for routed and shared experts.
    """
    return 4 * num_projections * num_tokens * (top_k * intermediate_size + shared_size)
