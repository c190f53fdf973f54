"""How often `suggest-rank` finds a rank that is known: 40 planted problems at each noise level.

Ranks from 1 to 32, four problems each, and signal-to-noise ratios of 4, 2 and 1 (standard deviation
of the update's output over that of the noise). Right is a recommendation within a factor of 1.5 of
the truth. To reach: 90 % of the problems at 4 and at 2. About five minutes.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lora_lab.engine import Watcher, sweep
from lora_lab.hydra_bridge import plan
from lora_lab.policies import overall
from lora_lab.stats import rate_interval
from lora_lab.store import Store
from lora_lab.suggesting import from_runs

TABLE = Path("results/benchmarks/suggestions.csv")
RESULTS = "results/suggestions"
RANKS, PROBLEMS, RATIOS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), 4, (4, 2, 1)
FACTOR = 1.5


def main() -> None:
    """Probe every problem, ask every policy, and print how often each is right."""
    lines = [
        f"model=planted data=planted data.true_r={r} data.seed={problem} data.noise={1 / ratio} "
        "train.epochs=8 train.spectra=0 train.evaluations=1 adapter=full seed=0,1"
        for ratio in RATIOS
        for r in RANKS
        for problem in range(PROBLEMS)
    ]
    plans = [plan([line.split()], [f"host.results={RESULTS}", "host.yes=true"]) for line in lines]
    host = plans[0][1]
    sweep("suggestions", [one for planned, _ in plans for one in planned], host, Watcher())
    rows = []
    for planned, _ in plans:
        data = planned[0].config.data
        advice = from_runs(Store(host.results), [one.run_id for one in planned], host)
        about = {"ratio": 1 / data.noise, "problem": data.seed, "true_r": data.true_r}
        rows += [
            about | {"policy": name, "r": overall(ranks), "recommended": name == advice.chosen}
            for name, ranks in advice.ranks.items()
        ]
    table = pd.DataFrame(rows)
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(TABLE, index=False, float_format="%.4g")
    ratio = table["r"] / table["true_r"]
    table["right"] = (ratio <= FACTOR) & (ratio >= 1 / FACTOR)
    for (level, policy), own in table.groupby(["ratio", "policy"], sort=False):
        hits = int(own["right"].sum())
        _, low, high = rate_interval(hits, len(own))
        mark = " (recommended)" if own["recommended"].all() else ""
        low_r, high_r = (ratio[own.index] < 1 / FACTOR).sum(), (ratio[own.index] > FACTOR).sum()
        print(
            f"signal-to-noise {level:g}  {policy:<16}{hits:3d} of {len(own)} right "
            f"[{low:.2f}, {high:.2f}], {low_r} too low, {high_r} too high{mark}"
        )


if __name__ == "__main__":
    main()
