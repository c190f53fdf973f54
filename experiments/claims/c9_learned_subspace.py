"""C9: whether the subspace of LoRA is learned.

Claim: the subspace is learned, not given: A chooses which inputs matter, B which outputs move.

Decided by: LoRA at r = 8 with A trained and with A frozen, each at its best rate. On planted, the
true input and output directions of the update are known; on digits the 8 leading directions of the
first full gradient (one step of gradient descent on all training images) stand for them. φ of the
row space of A after training with these inputs, and of A at the start; φ of the column space of B
with these outputs; φ of row(A) with its start; and the part of LoRA's outputs outside col(B).

Test: for each ground, mean over layers, 95 % t intervals over seeds. A chooses: φ after − φ at the
start above 0. B chooses: φ − its mean for random subspaces above 0. Not given: φ of row(A) with its
start below .5. It pays: score with A trained − with A frozen above 0. Anything outside col(B)
beyond rounding refutes the claim.

Power: the spread of φ over seeds is about .02, so 5 seeds show a difference of .035; at a spread of
.012 between paired scores one of .02, with a chance of .8.

Cost: 25 runs on digits and 30 on planted, a second each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from experiments.grids import CELL, DIGITS, PLANTED, SEEDS, best, lora
from lora_lab.adapters import layer_seed
from lora_lab.claims import Found, Verdict, against, together
from lora_lab.data.planted import PlantedData
from lora_lab.figures import canvas, finish
from lora_lab.inits import INITS
from lora_lab.linalg import Factored, decompose
from lora_lab.linalg.subspace import overlap_grid
from lora_lab.registry import WrongInput
from lora_lab.stats import paired, t_interval, units_needed

R, TINY = 8, 1e-10
_STEP = "train.optimizer=sgd train.lr=1 train.clip=null train.schedule=constant train.warmup=0"
STEP = f"{_STEP} train.batch_size=1024 train.epochs=1"
"""One step of gradient descent on all digits: the update is minus the gradient."""
GRADIENT = f"{DIGITS.replace('train.epochs=10', STEP)} adapter=full {SEEDS}"
SWEEP = {
    "smoke": [
        f"model=planted data=planted size=smoke adapter=lora adapter.r={R} "
        "adapter.freeze_a=false,true"
    ],
    "paper": [
        lora(DIGITS, ranks=str(R)),
        lora(DIGITS, ranks=str(R), more="adapter.freeze_a=true"),
        GRADIENT,
        f"{PLANTED} data.seed=${{seed}} train.epochs=5 adapter=lora adapter.r={R} "
        f"adapter.freeze_a=false,true train.lr=3e-3,1e-2,3e-2 {SEEDS}",
    ],
}
WEIGHTS = True


def rows(found: Found) -> pd.DataFrame:
    """Overlaps of every LoRA run at the best rate of its cell."""
    runs = found.runs
    low = runs[(runs["adapter"] == "lora") & (runs["adapter.alpha"] == 2 * runs["adapter.r"])]
    chosen = best(low, (*CELL, "adapter.freeze_a"))
    first = runs[runs["adapter"] == "full"].set_index("seed")["run_id"]
    out = []
    for row in chosen.to_dict("records"):
        run = {str(name): value for name, value in row.items()}
        wanted = _wanted(found, run, first)
        layers = found.updates(run["run_id"])
        each = [_overlaps(u, n, run["seed"], *wanted[n]) for n, u in layers.items() if n in wanted]
        if not each:
            continue
        names = {"adapter.freeze_a": "frozen", "train.lr": "lr"}
        own = {
            names.get(n, n): run[n] for n in ("run_id", "model", "seed", "score", "edge", *names)
        }
        out.append(own | pd.DataFrame(each).mean().to_dict())
    return pd.DataFrame(out)


def _wanted(found: Found, run: dict[str, Any], first: pd.Series) -> dict[str, Any]:
    """Output and input directions that matter, (m, k) and (n, k), by layer."""
    if run["model"] == "planted":
        fields = ("seed", "true_r", "decay", "strength", "noise", "width")
        kinds = {"seed": int, "true_r": int, "width": int}
        values: dict[str, Any] = {f: kinds.get(f, float)(run[f"data.{f}"]) for f in fields}
        data = PlantedData(**values)
        teachers = {layer: data.teacher(layer) for layer in found.updates(run["run_id"])}
        return {layer: (teacher.U, teacher.Vh.T) for layer, teacher in teachers.items()}
    if run["seed"] not in first:
        return {}
    spectra = {
        layer: decompose(update, vectors=True)
        for layer, update in found.updates(first[run["seed"]]).items()
    }
    # Keeps mypy and the reader sure: with vectors both sides are there.
    return {n: (s.U[:, :R], s.Vh[:R].T) for n, s in spectra.items() if s.U is not None}  # type: ignore[index]


def _overlaps(
    update: Any, layer: str, seed: int, outputs: np.ndarray, inputs: np.ndarray
) -> dict[str, float]:
    assert isinstance(update, Factored)
    (m, n), r = update.shape, update.r
    generator = torch.Generator().manual_seed(layer_seed(seed, layer))
    A0 = INITS["kaiming"](m, n, r, generator)[0].double().numpy()
    start, after, B = (np.linalg.qr(one)[0] for one in (A0.T, update.A.T, update.B))
    dW = update.dense()
    outside = dW - B @ (B.T @ dW)
    return {
        "given": float(overlap_grid(after, start)[-1, -1]),
        "inputs": float(overlap_grid(after, inputs)[-1, -1]),
        "inputs_start": float(overlap_grid(start, inputs)[-1, -1]),
        "outputs": float(overlap_grid(B, outputs)[-1, -1]),
        "outputs_random": max(r, outputs.shape[1]) / m,
        "outside": float(np.linalg.norm(outside) / np.linalg.norm(dW)),
    }


def _parts(own: pd.DataFrame) -> dict[str, pd.Series]:
    """What decides on one ground, by seed."""
    frozen = own["frozen"].astype(bool)
    free = own[~frozen].set_index("seed")
    return {
        "inputs": free["inputs"] - free["inputs_start"],
        "outputs": free["outputs"] - free["outputs_random"],
        "given": free["given"],
        "pays": (free["score"] - own[frozen].set_index("seed")["score"]).dropna(),
    }


def verdict(table: pd.DataFrame) -> Verdict:
    """Four statements on each ground, and one that only a fault could break."""
    parts, clauses = [], []
    deciding = pd.Series(dtype=float)
    for model, own in table.groupby("model"):
        of = _parts(own)
        found = {name: t_interval(values) for name, values in of.items()}
        parts += [against(found[name], 0.0) for name in ("inputs", "outputs", "pays")]
        parts.append(against(found["given"], 0.5, more=False))
        deciding = of["pays"]
        words = {name: f"{f.value:+.3f} [{f.low:.3f}, {f.high:.3f}]" for name, f in found.items()}
        clauses.append(
            f"on {model} training adds {words['inputs']} to the overlap of A's inputs with those "
            f"that matter, B's outputs exceed the random level by {words['outputs']}, row(A) "
            f"keeps {words['given']} of its start, and training A is worth {words['pays']}"
        )
    exact = bool((table["outside"].dropna() < TINY).all())
    outcome = together(parts) if exact else "refuted"
    said = "; ".join(clauses)
    said = said[0].upper() + said[1:]
    said += f"; {'no' if exact else 'some'} output of LoRA lies outside col(B)"
    edges = table.loc[table["edge"].astype(bool), ["model", "frozen"]].drop_duplicates()
    said += f"; {len(edges)} best rates lie at the edge of their grid" * bool(len(edges))
    if outcome == "unresolved":
        said += f"; {_needed(deciding)}"
    pays, seeds = t_interval(deciding), table["seed"].nunique()
    p = paired(deciding).p if len(deciding) else np.nan
    return Verdict(outcome, said + ".", pays.value, pays[1:], p, n_seeds=seeds, effect=pays.value)


def _needed(pays: pd.Series) -> str:
    spread = float(pays.std()) if len(pays) > 1 else 0.0
    if not spread > 0:
        return "a spread needs at least 2 seeds"
    try:
        return f"{units_needed(0.02, spread)} seeds would show a gain of .02"
    except WrongInput as error:
        return str(error).rstrip(".")


def made(outcome: str, rng: np.random.Generator) -> pd.DataFrame | None:
    """Factors that turn to what matters, that turn away, that hardly turn, or anything."""
    scatter = 0.2 if outcome == "unresolved" else 0.005
    gain, given = {
        "supported": (0.3, 0.1),
        "refuted": (-0.05, 0.9),
        "mixed": (0.3, 0.9),
        "unresolved": (0.0, 0.5),
    }[outcome]
    out = []
    for model in ("digits_vit", "planted"):
        # Seeds whose noise sums to 0: nothing to find is not found by chance.
        spread = [rng.permutation(np.linspace(-1.5, 1.5, 5)) for _ in range(8)]
        for seed, all_noise in enumerate(scatter * np.array(spread).T):
            for frozen in (False, True):
                noise = all_noise[4 * frozen :]
                row = {"model": model, "seed": seed, "frozen": frozen, "outputs_random": 0.1}
                row |= {"score": 0.8 + gain * (not frozen) + noise[0], "given": given + noise[1]}
                row |= {"inputs": 0.1 + gain + noise[2], "inputs_start": 0.1}
                out.append(row | {"outputs": 0.1 + gain + noise[3]})
    return pd.DataFrame(out).assign(outside=1e-16, lr=1e-2, edge=False)


def figure(table: pd.DataFrame) -> Any:
    """Overlaps before and after, by ground, and the scores with and without a trained A."""
    picture, [[left, right]] = canvas(10, 4, 1, 2)
    names = ["inputs_start", "inputs", "outputs_random", "outputs", "given"]
    words = ["A's inputs,\nstart", "A's inputs,\nend", "B's outputs,\nrandom", "B's outputs,\nend"]
    for aside, (model, own) in enumerate(table.groupby("model")):
        free = own[~own["frozen"].astype(bool)]
        for x, name in enumerate(names):
            place = np.full(len(free), x + 0.2 * aside - 0.1)
            label = model if x == 0 else None
            left.scatter(place, free[name], s=16, color=f"C{aside}", label=label)
        for frozen, cell in own.groupby(own["frozen"].astype(bool)):
            place = np.full(len(cell), 2 * aside + frozen)
            right.scatter(place, cell["score"], s=16, color=f"C{aside}")
    left.set_xticks(range(5), [*words, "row(A) with\nits start"], fontsize=8)
    left.set_ylabel("overlap φ, mean over layers")
    left.legend(fontsize=8)
    models = [str(model) for model, _ in table.groupby("model")]
    ticks = [f"{model}\n{how}" for model in models for how in ("A trained", "A frozen")]
    right.set_xticks(range(len(ticks)), ticks, fontsize=8)
    right.set_ylabel("test score")
    note = (
        "What matters: the true directions of the update (planted), or the leading ones of the "
        "first gradient (digits). Points: seeds."
    )
    return finish(picture, "Does the subspace turn to what matters?", note)
