"""What scores are divided by to become weights, and the way back: the same for selected slots and for kept ones."""

import triton
import triton.language as tl


@triton.jit
def divisor_of(score, shared, epsilon, CLAMP: tl.constexpr, HAS_SHARED: tl.constexpr):
    """D: sum + epsilon per token, or max(sum, epsilon); scores that do not count must be 0."""
    total = tl.sum(score, axis=1)
    if HAS_SHARED:
        total += tl.sum(shared, axis=1)
    if CLAMP:
        result = tl.where(total < epsilon, epsilon, total)  # not tl.maximum, which drops a NaN
    else:
        result = total + epsilon
    return result


@triton.jit
def divisor_gradient(grad, score, grad_shared, shared, divisor, epsilon, CLAMP: tl.constexpr,
                     HAS_SHARED: tl.constexpr):
    """-D d_D: the sum of d_p p per token over shares p = score / D; 0 below a clamp at epsilon."""
    result = tl.sum(grad * score / divisor[:, None], axis=1)
    total = tl.sum(score, axis=1)
    if HAS_SHARED:
        result += tl.sum(grad_shared * shared / divisor[:, None], axis=1)
        total += tl.sum(shared, axis=1)
    if CLAMP:
        result = tl.where(total < epsilon, 0.0, result)
    return result
