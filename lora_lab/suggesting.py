"""What `lora-lab suggest-rank` does: from a full fine-tuning to the r that LoRA needs, per layer.

The evidence is a full fine-tuning of the user's model on the user's data, as short as wanted
(`data.train_examples=`), or a pair of checkpoints. Each policy says an r; one is recommended; on
request LoRA is trained with it, and with half and twice of it, and compared with the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lora_lab.adapters.full import FullLayer
from lora_lab.checkpoints.write import lora_config
from lora_lab.config import Host
from lora_lab.engine import Watcher, sweep
from lora_lab.evaluation import evaluate, truncated
from lora_lab.execution import reopened
from lora_lab.hydra_bridge import Planned, config_of, plan
from lora_lab.linalg import decompose
from lora_lab.measuring import kept
from lora_lab.outside import study
from lora_lab.policies import (
    DEFAULT,
    MARGIN,
    ORACLE,
    POLICIES,
    WITHOUT_DATA,
    overall,
    policy_ranks,
)
from lora_lab.preparation import put_back
from lora_lab.registry import WrongInput
from lora_lab.replication import replicated
from lora_lab.stats import Interval, t_interval
from lora_lab.store import Store, Tables
from lora_lab.tasks import Tell

PROBE_SEEDS, VERIFY_SEEDS = "0,1", "0,1,2,3,4"

FASTER = 3.0
"""Factor between the two learning rates that are tried for each r."""


@dataclass(frozen=True)
class Advice:
    """What the policies say.

    Attributes
    ----------
    ranks : dict of str to Series
        Policy to r by layer.
    chosen : str
        The policy that is recommended.
    curve : dict of int to float
        k to the validation score of W0 + dW_k, of the truncations that were tried; the largest k is
        the whole update. Empty without data.
    shapes : dict of str to (int, int)
        (out, in) of the layers.
    """

    ranks: Mapping[str, pd.Series]
    chosen: str
    curve: Mapping[int, float]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def recommended(self) -> pd.Series:
        """r by layer, at most min(out, in)."""
        return self.times(1)

    def times(self, factor: float) -> pd.Series:
        """This many times the chosen policy's r, at least 1 and at most min(out, in)."""
        found = np.ceil(self.ranks[self.chosen] * factor).astype(int)
        most = pd.Series({name: min(self.shapes[name]) for name in found.index})
        return found.clip(lower=1, upper=most)

    def content(self) -> dict[str, object]:
        """adapter_config.json for PEFT, with α = 2r in every layer."""
        sizes = {str(name): (int(r), 2.0 * int(r)) for name, r in self.recommended.items()}
        return lora_config(sizes, self.shapes, inference_mode=False, use_rslora=False)


# ---- evidence ----------------------------------------------------------------------------------


def from_pair(base: str, tuned: str, tell: Tell) -> Advice:
    """Advice from two checkpoints: without data, from the updates alone."""
    names = [name for name, _ in POLICIES.values() if name != "replicated_rank"]
    found = study(base, tuned, names=names, null=None, tell=tell)
    changed = found.measures["flag"] != "zero update"
    measures = found.measures[changed & found.measures["value"].notna()]
    ranks = {name: policy_ranks(measures, name) for name in POLICIES}
    ranks = {name: series for name, series in ranks.items() if len(series)}
    if WITHOUT_DATA not in ranks:
        raise WrongInput(f"no linear layer of {tuned!r} differs from {base!r}: nothing to suggest.")
    sides = found.layers.set_index("layer")[["m", "n"]].astype(int)
    shapes = {str(name): (int(m), int(n)) for name, (m, n) in sides.T.items()}
    return Advice(
        ranks, WITHOUT_DATA, {}, {name: shapes[name] for name in ranks[WITHOUT_DATA].index}
    )


def from_runs(store: Store, run_ids: Sequence[str], host: Host, margin: float = MARGIN) -> Advice:
    """Advice from finished full fine-tunings of one model on one data set, one for each seed.

    Parameters
    ----------
    store : Store
    run_ids : sequence of str
        Runs that differ in the seed only; their updates are kept whole.
    margin : float
        Score that a truncation may lose on the validation split.
    """
    measures = Tables(store, run_ids).measures
    measures = pd.concat([measures, replicated(store, [run_ids] if len(run_ids) > 1 else [])])
    ranks = {name: policy_ranks(measures, name) for name in POLICIES}
    found = [truncation_curve(store, run_id, host, margin) for run_id in run_ids]
    curve = {k: float(np.mean([c[k] for _, c in found if k in c])) for k in sorted(
        {k for _, c in found for k in c})}  # fmt: skip
    config = config_of(store, run_ids[0])
    shapes = config.model.shapes(config.data)
    layers = config.adapter.layers(shapes)
    needed = int(np.ceil(np.median([k for k, _ in found])))
    ranks[ORACLE] = pd.Series(max(needed, 1), index=layers)
    ranks = {name: series for name, series in ranks.items() if len(series)}
    return Advice(ranks, DEFAULT, curve, {name: shapes[name] for name in layers})


def truncation_curve(
    store: Store, run_id: str, host: Host, margin: float
) -> tuple[int, dict[int, float]]:
    """The smallest k whose truncation loses at most `margin`, and the scores that were looked at.

    k doubles until a truncation is good enough, and the gap to the last one that is not is halved:
    about 2·log2(k) passes over the validation split, which training has not seen.
    """
    updates, whole = kept(store.run(run_id))
    if not whole:
        raise WrongInput(f"run {run_id} kept only leading directions; a probe keeps all of them.")
    setup = reopened(store, run_id, config_of(store, run_id), host)
    layers = {name: m for name, m in setup.adapted.items() if isinstance(m, FullLayer)}
    put_back(layers, updates)
    spectra = {n: decompose(u, vectors=True, layer=n) for n, u in updates.items()}
    most = max(min(s.shape) for s in spectra.values())
    curve = {most: evaluate(setup.model, setup.splits["validation"]).score}

    def enough(k: int) -> bool:
        if k not in curve:
            with truncated(layers, spectra, k):
                curve[k] = evaluate(setup.model, setup.splits["validation"]).score
        return curve[k] >= curve[most] - margin

    low, high = -1, 0
    while not enough(high):
        low, high = high, min(max(1, 2 * high), most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high, dict(sorted(curve.items()))


# ---- a probe, and the proof ----------------------------------------------------------------------


def probe(ids: Sequence[str], words: Sequence[str], watcher: Watcher) -> tuple[list[str], Host]:
    """The full fine-tunings to learn from: those of these ids, or two seeds of what `words` say.

    Runs that are there are not done again.
    """
    if ids:
        host = plan([[]], words)[1]
        store = Store(host.results)
        for run_id in ids:
            run = store.run(run_id)
            if run.status() != "done" or (
                run.read_json("config")["config"]["adapter"]["choice"] != "full"
            ):
                raise WrongInput(f"{run_id!r} must be a finished run with adapter=full.")
        return list(ids), host
    if any(word.startswith(("adapter=", "adapter.", "seed=")) for word in words):
        raise WrongInput(
            "suggest-rank fine-tunes fully with two seeds; leave adapter and seed out."
        )
    planned, host = plan([["adapter=full", f"seed={PROBE_SEEDS}"]], words)
    ids = [one.run_id for one in planned]
    _need_done(sweep("suggest-rank", planned, host, watcher, ids).status)
    return list(ids), host


def _need_done(status: Mapping[str, str]) -> None:
    bad = [f"{run_id} is {what}" for run_id, what in status.items() if what != "done"]
    if bad:
        raise WrongInput(f"{bad[0]}; see `lora-lab status`, then give the same command again.")


@dataclass(frozen=True)
class Trial:
    """LoRA at one r against full fine-tuning.

    Attributes
    ----------
    r : int
        Median over the layers.
    lr : float
        The learning rate, the best of those tried by validation score.
    lost : Interval
        Score of full fine-tuning minus LoRA's, mean over seeds with its 90 % interval.
    n_seeds : int
    """

    r: int
    lr: float
    lost: Interval
    n_seeds: int

    def passed(self, margin: float) -> bool:
        """Whether LoRA is not worse by the margin: a one-sided t test at 5 %."""
        return self.lost.high < margin

    def said(self, margin: float) -> str:
        """The result in a line, in points of score."""
        lost, low, high = (100 * x for x in self.lost)
        return (
            f"{'PASS' if self.passed(margin) else 'FAIL'} r = {self.r} at rate {self.lr:g}: "
            f"{lost:.1f} points below full fine-tuning [{low:.1f}, {high:.1f}], "
            f"{self.n_seeds} seeds, margin {100 * margin:g}"
        )


def verify(advice: Advice, words: Sequence[str], watcher: Watcher) -> list[Trial]:
    """Train LoRA with the recommended r, half and twice of it, and full fine-tuning, five seeds.

    LoRA's best rate rises as r falls (claim B6), so each r has its own: its default or `FASTER`
    times that, unless `words` say which.

    Parameters
    ----------
    words : sequence of str
        As for `probe`.
    """
    seeds = f"seed={VERIFY_SEEDS}"
    full, host = plan([["adapter=full", seeds]], words)
    tried = {overall(own): own for own in map(advice.times, (0.5, 1.0, 2.0))}
    lora = {r: at_rates([*_line(r, own), seeds], words) for r, own in tried.items()}
    every = [*full, *(one for own in lora.values() for one in own)]
    _need_done(sweep("suggest-rank", every, host, watcher).status)
    runs = Tables(Store(host.results), [one.run_id for one in every]).runs.set_index("run_id")

    def of(planned: Sequence[Planned]) -> pd.DataFrame:
        return runs.loc[[one.run_id for one in planned]].set_index("seed")

    trials = []
    for r, planned in lora.items():
        own = of(planned)
        scores = own.groupby("train.lr")["validation_score"].mean()
        rate = float(scores.index.to_numpy(dtype=float)[scores.argmax()])
        lost = (of(full)["score"] - own.loc[own["train.lr"] == rate, "score"]).to_numpy()
        trials.append(Trial(r, rate, t_interval(lost, level=0.9), len(lost)))
    return trials


def at_rates(line: list[str], words: Sequence[str]) -> Sequence[Planned]:
    """The runs of a line at its default rate and at `FASTER` times that, or at the user's own."""
    own = plan([line], words)[0]
    default = own[0].config.train.lr
    assert default is not None, "a planned run has its rate"
    if any(word.startswith("train.lr=") for word in words):
        return own
    return [*own, *plan([[*line, f"train.lr={FASTER * default:g}"]], words)[0]]


def _line(r: int, ranks: pd.Series) -> list[str]:
    """Overrides of LoRA with these ranks by layer, α = 2r in each."""
    other = {str(name): int(k) for name, k in ranks.items() if k != r}
    line = ["adapter=lora", f"adapter.r={r}"]
    for key, factor in (("r_pattern", 1), ("alpha_pattern", 2)) if other else ():
        pairs = ",".join(f"'{re.escape(name)}':{factor * k}" for name, k in other.items())
        line.append(f"adapter.{key}={{{pairs}}}")
    return line


def said(advice: Advice) -> list[str]:
    """The recommendation and its reasons, in sentences."""
    r = overall(advice.recommended)
    lines = [f"recommended: r = {r} by the policy '{advice.chosen}'"]
    if advice.curve:
        most = max(advice.curve)
        at = advice.curve.get(r, float("nan"))
        lines.append(
            f"cut down to {r} directions the full fine-tuning scores {at:.3f} on the validation "
            f"split, whole {advice.curve[most]:.3f}, without its update {advice.curve[0]:.3f}"
        )
    others = {name: overall(own) for name, own in advice.ranks.items() if name != advice.chosen}
    apart = [f"{name} {k}" for name, k in others.items() if not r / 1.5 <= k <= 1.5 * r]
    if apart:
        lines.append("other policies count something else: " + ", ".join(apart))
    return lines


def write_config(advice: Advice, folder: Path) -> Path:
    """adapter_config.json in a folder, as `peft.LoraConfig.from_pretrained` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(advice.content(), indent=1) + "\n")
    return path
