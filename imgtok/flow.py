"""Rectified flow (arXiv 2209.03003): the straight path from data to noise, its loss and its solvers.

Convention of the whole suite: t = 0 is data, t = 1 is pure noise, x_t = t * noise + (1 - t) * x0,
and the network predicts the velocity v = noise - x0. Sampling therefore walks from 1 to 0 and
*subtracts* v. Everything here is a plain function; randomness comes in as a generator or as noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, int, float], Tensor]  # (x_t, number of the step from 0 on, t) -> v, shaped like x_t
Guidance = float | Callable[[float], float]  # a scale, or a function of the time
OnStep = Callable[[int, Tensor, Tensor], None]  # (steps done, x after them, the model's guess of x at t = 0)


def step_times(steps: int) -> list[float]:
    """Where a walk of `steps` equal steps calls the model: 1, 1 - 1 / steps, ..., 1 / steps.

    Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"a flow sampler needs at least 1 step, not {steps}")
    return [1 - step / steps for step in range(steps)]


def expand_times(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), or (B, L) -> (B, L, 1, ..., 1): ready to multiply a batch shaped like `like`."""
    return t.to(like).view(*t.shape, *[1] * (like.ndim - t.ndim))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point at time t of the straight path; t (B,), or (B, L) for each token, in [0, 1]."""
    t = expand_times(t, x0)
    return t * noise + (1 - t) * x0


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """The constant velocity of the path, which the network is trained to predict."""
    return noise - x0


def mode_times(batch: int, mode_scale: float, generator: torch.Generator) -> Tensor:
    """Times by mode sampling (arXiv 2403.03206, section 3.1): 0 is uniform, above it the middle is favoured."""
    u = torch.rand(batch, generator=generator, device=generator.device)
    return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def logit_normal_times(batch: int, generator: torch.Generator, *, stratified: bool = False) -> Tensor:
    """Times as the sigmoid of a standard normal; `stratified`, one from each of `batch` equally likely ranges."""
    if not stratified:
        return torch.randn(batch, generator=generator, device=generator.device).sigmoid()
    ranges = torch.arange(batch, device=generator.device)
    u = (ranges + torch.rand(batch, generator=generator, device=generator.device)) / batch
    return torch.special.ndtri(u.double()).sigmoid().float()


def euler(velocity: Velocity, noise: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
    """Walks from t = 1 to 0 in `steps` equal Euler steps: one call of `velocity` each, none at t = 0."""
    x = noise
    for step, t in enumerate(step_times(steps)):
        v = velocity(x, step, t)
        if on_step is not None:
            on_step(step + 1, x - v / steps, x - t * v)
        x = x - v / steps
    return x


def adams(velocity: Velocity, noise: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
    """The same walk by the two-step Adams-Bashforth rule: second order at one call a step.

    The velocity over a step is extrapolated from its start and the step before; the first step is Euler's.
    """
    x, before = noise, None
    for step, t in enumerate(step_times(steps)):
        v = velocity(x, step, t)
        moved = x - (v if before is None else 1.5 * v - 0.5 * before) / steps
        if on_step is not None:
            on_step(step + 1, moved, x - t * v)
        x, before = moved, v
    return x


STOCHASTIC_LAST = 0.04
"""Where `stochastic_euler` stops adding noise (xAR, as published)."""


def stochastic_times(steps: int) -> list[float]:
    """Where `stochastic_euler` calls the model: evenly from 1 to 0.04.

    Raises ValueError for fewer than two steps: a single one would start and end at once.
    """
    if steps < 2:
        raise ValueError(f"a stochastic flow sampler needs at least 2 steps, not {steps}")
    return [1 - (1 - STOCHASTIC_LAST) * step / (steps - 1) for step in range(steps)]


def stochastic_euler(
    velocity: Velocity, noise: Tensor, steps: int, draws: Sequence[Tensor], on_step: OnStep | None = None
) -> Tensor:
    """Euler-Maruyama on the reverse SDE with diffusion 2 t (xAR as published, after SiT, arXiv 2401.08740).

    The score is -(x + (1 - t) v) / t, so the drift v - t score is x + (2 - t) v. Each step but the last adds
    sqrt(2 t) sqrt(dt) times one of the `steps` - 1 `draws`; the last, from 0.04 to 0, adds none.
    """
    x = noise
    for step, (t, after) in enumerate(pairwise([*stochastic_times(steps), 0.0])):
        v = velocity(x, step, t)
        moved = x + (after - t) * (x + (2 - t) * v)
        if after > 0:
            moved = moved + math.sqrt(2 * t * (t - after)) * draws[step]
        if on_step is not None:
            on_step(step + 1, moved, x - t * v)
        x = moved
    return x


def classifier_free_guidance(v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """v_null + scale * (v_cond - v_null)."""
    return v_null + scale * (v_cond - v_null)


class AdaptiveProjectedGuidance:
    """APG (arXiv 2410.02416): guidance without its over-saturating parallel part. One object a sampling call.

    The running difference is stored before capping; the cap rescales only what is used.
    """

    def __init__(self, *, momentum: float = -0.5, cap: float = 2.5, parallel: float = 0.0) -> None:
        self.momentum = momentum
        self.cap = cap
        self.parallel = parallel
        self.running: Tensor | None = None

    def __call__(self, v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
        """Guided velocity of one step; the arguments are (B, C, H, W), norms are per image."""
        difference = v_cond - v_null
        if self.running is not None:
            difference = difference + self.momentum * self.running
        self.running = difference
        rest = tuple(range(1, v_cond.ndim))
        norm = torch.linalg.vector_norm(difference, dim=rest, keepdim=True)
        update = difference * (self.cap / norm.clamp_min(1e-12)).clamp(max=1)
        # The projection is a small difference of large numbers at high guidance: float64 (which MPS lacks).
        wide = torch.float32 if v_cond.device.type == "mps" else torch.float64
        direction = torch.nn.functional.normalize(v_cond.to(wide).flatten(1), dim=1).view(v_cond.shape)
        along = (update.to(wide) * direction).sum(dim=rest, keepdim=True) * direction
        update = (update.to(wide) - (1 - self.parallel) * along).to(v_cond.dtype)
        return v_cond + (scale - 1) * update
