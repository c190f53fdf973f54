"""E2: a linear autoencoder and principal components.

Claim: a linear autoencoder with a bottleneck of r learns the principal subspace of centred data, up
to an invertible r × r matrix; a nonlinear one generalises it.

Decided by: linear autoencoders x ↦ DEx, trained by L-BFGS from random starts on Gaussian data in 20
dimensions whose spectrum falls as 0.8^i, at r = 1, 2, 4 and 8: the largest principal angle between
the columns of D and the first r principal components, the distance of DE from the projection on
them, and M = UᵀD (invertible, and not a rotation); the same on data that are not centred. Nonlinear
ones (one hidden layer of 32 on each side, r = 1) on points along a bent curve in 10 dimensions, and
on flat data: reconstruction error on held-out points over that of PCA at the same r.

Test: 95 % t intervals over seeds, the worst r of each. The subspace: the angle lies below 0.02 rad.
Up to an invertible matrix: ‖DE − UUᵀ‖_F lies below 0.05, and the condition of M below 100. The
nonlinear one: ln of the error over PCA's on the curve lies below 0.

Power: the first two are convergence to a known optimum, with hardly any scatter; the ratio on the
curve is expected near 0.2 with a spread of a factor 2, which 5 seeds place below 1 with a chance
above .9.

Cost: about a minute, no runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.linalg import subspace_angles
from scipy.optimize import minimize
from torch import nn

from experiments.curves import seeds_to_tell, spread
from lora_lab.claims import Verdict, against, together
from lora_lab.figures import canvas, finish
from lora_lab.linalg.factored import Array

WIDTH, EXAMPLES, RANKS = 20, 500, (1, 2, 4, 8)
CURVE_WIDTH, HIDDEN = 10, 32
STEPS = {"smoke": 30, "paper": 3000}
MOST_ANGLE, MOST_ERROR, MOST_CONDITION = 0.02, 0.05, 100.0


def compute(size: str, seed: int) -> pd.DataFrame:
    """Linear autoencoders over r, nonlinear ones on bent and flat data."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    X = (rng.standard_normal((EXAMPLES, WIDTH)) * 0.8 ** np.arange(WIDTH)) @ Q.T
    X -= X.mean(0)
    away = X + 3 * rng.standard_normal(WIDTH) / np.sqrt(WIDTH)
    components = np.linalg.svd(X, full_matrices=False)[2].T
    most = 200 if size == "smoke" else 5000
    rows = [
        {"kind": kind, "r": r} | _linear(data, components[:, :r], rng, most)
        for kind, data in (("centred", X), ("not centred", away))
        for r in RANKS
    ]
    for kind in ("curve", "flat"):
        train, test = _points(kind, rng)
        ratio = _nonlinear(train, seed, STEPS[size])(test) / _pca_error(train, test)
        rows.append({"kind": kind, "r": 1, "ratio": ratio})
    return pd.DataFrame(rows)


def _linear(X: Array, U: Array, rng: np.random.Generator, most: int) -> dict[str, float]:
    """Train x ↦ DEx and compare it with the projection on U."""
    d, r = U.shape
    C = X.T @ X / len(X)

    def loss(flat: Array) -> tuple[float, Array]:
        D, E = flat[: d * r].reshape(d, r), flat[d * r :].reshape(r, d)
        off = D @ E - np.eye(d)
        G = 2 * off @ C
        return float(np.sum(off @ C * off)), np.concatenate([(G @ E.T).ravel(), (D.T @ G).ravel()])

    start = 0.1 * rng.standard_normal(2 * d * r)
    tight = {"maxiter": most, "maxfun": 2 * most, "ftol": 1e-15, "gtol": 1e-9}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=tight).x
    D, E = found[: d * r].reshape(d, r), found[d * r :].reshape(r, d)
    M = U.T @ D
    return {
        "angle": float(subspace_angles(D, U).max()),
        "error": float(np.linalg.norm(D @ E - U @ U.T)),
        "condition": float(np.linalg.cond(M)),
        "off_rotation": float(np.linalg.norm(M.T @ M - np.eye(r)) / np.sqrt(r)),
    }


def _points(kind: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """Centred points along a bent curve or a straight line, with a little noise."""
    t = rng.uniform(-1, 1, 2 * EXAMPLES)
    bent = np.stack([t, t**2, np.sin(3 * t), np.cos(3 * t)], axis=1)
    ways = bent if kind == "curve" else t[:, None]
    Q = np.linalg.qr(rng.standard_normal((CURVE_WIDTH, ways.shape[1])))[0]
    X = ways @ Q.T + 0.05 * rng.standard_normal((len(t), CURVE_WIDTH))
    X -= X[:EXAMPLES].mean(0)
    return X[:EXAMPLES], X[EXAMPLES:]


def _pca_error(train: Array, test: Array) -> float:
    v = np.linalg.svd(train, full_matrices=False)[2][:1]
    return float(((test - test @ v.T @ v) ** 2).sum(1).mean())


def _nonlinear(train: Array, seed: int, steps: int) -> Any:
    """A trained autoencoder with one hidden layer on each side, as its error on other points."""
    torch.manual_seed(seed)
    d, h = train.shape[1], HIDDEN
    net = nn.Sequential(
        *(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, 1)),
        *(nn.Linear(1, h), nn.Tanh(), nn.Linear(h, d)),
    )
    x = torch.from_numpy(train).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        ((net(x) - x) ** 2).sum(1).mean().backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def error(test: Array) -> float:
        y = torch.from_numpy(test).float()
        return float(((net(y) - y) ** 2).sum(1).mean())

    return error


def _worst(table: pd.DataFrame, kind: str, column: str) -> pd.Series:
    """The largest value over r, by seed."""
    own = table[table["kind"] == kind]
    return own[column].groupby(own["seed"]).max()


def verdict(table: pd.DataFrame) -> Verdict:
    """The subspace, up to an invertible matrix, and the nonlinear one."""
    angle, error, condition = (
        spread(_worst(table, "centred", name)) for name in ("angle", "error", "condition")
    )
    curve, flat = (spread(np.log(_worst(table, kind, "ratio"))) for kind in ("curve", "flat"))
    invertible = [
        against(error, MOST_ERROR, more=False),
        against(condition, MOST_CONDITION, more=False),
    ]
    parts = [against(angle, MOST_ANGLE, more=False), *invertible, against(curve, 0.0, more=False)]
    outcome = together(parts)
    linear = table[table["kind"] == "centred"]
    times = np.exp(curve)
    said = (
        f"Linear: the columns of D lie at most {angle.value:.1g} rad (upper end {angle.high:.1g}) "
        f"from the principal subspace, DE is its projection to {error.value:.1g}, and M = UᵀD is "
        f"invertible (condition up to {linear['condition'].max():.2g}) but no rotation (MᵀM is "
        f"{linear['off_rotation'].median():.2g} off in the median); without centring the angle is "
        f"{_worst(table, 'not centred', 'angle').mean():.2g}; nonlinear: {times[0]:.2g} "
        f"[{times[1]:.2g}, {times[2]:.2g}] times the error of PCA on a bent curve, and "
        f"{np.exp(flat.value):.2g} times on flat data"
    )
    if outcome == "unresolved":
        said += f"; {seeds_to_tell(np.log(_worst(table, 'curve', 'ratio')), 0.0)}"
    seeds = table["seed"].nunique()
    interval = (curve.low, curve.high)
    return Verdict(outcome, said + ".", curve.value, interval, n_seeds=seeds, effect=curve.value)


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame:
    """Angles near 0 and errors below PCA's; neither; the first alone; or scatter."""
    kinds = ("centred", "not centred", "curve", "flat")
    table = pd.DataFrame([{"kind": k, "r": 1, "seed": seed} for k in kinds for seed in range(5)])
    linear = table["kind"].isin(kinds[:2])
    far = outcome == "refuted"
    noise = rng.uniform(0.8, 1.2, len(table))
    table["angle"] = np.where(linear, noise * (0.5 if far else 1e-4), np.nan)
    table["error"] = np.where(linear, noise * (0.5 if far else 1e-4), np.nan)
    table["condition"] = np.where(linear, noise * (1e6 if far else 3.0), np.nan)
    table["off_rotation"] = np.where(linear, 0.5, np.nan)
    ratio = {"supported": 0.2, "refuted": 2.0, "mixed": 2.0, "unresolved": 1.0}[outcome]
    wide = np.tile([0.2, 5.0, 0.3, 3.0, 1.0], len(kinds)) if outcome == "unresolved" else 1.0
    return table.assign(ratio=np.where(linear, np.nan, ratio * wide * noise))


def figure(table: pd.DataFrame) -> Any:
    """Angles over r, and errors of the nonlinear one over PCA's."""
    picture, [[left, right]] = canvas(9.5, 4, 1, 2)
    for kind, colour in (("centred", "#0072b2"), ("not centred", "#d55e00")):
        own = table[table["kind"] == kind]
        left.plot(own["r"], own["angle"].clip(lower=1e-9), "o", color=colour, label=kind, alpha=0.6)
    left.axhline(MOST_ANGLE, color="grey", lw=1)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("bottleneck r")
    left.set_ylabel("largest angle to the principal subspace (rad)")
    left.legend(fontsize=8)
    for i, kind in enumerate(("curve", "flat")):
        ratio = table.loc[table["kind"] == kind, "ratio"]
        right.plot(i + np.linspace(-0.1, 0.1, len(ratio)), ratio, "o", color="#0072b2")
    right.axhline(1, color="grey", lw=1)
    right.set_xticks([0, 1], ["bent curve", "flat data"])
    right.set_xlim(-0.5, 1.5)
    right.set_yscale("log")
    right.set_ylabel("held-out error over that of PCA")
    note = (
        "Left: below the line the linear autoencoder has found the principal subspace. Right: "
        "below the line the nonlinear one does better than PCA. Points: seeds."
    )
    return finish(picture, "Autoencoders and principal components", note)
