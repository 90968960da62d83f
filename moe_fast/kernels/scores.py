"""Scores of logits and their slopes: what selection and weighting, forward and backward, start from. All in fp32."""

import triton
import triton.language as tl


@triton.jit
def capped(logit, logit_scale, logit_softcap, SOFTCAP: tl.constexpr):
    """logit_scale and logit_softcap applied; tanh(z) is written 2 sigmoid(2z) - 1, which every backend has."""
    result = logit * logit_scale
    if SOFTCAP:
        result = logit_softcap * (2.0 * tl.sigmoid(2.0 * (result / logit_softcap)) - 1.0)
    return result


@triton.jit
def capped_slope(logit, logit_scale, logit_softcap, SOFTCAP: tl.constexpr):
    """d capped / d logit; 1 - tanh(z)^2 is written 4 sigmoid(2z) sigmoid(-2z), which does not cancel."""
    result = tl.zeros_like(logit) + logit_scale
    if SOFTCAP:
        twice = 2.0 * (logit * logit_scale / logit_softcap)
        result = logit_scale * 4.0 * tl.sigmoid(twice) * tl.sigmoid(-twice)
    return result


@triton.jit
def softplus(value):
    """log(1 + exp(z)); below exp = 2^-6 a series, since 1 + exp would lose the small term."""
    small = tl.exp(-tl.abs(value))
    series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0 - small * 0.25)))
    tail = tl.where(small < 0.015625, series, tl.log(1.0 + small))
    # Not tl.maximum, which drops a NaN.
    return tl.where(value < 0.0, tail, value + tail)


@triton.jit
def score_of(value, in_range, in_tokens, SCORE: tl.constexpr):
    """Scores of capped logits, one row per token; columns and rows out of range get 0 and any number."""
    if SCORE == "softmax":
        inside = tl.where(in_range, value, -float("inf"))
        safe = tl.where(in_tokens[:, None], inside, 0.0)
        power = tl.exp(safe - tl.max(safe, axis=1)[:, None])
        score = power / tl.sum(power, axis=1)[:, None]
    elif SCORE == "sigmoid":
        score = tl.sigmoid(value)
    else:
        # Far below zero softplus is exp, whose root is one that does not underflow.
        score = tl.where(value < -16.0, tl.exp(0.5 * value), tl.sqrt(softplus(value)))
    return tl.where(in_range, score, 0.0)


@triton.jit
def score_gradient(grad_score, score, value, SCORE: tl.constexpr):
    """Gradients of capped logits from those of their scores, which are 0 where nothing was selected."""
    if SCORE == "softmax":
        result = score * (grad_score - tl.sum(score * grad_score, axis=1)[:, None])
    elif SCORE == "sigmoid":
        result = grad_score * score * tl.sigmoid(-value)
    else:
        # sigmoid / (2 score), where the score has not vanished; far below zero both are exp.
        slope = tl.where(value < -16.0, 0.5 * score, tl.sigmoid(value) / (2.0 * score))
        result = grad_score * tl.where(score == 0.0, 0.0, slope)
    return result
