"""suggest-rank: what the policies say of known updates, and the recommendation as PEFT reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import peft
import pytest
import tiny
import torch
from transformers import AutoModel

from experiments.claims.c4_rank_by_95_percent import judge
from lora_lab.claims import read_csv
from lora_lab.cli import main
from lora_lab.policies import DEFAULT, ORACLE, POLICIES, WITHOUT_DATA, overall, policy_ranks
from lora_lab.stats import Interval
from lora_lab.suggesting import FASTER, Trial, at_rates

PLANTED = ["model=planted", "data=planted", "data.true_r=3", "data.width=64", "train.epochs=8",
           "data.noise=0.25", "host.workers=1"]  # fmt: skip


@pytest.fixture(scope="module")
def suggested(tmp_path_factory) -> tuple[Path, list[str]]:
    """A suggestion for a planted problem of rank 3."""
    folder = tmp_path_factory.mktemp("suggest")
    words = [*PLANTED, "--results", str(folder / "results"), "--out", str(folder / "out")]
    assert main(["suggest-rank", *words]) == 0
    return folder, words


def test_the_planted_rank_is_recommended_and_its_reasons_are_given(suggested, capsys) -> None:
    _folder, words = suggested
    assert main(["suggest-rank", *words]) == 0
    shown = capsys.readouterr().out
    assert "recommended: r = 3 by the policy 'oracle'" in shown
    assert "0 already done" not in shown, "a second question trains nothing"
    assert all(name in shown for name in POLICIES), "every policy says something"
    assert "other policies count something else: effective_rank" in shown


@pytest.mark.long
def test_verification_trains_three_r_at_the_better_of_two_rates(suggested, capsys) -> None:
    _folder, words = suggested
    code = main(["suggest-rank", *words, "--verify"])
    tried = [line for line in capsys.readouterr().out.splitlines() if " at rate " in line]
    assert [line.split()[3] for line in tried] == ["2", "3", "6"]
    assert code == (0 if tried[1].startswith("PASS") else 1)


def test_lora_is_verified_at_its_default_rate_and_a_faster_one_or_at_the_users_own() -> None:
    line, words = ["adapter=lora", "adapter.r=3", "seed=0,1"], PLANTED
    slow, again, fast, _ = [one.config.train.lr for one in at_rates(line, words)]
    assert slow == again
    assert fast == pytest.approx(FASTER * slow)
    own = [one.config.train.lr for one in at_rates(line, [*words, "train.lr=0.002"])]
    assert own == [0.002, 0.002]


def test_finished_full_runs_are_evidence_too(suggested, capsys) -> None:
    folder, _ = suggested
    [first, second] = sorted(p.name for p in (folder / "results" / "runs").iterdir())
    words = ["--results", str(folder / "results"), "--out", str(folder / "two")]
    assert main(["suggest-rank", first, second, *words]) == 0
    assert "recommended: r = 3" in capsys.readouterr().out
    assert main(["suggest-rank", "0123456789ab", *words]) == 2
    assert "must be a finished run with adapter=full" in capsys.readouterr().err


def test_the_recommendation_loads_in_peft(suggested) -> None:
    folder, _ = suggested
    config = peft.LoraConfig.from_pretrained(folder / "out")
    assert (config.r, config.lora_alpha, config.use_rslora) == (3, 6, False)
    assert set(config.target_modules) == {"q", "k", "v", "o", "up", "down"}


def test_two_checkpoints_are_enough_and_ranks_differ_by_layer(tmp_path: Path, capsys) -> None:
    base = tiny.folder(tmp_path / "base")
    network = AutoModel.from_pretrained(base)
    torch.manual_seed(0)
    for name, weight in network.named_parameters():
        if name.endswith(("query.weight", "key.weight")):
            r = 2 if "query" in name else 5
            weight.data += torch.randn(len(weight), r) @ torch.randn(r, weight.shape[1])
    network.save_pretrained(tmp_path / "tuned")
    words = ["--base", str(base), "--tuned", str(tmp_path / "tuned")]
    assert main(["suggest-rank", *words, "--out", str(tmp_path / "out")]) == 0
    assert "recommended" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    loaded = peft.get_peft_model(
        AutoModel.from_pretrained(base), peft.LoraConfig.from_pretrained(tmp_path / "out")
    )
    ranks = {
        name.partition(".lora_A")[0].rpartition("model.")[2]: len(weight)
        for name, weight in loaded.named_parameters()
        if "lora_A" in name
    }
    assert len(ranks) == 4, "the layers that changed, no others"
    assert content["rank_pattern"] or len(set(ranks.values())) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "x"], "needs one of"),
        (["--base", "x", "--tuned", "y", "--verify"], "--verify trains"),
        (["model=planted", "data=planted", "adapter=lora"], "leave adapter and seed out"),
        (["0123456789ab", "model=planted"], "needs one of"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    words: list[str], message: str, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["suggest-rank", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_policy_reads_the_last_step_the_asked_level_and_the_mean_over_seeds() -> None:
    rows = [
        (1, "a", "energy_rank", 0.95, 9.0),
        (2, "a", "energy_rank", 0.95, 4.0),
        (2, "a", "energy_rank", 0.9, 2.0),
        (2, "a", "energy_rank", 0.95, 5.0),
        (2, "b", "energy_rank", 0.95, math.nan),
        (2, "", "energy_rank", 0.95, 7.0),
    ]
    table = pd.DataFrame(rows, columns=["step", "layer", "measure", "k", "value"])
    assert policy_ranks(table, "energy").to_dict() == {"a": 5}
    assert len(policy_ranks(table, "replicated")) == 0


def test_a_trial_passes_only_when_its_whole_interval_is_below_the_margin() -> None:
    assert Trial(4, 1e-3, Interval(0.005, -0.004, 0.014), 5).passed(0.02)
    assert not Trial(4, 1e-3, Interval(0.005, -0.02, 0.03), 5).passed(0.02)
    assert Trial(4, 1e-3, Interval(-0.05, -0.06, -0.04), 5).passed(0.02), "better is not worse"
    said = Trial(4, 1e-3, Interval(0.005, -0.004, 0.014), 5).said(0.02)
    assert said == (
        "PASS r = 4 at rate 0.001: 0.5 points below full fine-tuning [-0.4, 1.4], 5 seeds, margin 2"
    )


def test_one_r_for_all_layers_is_their_median_and_the_default_policy_is_known() -> None:
    assert overall(pd.Series([1, 2, 2, 40])) == 2
    assert DEFAULT in {*POLICIES, "oracle"}


def test_what_is_recommended_was_right_most_often_in_the_committed_claim() -> None:
    table = Path(__file__).parents[1] / "results" / "claims" / "C4_rank_by_95_percent.csv"
    found = judge(read_csv(table.read_text())).dropna(subset="right")
    right = found["right"].astype(float).groupby(found["policy"]).mean()
    assert right[DEFAULT] == right[[ORACLE, *POLICIES]].max()
    # Seeds are needed for `replicated`.
    alone = [right[name] for name in POLICIES if name != "replicated"]
    assert right[WITHOUT_DATA] == max(alone)
