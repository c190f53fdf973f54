"""SmolLM2: the causal networks on a tiny Llama, the dequantised files, and the real weights."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lab import causal, embedded
from lora_lab.adapters import snapshot
from lora_lab.adapters.full import Full
from lora_lab.adapters.head import Head
from lora_lab.adapters.lora import LoRA
from lora_lab.causal import CausalClassifier, CausalLanguage
from lora_lab.checkpoints import read_updates
from lora_lab.config import Host, Precision, RunConfig, TrainConfig
from lora_lab.data import Problem
from lora_lab.data.planted import PlantedData
from lora_lab.data.rotten_tomatoes import RottenTomatoes
from lora_lab.data.table import Table
from lora_lab.evaluation import evaluate, features, oracle_truncation
from lora_lab.execution import counts, final_updates, identity, record_update
from lora_lab.hydra_bridge import resolve
from lora_lab.linalg import decompose, updates_of
from lora_lab.models import smollm2
from lora_lab.models.hf import Tokens
from lora_lab.models.smollm2 import Objective, SmolLM2, blocks, label_tokens
from lora_lab.preparation import Setup, prepare
from lora_lab.registry import WrongInput
from lora_lab.store import Store, Work
from lora_lab.targets import select
from lora_lab.training import Trainer


@dataclass(frozen=True)
class Tiny(SmolLM2):
    """The same model on a tiny network."""

    folder: str = ""

    def source(self) -> str:
        return self.folder

    def shapes(self, data: Any) -> dict[str, tuple[int, int]]:
        return blocks(2, 32, 64, 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def net(llama: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    path = tiny.reviews(tmp_path_factory.mktemp("data") / "reviews.csv")
    return Table(path=str(path), text="review", label="stars")


def prepared(
    llama: Path, table: Table, folder: Path, adapter: Any, objective: str, **train: Any
) -> Setup:
    model = Tiny(folder=str(llama), objective=Objective[objective])
    config = RunConfig(model=model, data=table, adapter=adapter, train=TrainConfig(**train))
    return prepare(resolve(config, "cpu"), Host(device="cpu"), folder)


def run(setup: Setup, folder: Path) -> Setup:
    Trainer(setup, Work(folder), Host(), lambda *_: None).train()
    return setup


def tokens(rows: list[list[int]]) -> Tokens:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Tokens(np.concatenate(rows), offsets, np.zeros(len(rows)), 0, 64)


ROWS = [[12, 4, 8, 6], [12, 3, 2, 9, 10, 7, 5, 11, 8, 2], [12, 9]]


def wrapped(net: nn.Module, objective: str) -> CausalClassifier | CausalLanguage:
    model = CausalLanguage(net)
    if objective == "label_words":
        model = CausalClassifier(net, [16, 17])
    return model.double().eval()


# Networks


@pytest.mark.parametrize("objective", ["label_words", "language"])
def test_padding_on_the_right_changes_nothing(net: nn.Module, objective: str) -> None:
    model, rows = wrapped(net, objective), tokens(ROWS)
    together = model(rows.collate([0, 1, 2]))
    alone = [model({**rows.collate([i]), **unpadded(ROWS[i])}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def unpadded(row: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()}


def test_label_words_are_judged_by_the_networks_own_next_token_logits(net: nn.Module) -> None:
    found = wrapped(net, "label_words")(tokens(ROWS).collate([0, 1, 2]))
    for row, logits in zip(ROWS, found, strict=True):
        expected = net(torch.tensor([row])).logits[0, -1, [16, 17]]
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_the_bias_of_a_label_word_adds_to_its_logit_and_nothing_else_of_the_head_trains(
    net: nn.Module,
) -> None:
    model, batch = wrapped(net, "label_words"), tokens(ROWS).collate([0, 1, 2])
    before = model(batch)
    model.classifier.bias.data[1] = 2.0
    assert torch.allclose(model(batch) - before, torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert [name for name, _ in model.classifier.named_parameters()] == ["bias"]


def test_language_losses_are_those_of_transformers(net: nn.Module) -> None:
    model = wrapped(net, "language")
    found = model(tokens(ROWS).collate([0, 1, 2])).detach()
    for row, (summed, count) in zip(ROWS, found, strict=True):
        ids = torch.tensor([row])
        assert int(count) == len(row) - 1
        expected = net(ids, labels=ids).loss.double()  # they compute it in float32
        torch.testing.assert_close(summed / count, expected, rtol=1e-6, atol=0)
    assert float(model.loss(found, torch.zeros(3))) == pytest.approx(
        float(found[:, 0].sum()) / (3 + 9 + 1), rel=1e-12
    )


def test_losses_in_parts_have_the_same_values_and_gradients_as_at_once(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = wrapped(net, "language"), tokens(ROWS).collate([0, 1, 2])
    found = []
    for part in (1024, 3):
        monkeypatch.setattr(causal, "PART", part)
        net.zero_grad()
        out = model(batch)
        model.loss(out, batch["targets"]).backward()
        found.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
    net.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_score_of_language_is_the_geometric_mean_probability(net: nn.Module) -> None:
    model = wrapped(net, "language")
    p = np.array([0.5, 0.1, 0.2])
    output = np.array([[-np.log(p[:2]).sum(), 2], [-np.log(p[2]), 1]])
    assert model.score(output, np.zeros(2)) == pytest.approx(p.prod() ** (1 / 3))
    scored = evaluate(model, tokens(ROWS))
    assert scored.score == pytest.approx(np.exp(-scored.loss))
    assert 0 < scored.score < 1


# Tokens and words


def test_a_long_text_is_cut_and_the_prompt_stays_whole(
    llama: Path, table: Table, tmp_path: Path
) -> None:
    text = "good film " * 30
    labels = {"train": np.zeros(2, dtype=np.int64)}
    problem = Problem("text", {"train": [text, "good"]}, labels, ("praise", "blame"), "")
    rows = {}
    for objective in Objective:
        model = Tiny(folder=str(llama), objective=objective, max_tokens=16)
        encoded = model.encode(problem, "train", tmp_path)
        batch = encoded.collate([0, 1])
        assert encoded.lengths.tolist()[0] == 16
        ids = [row[:n].tolist() for row, n in zip(batch["input_ids"], encoded.lengths, strict=True)]
        rows[objective] = [[tiny.CAUSAL[i] for i in row] for row in ids]
    words = (["good", "film"] * 30)[:12]
    assert rows[Objective.label_words] == [
        ["Review", ":", *words, "Sentiment", ":"],
        ["Review", ":", "good", "Sentiment", ":"],
    ]
    assert rows[Objective.language][0] == ["<|endoftext|>", *(words * 2)[:15]]
    assert rows[Objective.language][1] == ["<|endoftext|>", "good"]


def test_words_name_the_classes_unless_others_are_given(llama: Path) -> None:
    tokenizer, classes = AutoTokenizer.from_pretrained(llama), ("praise", "blame")
    assert label_tokens(tokenizer, classes, "") == [16, 17]
    assert label_tokens(tokenizer, classes, "good+bad") == [2, 3]


@pytest.mark.parametrize(
    ("classes", "words", "said"),
    [
        (("praise", "blame"), "good", "2 words joined by '\\+', .*praise, blame.*got 'good'"),
        (("praise", "blame"), "good+", "2 words joined by"),
        (("x", "y"), "", "'x' and 'y' begin with the same. Give model.words=word\\+word"),
    ],
)
def test_words_that_do_not_tell_the_classes_apart_are_refused_in_one_line(
    llama: Path, classes: tuple[str, ...], words: str, said: str
) -> None:
    with pytest.raises(WrongInput, match=said) as caught:
        label_tokens(AutoTokenizer.from_pretrained(llama), classes, words)
    assert "\n" not in str(caught.value)


def test_targets_are_the_linear_layers_of_the_blocks_and_never_the_output(net: nn.Module) -> None:
    linear = {n: tuple(m.weight.shape) for n, m in net.named_modules() if type(m) is nn.Linear}
    assert linear.pop("lm_head") == (len(tiny.CAUSAL), 32)
    assert blocks(2, 32, 64, 16) == linear
    assert select("all", [*linear, "lm_head"]) == list(linear)
    assert select("qv", linear) == [
        f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"
    ]


def test_data_without_text_are_refused() -> None:
    with pytest.raises(WrongInput, match="model=smollm2 solves text problems"):
        SmolLM2().shapes(PlantedData())


# Training


@pytest.mark.parametrize("objective", ["label_words", "language"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_a_start_at_the_base_learns(
    llama: Path, table: Table, tmp_path: Path, objective: str, precision: str
) -> None:
    more = {"precision": Precision[precision], "lr": 1e-2, "epochs": 4.0}
    setup = prepared(llama, table, tmp_path, LoRA(r=2), objective, **more)
    before = evaluate(setup.model, setup.splits["test"])
    after = evaluate(run(setup, tmp_path).model, setup.splits["test"])
    assert after.loss < before.loss - 0.1
    assert after.score > before.score


def test_head_alone_trains_the_biases_of_label_words(
    llama: Path, table: Table, tmp_path: Path
) -> None:
    setup = prepared(llama, table, tmp_path, Head(), "label_words")
    assert counts(setup)["trainable"] == 2
    run(setup, tmp_path)
    assert bool((setup.model.classifier.bias != 0).all())


def test_head_alone_is_the_base_where_a_model_has_no_head(
    llama: Path, table: Table, tmp_path: Path
) -> None:
    setup = prepared(llama, table, tmp_path, Head(), "language")
    before = evaluate(setup.model, setup.splits["test"])
    assert counts(setup)["trainable"] == 0
    assert evaluate(run(setup, tmp_path).model, setup.splits["test"]) == before


@pytest.mark.parametrize(
    ("objective", "sides"),
    [("label_words", {"trained_head", "refitted_head", ""}), ("language", {"trained_head", ""})],
)
def test_the_oracle_refits_a_head_only_where_there_is_one(
    llama: Path, table: Table, tmp_path: Path, objective: str, sides: set[str]
) -> None:
    setup = run(prepared(llama, table, tmp_path, Full(), objective, lr=1e-3), tmp_path)
    spectra = {n: decompose(u, vectors=True) for n, u in final_updates(setup.adapted).items()}
    rows = oracle_truncation(setup.model, setup.adapted, spectra, setup.splits)
    assert {row["side"] for row in rows} == sides
    trained = [row["value"] for row in rows if row["side"] == "trained_head"]
    assert trained[-1] == evaluate(setup.model, setup.splits["test"]).score


def test_the_adapter_of_a_run_fits_peft_and_the_base_folder(
    llama: Path, table: Table, tmp_path: Path
) -> None:
    exact = {"precision": Precision.float32, "lr": 1e-2}
    setup = run(prepared(llama, table, tmp_path, LoRA(r=2), "label_words", **exact), tmp_path)
    folder = Store(tmp_path / "results", create=True).run(identity(setup.config)["run_id"])
    with folder.lock():
        folder.begin(identity(setup.config), {})
        record_update(setup, folder, {}, Host())
    found = {layer: update.dense() for layer, _, update in read_updates(llama, adapter=folder.path)}
    for layer, update in updates_of(snapshot(setup.adapted)).items():
        np.testing.assert_allclose(found.pop(layer), update.dense(), rtol=1e-5, atol=1e-8)
    assert not found
    base = AutoModelForCausalLM.from_pretrained(llama)
    theirs = peft.PeftModel.from_pretrained(base, folder.path)
    batch = setup.splits["test"].collate([0])
    n = int(batch["attention_mask"].sum())
    logits = theirs(input_ids=batch["input_ids"][:, :n]).logits[0, -1, [17, 16]]
    ours = setup.model.eval()(batch)[0] - setup.model.classifier.bias
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)


# The dequantised files


def converted(gguf: Path, folder: Path) -> None:
    with (gguf.parent / "made").open("a") as log:
        log.write("x")
    time.sleep(0.05)
    (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(smollm2, "_convert", converted)
    smollm2.dequantised.cache_clear()
    yield tmp_path / "cache" / "model"
    smollm2.dequantised.cache_clear()


def made(cache: Path) -> int:
    """How often the files have been made, after they were asked for in a new process."""
    smollm2.dequantised.cache_clear()
    gguf = cache.parents[1] / "weights.gguf"
    assert (smollm2.dequantised(gguf, cache) / "model.safetensors").read_bytes() == b"weights"
    return len((gguf.parent / "made").read_text())


def test_files_are_made_once_and_again_when_one_is_damaged_or_missing(cache: Path) -> None:
    assert made(cache) == made(cache) == 1
    (cache / "model.safetensors").write_bytes(b"weighty")
    assert made(cache) == 2
    (cache / "model.safetensors").unlink()
    assert made(cache) == 3
    (cache / smollm2.SUMS).write_text("")
    assert made(cache) == 4


def test_what_a_killed_conversion_left_is_removed(cache: Path) -> None:
    left = cache.with_suffix(".part")
    left.mkdir(parents=True)
    (left / "half").write_text("")
    assert made(cache) == 1
    assert sorted(p.name for p in cache.iterdir()) == [smollm2.SUMS, "model.safetensors"]
    assert not left.exists()


def test_two_that_want_the_files_at_once_make_them_once(cache: Path) -> None:
    gguf = cache.parents[1] / "weights.gguf"
    both = [
        threading.Thread(target=smollm2.dequantised.__wrapped__, args=(gguf, cache))
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert made(cache) == 1


def test_a_cache_that_cannot_be_written_is_said_in_one_line(cache: Path) -> None:
    cache.parent.write_text("a file in the way")
    with pytest.raises(WrongInput, match=r"cannot write .*XDG_CACHE_HOME") as caught:
        made(cache)
    assert "\n" not in str(caught.value)


def test_the_files_lie_in_the_users_cache_folder_under_the_checksum_of_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "dequantised", lambda gguf, folder: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "lora_lab" / "models" / f"smollm2-{smollm2.SHA256[:12]}"
    assert SmolLM2().source() == str(place)


# The real weights


def test_the_embedded_file_is_there_with_the_stated_layers() -> None:
    assert embedded.file(smollm2.PACKAGE, smollm2.GGUF, smollm2.SHA256).stat().st_size > 9e7
    shapes = SmolLM2().shapes(RottenTomatoes())
    assert len(select("all", shapes)) == 210
    assert sum(rows * columns for rows, columns in shapes.values()) == 106_168_320


@pytest.fixture(scope="module")
def real() -> Path:
    return Path(SmolLM2().source())


@pytest.mark.long
def test_dequantised_weights_are_the_files_blocks_times_their_scales(real: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(embedded.file(smollm2.PACKAGE, smollm2.GGUF, smollm2.SHA256))
    raw = {tensor.name: tensor.data for tensor in reader.tensors}
    with safe_open(real / "model.safetensors", "np") as ours:
        down = ours.get_tensor("model.layers.3.mlp.down_proj.weight")
        np.testing.assert_array_equal(down, q4_1(raw["blk.3.ffn_down.weight"]))
        # GGUF pairs the two halves of each head, which are rotated together, row by row.
        q = q4_1(raw["blk.3.attn_q.weight"]).reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
        np.testing.assert_array_equal(ours.get_tensor("model.layers.3.self_attn.q_proj.weight"), q)
        embedding = ours.get_tensor("model.embed_tokens.weight")
        sizes = {name: tuple(ours.get_slice(name).get_shape()) for name in ours.keys()}  # noqa: SIM118
    found = {name.removesuffix(".weight"): shape for name, shape in sizes.items()}
    np.testing.assert_array_equal(embedding[:64], q8_0(raw["token_embd.weight"][:64]))
    shapes = SmolLM2().shapes(RottenTomatoes())
    assert {n: s for n, s in found.items() if n in shapes} == shapes
    assert "lm_head" not in found
    assert len(found) == len(shapes) + 62
    assert "quantization_config" not in json.loads((real / "config.json").read_text())


def q4_1(rows: np.ndarray) -> np.ndarray:
    """Blocks of 32: scale d and minimum m (float16), 16 bytes of q: d q + m, low halves first."""
    parts = rows.reshape(-1, 20)
    d, m = (parts[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    q = np.concatenate([parts[:, 4:] & 15, parts[:, 4:] >> 4], axis=1)
    return (d * q + m).reshape(len(rows), -1)


def q8_0(rows: np.ndarray) -> np.ndarray:
    """Blocks of 32: a scale d (float16) and 32 signed bytes q: d q."""
    parts = rows.reshape(-1, 34)
    d = parts[:, :2].copy().view("<f2").astype(np.float32)
    return (d * parts[:, 2:].copy().view(np.int8)).reshape(len(rows), -1)


@pytest.mark.long
def test_a_prompt_in_pieces_has_the_tokens_of_the_whole(real: Path) -> None:
    problem = RottenTomatoes(train_examples=1000).load()
    tokenizer, texts = AutoTokenizer.from_pretrained(real), problem.inputs["train"]
    rows = SmolLM2(max_tokens=512)._rows(tokenizer, texts)
    whole = [f"{smollm2.BEFORE} {text}{smollm2.AFTER}" for text in texts]
    assert rows == tokenizer(whole)["input_ids"]
    words = tokenizer(" negative positive")["input_ids"]
    assert label_tokens(tokenizer, problem.classes, "") == words


@pytest.mark.long
def test_the_untrained_model_is_a_zero_shot_classifier(real: Path, tmp_path: Path) -> None:
    data = RottenTomatoes(train_examples=4, validation_examples=4, test_examples=64)
    config = RunConfig(model=SmolLM2(), data=data, adapter=Head())
    setup = prepare(resolve(config, "cpu"), Host(device="cpu"), tmp_path)
    assert features(setup.model, setup.splits["test"]).shape == (64, 576)
    assert evaluate(setup.model, setup.splits["test"]).score > 0.65
