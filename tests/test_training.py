"""Training of real architectures at tiny size: what trains, how precisely, what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers

from lora_lab import hydra_bridge
from lora_lab.checkpoints import read_updates
from lora_lab.config import Host
from lora_lab.engine import run_here
from lora_lab.evaluation import evaluate
from lora_lab.linalg import decompose
from lora_lab.preparation import Setup, prepare
from lora_lab.probes import PROBES
from lora_lab.registry import WrongInput
from lora_lab.store import RunDir, Store, Work, load
from lora_lab.training import Diverged, Trainer, spectrum_steps


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("ground")
    return {
        "bert": tiny.folder(base / "bert model"),
        "gpt2": tiny.folder(base / "gpt2 model", "gpt2"),
        "data": tiny.reviews(base / "some, (reviews) [1].csv"),
    }


def line(ground: dict[str, Path], kind: str = "bert") -> list[str]:
    return [
        "model=hf",
        f"model.name={ground[kind]}",
        "data=table",
        f"data.path={ground['data']}",
        "data.text=review",
        "data.label=stars",
        "train.trace_every=2",
        "train.batch_size=8",
    ]


def trained(
    ground: dict[str, Path], cache: Path, *extra: str, kind: str = "bert"
) -> tuple[Setup, Trainer]:
    (one,), host = hydra_bridge.plan([line(ground, kind)], list(extra))
    setup = prepare(one.config, host, cache)
    trainer = Trainer(setup, Work(cache), host, lambda *_: None)
    trainer.train()
    return setup, trainer


def finished(ground: dict[str, Path], results: Path, *extra: str, kind: str = "bert") -> RunDir:
    (one,), host = hydra_bridge.plan([line(ground, kind)], [*extra, f"host.results={results}"])
    assert run_here(one, host) == "done"
    return Store(results).run(one.run_id)


@pytest.mark.parametrize("method", ["head", "full", "lora"])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_every_method_learns_in_every_precision(
    ground: dict[str, Path], tmp_path: Path, method: str, precision: str
) -> None:
    rate = {"head": "0.1", "full": "0.003", "lora": "0.01"}[method]
    setup, trainer = trained(
        ground,
        tmp_path,
        f"adapter={method}",
        f"train.precision={precision}",
        f"train.lr={rate}",
        "train.epochs=6",
        *(["adapter.r=2"] if method == "lora" else []),
    )
    losses = [value for _, _, trace, value in trainer.progress.traces if trace == "loss"]
    assert losses[-1] < 0.7 * losses[0]
    wide = torch.float64 if precision == "float64" else torch.float32
    assert {p.dtype for p in setup.model.parameters() if p.requires_grad} == {wide}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_parts_inside_the_network_train_where_config_says_so(
    ground: dict[str, Path], tmp_path: Path, method: str
) -> None:
    words = "classifier+norms+biases+embeddings"
    setup, _ = trained(
        ground, tmp_path, f"adapter={method}", f"train.also={words}", "train.precision=bfloat16"
    )
    fresh = transformers.AutoModel.from_pretrained(ground["bert"]).state_dict()
    for name, parameter in setup.model.base.named_parameters():
        if name.endswith(("LayerNorm.weight", "word_embeddings.weight", "value.bias")):
            assert parameter.requires_grad
            assert not torch.equal(parameter, fresh[name]), name


def test_biases_of_the_targets_alone_train_where_config_says_so(
    ground: dict[str, Path], tmp_path: Path
) -> None:
    extra = ["adapter.targets=query", "train.also=target_biases"]
    setup, _ = trained(ground, tmp_path, *extra, "train.precision=float32")
    trains = {n for n, p in setup.model.named_parameters() if p.requires_grad}
    owners = {n.removeprefix("base.").rpartition(".")[0] for n in trains}
    assert owners == set(setup.adapted)
    assert {n.rpartition(".")[2] for n in trains} == {"A", "B", "bias"}


def test_plain_gradient_descent_takes_the_gradients_step_and_wants_a_rate(
    ground: dict[str, Path], tmp_path: Path
) -> None:
    words = ["train.optimizer=sgd", "train.precision=float64", "adapter=full", "train.warmup=0"]
    with pytest.raises(WrongInput, match=r"train\.lr must be given with train\.optimizer=sgd"):
        trained(ground, tmp_path, *words)
    one = ["train.lr=0.5", "train.clip=null", "train.epochs=0.01", "train.schedule=constant"]
    _, trainer = trained(ground, tmp_path, *words, *one)
    found = {(trace, layer): v for _, layer, trace, v in trainer.progress.traces}
    for layer in trainer.setup.adapted:
        assert found["step_norm", layer] == pytest.approx(0.5 * found["grad_norm", layer], rel=1e-9)


def test_by_default_nothing_but_the_update_and_the_classifier_trains(
    ground: dict[str, Path], tmp_path: Path
) -> None:
    setup, _ = trained(ground, tmp_path, "adapter.r=2", "train.precision=float32")
    fresh = transformers.AutoModel.from_pretrained(ground["bert"]).state_dict()
    for name, parameter in setup.model.base.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in setup.adapted and "pooler" not in name:
            assert torch.equal(parameter, fresh[name]), name
    trains = {n for n, p in setup.model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trains if n.startswith("base.")} == {"A", "B"}
    assert {n for n in trains if not n.startswith("base.")} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_accumulated_batches_give_the_step_of_the_large_batch(
    ground: dict[str, Path], tmp_path: Path
) -> None:
    common = ["train.precision=float64", "adapter.r=2", "train.epochs=1", "data.train_examples=64"]
    traces = []
    for extra in (["train.batch_size=64"], ["train.batch_size=32", "train.accumulate=2"]):
        _, trainer = trained(ground, tmp_path, *common, *extra)
        traces.append(
            {
                (layer, trace): value
                for step, layer, trace, value in trainer.progress.traces
                if step == 1 and trace.startswith(("grad_norm", "loss"))
            }
        )
    assert traces[0].keys() == traces[1].keys()
    for key, value in traces[0].items():
        assert traces[1][key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


def test_full_and_lora_record_the_same_traces_before_clipping(
    ground: dict[str, Path], tmp_path: Path
) -> None:
    names, first = {}, {}
    for method in ("full", "lora"):
        for clip in ("1e-6", "1e6"):
            _, trainer = trained(
                ground,
                tmp_path,
                f"adapter={method}",
                f"train.clip={clip}",
                "train.precision=float64",
                "train.evaluations=0",
                "train.gradient_spectra=true",
            )
            rows = trainer.progress.traces
            names[method] = {trace for _, _, trace, _ in rows}
            first[method, clip] = {
                (layer, trace): v
                for step, layer, trace, v in rows
                if step == 1 and trace.startswith(("grad", "mean_gradient"))
            }
    of_factors = {"grad_norm_A", "grad_norm_B", "balancedness", "tangent_capture"}
    assert names["full"] == names["lora"] - of_factors
    assert names["lora"] == set(PROBES) - {"live_r"}  # of methods that change their r
    for method in ("full", "lora"):
        assert first[method, "1e-6"] == first[method, "1e6"]
    # Both start at the base with the same head and batch: they have one implicit gradient.
    for key, value in first["full", "1e6"].items():
        if key[1] == "grad_norm" or key[1].endswith("_rank"):
            assert first["lora", "1e6"][key] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_peft_loads_a_low_rank_run_and_computes_the_same(
    ground: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    peft = pytest.importorskip("peft")
    setup, _ = trained(
        ground,
        tmp_path,
        "adapter.r=3",
        "adapter.scaling=rslora",
        "train.lr=0.02",
        "train.precision=float32",
        kind=kind,
    )
    run = finished(
        ground,
        tmp_path / "results",
        "adapter.r=3",
        "adapter.scaling=rslora",
        "train.lr=0.02",
        "train.precision=float32",
        kind=kind,
    )
    base = transformers.AutoModel.from_pretrained(ground[kind], attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, run.path).eval()
    batch = setup.splits["test"].collate(range(8))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    ours = setup.model.eval().base(**inputs).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).last_hidden_state, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keep", ["all", "top"])
def test_what_is_kept_of_a_full_update_gives_its_spectrum(
    ground: dict[str, Path], tmp_path: Path, keep: str
) -> None:
    run = finished(ground, tmp_path, "adapter=full", f"host.keep={keep}", "host.keep_k=5")
    sigma = load(tmp_path).spectra
    last = sigma[sigma["step"] == sigma["step"].max()]
    tensors = run.read_tensors("update")
    layer = "encoder.layer.1.output.dense"
    if keep == "all":
        dW = tensors[f"{layer}.dW"]
    else:
        dW = tensors[f"{layer}.B"] @ tensors[f"{layer}.A"]
        assert tensors[f"{layer}.A"].shape == (5, 64)
    found = np.linalg.svd(dW.astype(float), compute_uv=False)
    exact = last[last["layer"] == layer].sort_values("i")["sigma"].to_numpy()
    assert len(exact) == 32
    count = 32 if keep == "all" else 5
    np.testing.assert_allclose(found[:count], exact[:count], rtol=1e-5, atol=1e-7 * exact[0])


def test_a_run_can_start_from_another_and_that_one_runs_first(tmp_path: Path) -> None:
    start = "model=planted data=planted adapter.r=4"
    (one,), host = hydra_bridge.plan(
        [["model=planted", "data=planted", "adapter=full", "train.lr=1e-9"]],
        [f"model.start={start}", f"host.results={tmp_path}"],
    )
    (need,) = one.needs
    assert one.config.model.start == need.run_id
    assert run_here(one, host) == "done"
    store = Store(tmp_path)
    began = store.run(need.run_id).read_json("metrics")["score"]
    assert began > 0.95  # the base alone is at 0.8; only the bias starts anew
    assert store.run(one.run_id).read_json("metrics")["score"] == pytest.approx(began, abs=2e-3)


def test_the_stored_adapter_is_the_trained_update(ground: dict[str, Path], tmp_path: Path) -> None:
    run = finished(ground, tmp_path, "adapter.r=2", "adapter.alpha=3")
    values = {layer: decompose(u).values for layer, _, u in read_updates(adapter=run.path)}
    sigma = load(tmp_path).spectra
    last = sigma[sigma["step"] == sigma["step"].max()]
    for layer, group in last.groupby("layer"):
        expected = group.sort_values("i")["sigma"].to_numpy()
        np.testing.assert_allclose(values[str(layer)][:2], expected, rtol=1e-6)


def test_the_score_in_the_record_is_that_of_the_trained_model(
    ground: dict[str, Path], tmp_path: Path
) -> None:
    extra = ["adapter.r=2", "train.lr=0.01", "train.precision=float32"]
    setup, _ = trained(ground, tmp_path, *extra)
    run = finished(ground, tmp_path / "results", *extra)
    score = run.read_json("metrics")["score"]
    assert score == evaluate(setup.model, setup.splits["test"]).score
    examples = load(tmp_path / "results").examples
    assert len(examples) == len(setup.splits["test"])
    assert examples["value"].mean() == pytest.approx(score, rel=1e-12)


def test_a_rate_that_is_too_high_is_diverged_at_its_step_with_its_place(
    ground: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(Diverged, match=r"NaN or Inf in the (loss|gradient of .*) at step \d+"):
        trained(
            ground,
            tmp_path,
            "adapter=full",
            "train.lr=1e38",
            "train.warmup=0",
            "train.precision=float32",
            "train.clip=null",
        )


def test_spectra_are_taken_at_log_spaced_steps() -> None:
    assert sorted(spectrum_steps(1000, 6)) == [1, 3, 10, 32, 100, 316]
    assert spectrum_steps(1000, 0) == set()


def test_evaluation_and_tracing_do_not_change_training(
    ground: dict[str, Path], tmp_path: Path
) -> None:
    ends = []
    for extra in (
        ["train.evaluations=0", "train.spectra=0", "train.trace_every=1000"],
        [
            *("train.evaluations=5", "train.spectra=6", "train.trace_every=1"),
            "train.gradient_spectra=true",
        ],
    ):
        setup, _ = trained(ground, tmp_path, "train.dropout=0.1", *extra)
        ends.append({n: p.clone() for n, p in setup.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())


def test_two_launched_processes_train_one_run_without_code_changes(
    ground: dict[str, Path], tmp_path: Path
) -> None:
    common = ["adapter.r=2", "host.device=cpu", "train.accumulate=2", "train.precision=float64"]
    common += ["train.gradient_spectra=true"]
    words = [*line(ground), *common, f"host.results={tmp_path}"]
    # On a GPU machine `accelerate launch --multi_gpu` is this launcher; its --cpu wants MPI.
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lora_lab.cli"]
    done = subprocess.run(
        [sys.executable, *launch, "train", *words],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = load(tmp_path).runs
    assert runs["status"].tolist() == ["done"]
    provenance = json.loads((tmp_path / "runs" / runs["run_id"][0] / "provenance.json").read_text())
    assert provenance["processes"] == 2
    # The effective batch is that of one process, and so is the result.
    run = finished(ground, tmp_path / "alone", *common)
    assert run.run_id == runs["run_id"][0]
    alone = run.read_json("metrics")
    assert runs["loss"][0] == pytest.approx(alone["loss"], rel=1e-9)
    traces = [
        load(folder).traces.set_index(["step", "layer", "trace"])["value"]
        for folder in (tmp_path, tmp_path / "alone")
    ]
    same = [name for name in traces[0].index if name[2] not in ("samples_per_second",)]
    np.testing.assert_allclose(traces[0][same], traces[1][same], rtol=1e-6, atol=1e-12)


def test_the_host_default_keeps_everything() -> None:
    assert Host().keep.name == "all"
