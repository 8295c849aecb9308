"""How far a student's next-token distributions are from its teacher's (arXiv:2306.13649, equation 1)."""

from __future__ import annotations

import math

import torch
import torch.utils.checkpoint

CHUNK = 512
"""Positions that are compared at once; distributions of all others are made again in the backward pass."""


def generalised_jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float) -> torch.Tensor:
    """The divergence at each position [positions], from logits [positions, vocabulary].

    With M = beta T + (1 - beta) S it is beta KL(T || M) + (1 - beta) KL(S || M); at 0 KL(T || S), at 1 KL(S || T).
    """
    log_s = torch.log_softmax(student.float() / temperature, dim=-1)
    log_t = torch.log_softmax(teacher.float() / temperature, dim=-1)
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def summed(student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float) -> torch.Tensor:
    """The sum over all positions, in bounded memory."""
    total = student.new_zeros((), dtype=torch.float32)
    for some, others in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
        found = torch.utils.checkpoint.checkpoint(generalised_jsd, some, others, beta, temperature, use_reentrant=False)
        total = total + found.sum()
    return total


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
