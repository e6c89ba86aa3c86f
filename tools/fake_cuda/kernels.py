"""CPU versions of operators that only CUDA has, or that accept other types on CUDA.

Attention is computed in float32. In shapes, B is the batch, H the heads, N and M the queries and
keys, D the channels of a head.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def _attention(q, k, v, bias, causal, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output (B, H, N, D), and the scores' log-sum-exp (B, H, N) and softmax."""
    scores = q.float() @ k.float().mT * _factor(q, scale)
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores + torch.full_like(scores, float("-inf")).triu(1)
    share = scores.softmax(-1)
    output = (share @ v.float()).to(q.dtype)
    # The kernels write (B, N, H, D).
    return output.transpose(1, 2).contiguous().transpose(1, 2), scores.logsumexp(-1), share


def _attention_backward(g, q, k, v, bias, causal, scale) -> tuple[Tensor, ...]:
    """Returns the gradients of queries, keys and values."""
    _, _, share = _attention(q, k, v, bias, causal, scale)
    of_share = g.float() @ v.float().mT
    of_scores = share * (of_share - (of_share * share).sum(-1, keepdim=True))
    of_scores = of_scores * _factor(q, scale)
    found = of_scores @ k.float(), of_scores.mT @ q.float(), share.mT @ g.float()
    return tuple(gradient.to(q.dtype) for gradient in found)


def _factor(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _no_dropout(p: float) -> None:
    if p:
        raise NotImplementedError(
            f"attention with a dropout of {p} is not written for the fake CUDA device: set it to 0"
        )


def _number() -> Tensor:
    """Makes a seed or an offset of dropout, which no code reads."""
    return torch.zeros((), dtype=torch.int64)


def _efficient(q, k, v, bias, with_lse, dropout=0.0, causal=False, *, scale=None):
    _no_dropout(dropout)
    output, lse, _ = _attention(q, k, v, bias, causal, scale)
    return output, lse if with_lse else lse[..., :0], _number(), _number()


def _efficient_backward(
    g, q, k, v, bias, output, lse, seed, offset, dropout, wanted, causal=False, *, scale=None
):
    return *_attention_backward(g, q, k, v, bias, causal, scale), None


def _cudnn(q, k, v, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
    _no_dropout(dropout)
    output, lse, _ = _attention(q, k, v, bias, causal, scale)
    lengths = q.shape[2], k.shape[2]
    return output, lse[..., None], None, None, *lengths, _number(), _number(), None


def _cudnn_backward(
    g, q, k, v, output, lse, seed, offset, bias, starts_q, starts_k, n, m, dropout, causal,
    *, scale=None,
):  # fmt: skip
    return _attention_backward(g, q, k, v, bias, causal, scale)


def _flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
    _no_dropout(dropout)
    output, lse, _ = _attention(q, k, v, None, causal, scale)
    state = torch.zeros(2, dtype=torch.int64), _number()
    return output, lse, None, None, q.shape[2], k.shape[2], *state, output.new_zeros(0)


def _flash_backward(
    g, q, k, v, output, lse, starts_q, starts_k, n, m, dropout, causal, seed, offset, *, scale=None
):
    return _attention_backward(g, q, k, v, None, causal, scale)


def _softmax(operator):
    """Takes half precision and returns float32, as CUDA's operator does."""
    return lambda x, dim, to_float: operator(x.float() if to_float else x, dim, False)


def _softmax_backward(operator):
    return lambda g, out, dim, dtype: operator(g, out, dim, g.dtype).to(dtype)


KERNELS = {
    "_softmax": _softmax(aten._softmax),
    "_log_softmax": _softmax(aten._log_softmax),
    "_softmax_backward_data": _softmax_backward(aten._softmax_backward_data),
    "_log_softmax_backward_data": _softmax_backward(aten._log_softmax_backward_data),
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
}
