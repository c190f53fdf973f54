"""What needs a forward pass: scores, and the oracle truncation of a full update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from lora_lab.adapters.full import FullLayer
from lora_lab.batches import by_length
from lora_lab.linalg import Spectrum
from lora_lab.models import Examples, Model, score

EVAL_BATCH = 64


@dataclass(frozen=True)
class Scored:
    """Result on one split.

    Attributes
    ----------
    score, loss : float
        The model's own score (higher is better), and the mean loss.
    each : ndarray, (examples,)
        What each example contributes to the score, see `Model.contributions`.
    """

    score: float
    loss: float
    each: np.ndarray = field(compare=False)


@torch.inference_mode()
def features(model: Model, examples: Examples) -> np.ndarray:
    """What the head sees, (examples, features), in the order of the examples."""
    model.eval()
    device = next(model.parameters()).device
    out: np.ndarray | None = None
    for indices in by_length(examples.lengths, EVAL_BATCH):
        batch = {k: v.to(device) for k, v in examples.collate(indices).items()}
        part = model.features(batch).cpu().numpy()
        out = np.empty((len(examples), part.shape[1]), part.dtype) if out is None else out
        out[indices] = part
    assert out is not None, "an empty split cannot be scored"
    return out


def targets_of(examples: Examples) -> np.ndarray:
    """Labels (examples,) or regression targets (examples, outputs)."""
    return examples.collate(range(len(examples)))["targets"].numpy()


@torch.inference_mode()
def score_features(model: Model, seen: np.ndarray, targets: np.ndarray) -> Scored:
    """Score the model's own head on given features."""
    device = next(model.parameters()).device
    output = model.classifier(torch.from_numpy(seen).to(device))
    loss = float(model.loss(output, torch.from_numpy(targets).to(device)))
    found = output.cpu().numpy()
    return Scored(model.score(found, targets), loss, model.contributions(found, targets))


def evaluate(model: Model, examples: Examples) -> Scored:
    """Score the model on a split."""
    return score_features(model, features(model, examples), targets_of(examples))


PENALTIES = (1e-1, 1e-2, 1e-3)
"""Ridge penalties among which the refitted head's is chosen on the validation split."""


def refit(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> float:
    """Test score of a head fitted to convergence on frozen features.

    Classification: multinomial logistic regression on standardised features, its ridge penalty
    chosen on the validation split. Regression: the mean residual (the planted head is a bias).

    Parameters
    ----------
    train, validation, test : (features, targets)
        As from `features` and `targets_of`.
    """
    if train[1].ndim > 1:
        bias = (train[1] - train[0]).mean(0, dtype=np.float64)
        return score(test[0] + bias, test[1])
    centre, spread = train[0].mean(0), train[0].std(0)
    spread[spread == 0] = 1
    x, v, t = ((s[0] - centre) / spread for s in (train, validation, test))
    classes = int(max(train[1].max(), validation[1].max(), test[1].max())) + 1
    weights = np.zeros((x.shape[1] + 1, classes))
    best, chosen = -1.0, weights
    for penalty in PENALTIES:
        weights = _logistic(x, train[1], penalty, weights)
        found = score(v @ weights[:-1] + weights[-1], validation[1])
        if found > best:
            best, chosen = found, weights
    return score(t @ chosen[:-1] + chosen[-1], test[1])


def _logistic(x: np.ndarray, y: np.ndarray, penalty: float, start: np.ndarray) -> np.ndarray:
    """Weights (features + 1, classes) of ridge logistic regression; the last row is the bias."""
    onehot = np.eye(start.shape[1])[y]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(start.shape)
        # The products in the dtype of x (float32 is exact enough and twice as fast).
        logits = x @ w[:-1].astype(x.dtype) + w[-1]
        log_p = log_softmax(logits, axis=1)
        error = np.exp(log_p) - onehot
        slope = np.vstack([x.T @ error.astype(x.dtype) / len(x) + penalty * w[:-1], error.mean(0)])
        value = -(log_p * onehot).sum() / len(x) + penalty / 2 * (w[:-1] ** 2).sum()
        return float(value), slope.ravel().astype(np.float64)

    found = minimize(
        objective,
        start.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 100, "ftol": 1e-6},
    )
    return np.asarray(found.x).reshape(start.shape)


REFIT_EXAMPLES = 512
"""Training examples on which a head is refitted; each k of an oracle pays for them anew."""


def oracle_grid(q: int) -> list[int]:
    """k = 0, then doubling to 16 and in steps of 4 from there, below q, and q itself.

    >>> oracle_grid(6), oracle_grid(384)
    ([0, 1, 2, 4, 6], [0, 1, 2, 4, 8, 16, 64, 256, 384])
    """
    steps = [1, 2, 4, 8, *(16 * 4**i for i in range(16))]
    return [0, *(k for k in steps if k < q), q]


class FirstExamples:
    """The first examples of a split, as a split of their own."""

    def __init__(self, examples: Examples, count: int) -> None:
        self.lengths, self.collate = examples.lengths[:count], examples.collate

    def __len__(self) -> int:
        return len(self.lengths)


def oracle_truncation(
    model: Model,
    adapted: Mapping[str, FullLayer],
    spectra: Mapping[str, Spectrum],
    splits: Mapping[str, Examples],
) -> list[dict[str, float | str]]:
    """Test score of `W0 + dW_k`, every layer truncated to its k leading directions at once.

    Parameters
    ----------
    model : Model
        After full fine-tuning; its weights are put back afterwards.
    adapted : mapping of str to FullLayer
        The layers that changed.
    spectra : mapping of str to Spectrum
        Their updates, with vectors.
    splits : mapping of str to Examples
        `train` and `validation` (to refit the head) and `test`.

    Returns
    -------
    list of dict
        Rows `measure, k, side, value` for the whole model: `oracle_score` with side
        `trained_head` and `refitted_head` (not for a model whose head has no parameters), and
        `oracle_energy`, the share of Σ‖dW‖² kept. k = 0 is the base network; the largest k is the
        whole update.
    """
    has_head = next(model.classifier.parameters(), None) is not None
    splits = {**splits, "train": FirstExamples(splits["train"], REFIT_EXAMPLES)}
    splits = splits if has_head else {"test": splits["test"]}
    grid = oracle_grid(max(min(s.shape) for s in spectra.values()))
    total = sum(float((s.values**2).sum()) for s in spectra.values())
    targets = {name: targets_of(examples) for name, examples in splits.items()}
    rows: list[dict[str, float | str]] = []
    for k in grid:
        with truncated(adapted, spectra, k):
            seen = {name: features(model, examples) for name, examples in splits.items()}
        found = {"trained_head": score_features(model, seen["test"], targets["test"]).score}
        if has_head:
            pairs = [(seen[n], targets[n]) for n in ("train", "validation", "test")]
            found["refitted_head"] = refit(pairs[0], pairs[1], pairs[2])
        rows += [
            {"measure": "oracle_score", "k": float(k), "side": side, "value": value}
            for side, value in found.items()
        ]
        kept = sum(float((s.values[:k] ** 2).sum()) for s in spectra.values())
        energy = kept / total if total > 0 else float("nan")
        rows.append({"measure": "oracle_energy", "k": float(k), "side": "", "value": energy})
    return rows


@contextmanager
def truncated(
    adapted: Mapping[str, FullLayer], spectra: Mapping[str, Spectrum], k: int
) -> Iterator[None]:
    """Every layer's weight is W0 + dW_k inside, and put back after."""
    trained = {name: layer.W.data for name, layer in adapted.items()}
    try:
        for name, layer in adapted.items():
            layer.W.data = _truncated(layer, trained[name], spectra[name], k)
        yield
    finally:
        for name, layer in adapted.items():
            layer.W.data = trained[name]


def _truncated(layer: FullLayer, W: torch.Tensor, s: Spectrum, k: int) -> torch.Tensor:
    if k >= len(s.values):
        return W
    if k == 0:
        return layer.W0
    return layer.W0 + torch.from_numpy(s.truncate(k).dense()).to(layer.W0)
