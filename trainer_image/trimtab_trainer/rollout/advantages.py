"""The formulas of proximal policy optimisation, as pure functions of tensors [rows, tokens]; masks are 1 or 0.

Schulman et al. 2016 (arXiv:1506.02438) for the advantages, 2017 (arXiv:1707.06347) for the clipped loss; the clipped
values and the whitening as in Huang et al. 2024, "The N+ implementation details of RLHF with PPO" (arXiv:2403.17031).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Total = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a tensor over all processes."""


def token_rewards(
    scores: torch.Tensor, log_probs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """-kl_coef (log p - log p_ref) at each token, and the answer's score [rows] at its last one."""
    rewards = -kl_coef * (log_probs - reference) * mask
    last = mask.sum(dim=1).long() - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def estimate(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns by generalised advantage estimation.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  R_t = A_t + V_t; after the end all is 0.
    """
    advantages = torch.zeros_like(rewards)
    after = torch.zeros_like(rewards[:, 0])
    value_after = torch.zeros_like(after)
    for step in reversed(range(rewards.shape[1])):
        here = mask[:, step]
        delta = rewards[:, step] + gamma * value_after - values[:, step]
        after = (delta + gamma * lam * after) * here
        value_after = values[:, step] * here
        advantages[:, step] = after
    return advantages, (advantages + values) * mask


def whiten(values: torch.Tensor, mask: torch.Tensor, total: Total, centre: bool = True) -> torch.Tensor:
    """Scaled to variance 1 over all tokens of all processes, and to mean 0 when `centre`; 0 outside the mask."""
    count, summed = total(torch.stack([mask.sum(), (values * mask).sum()])).unbind()
    mean = summed / count
    variance = total((((values - mean) ** 2) * mask).sum()) / (count - 1).clamp(min=1)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (scaled if centre else scaled + mean) * mask


def policy_losses(
    log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> torch.Tensor:
    """max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) at each token, with ratio = p / p_old."""
    ratio = torch.exp(log_probs - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def value_losses(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, cliprange: float) -> torch.Tensor:
    """Half of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) at each token."""
    clipped = torch.minimum(torch.maximum(values, old - cliprange), old + cliprange)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
