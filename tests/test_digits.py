"""Digits and the small vision transformer that the lab pre-trains on half of them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_lab import hydra_bridge
from lora_lab.config import Host
from lora_lab.data import SPLITS, Problem, digits
from lora_lab.data.digits import DIGITS, PIXELS, DigitsData, Half, pixel_order
from lora_lab.engine import in_order, run_here
from lora_lab.evaluation import evaluate
from lora_lab.execution import linked
from lora_lab.hydra_bridge import Planned
from lora_lab.models.digits_vit import HEAD_WIDTH, PATCH, TOKENS, DigitsViT
from lora_lab.preparation import Setup, prepare
from lora_lab.registry import WrongInput
from lora_lab.store import Store
from lora_lab.targets import WORDS, select

GROUND = ["model=digits_vit", "data=digits"]
TINY = [*GROUND, "model.width=16", "model.depth=1"]


def images(problem: Problem, split: str) -> list[bytes]:
    return [row.tobytes() for row in problem.inputs[split]]


def same(a: Problem, b: Problem) -> bool:
    return all(
        np.array_equal(a.inputs[s], b.inputs[s]) and np.array_equal(a.targets[s], b.targets[s])
        for s in SPLITS
    )


# ---- data --------------------------------------------------------------------------------------


def test_the_digits_are_those_that_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits

    truth = load_digits()
    theirs = {
        (image / 16).astype(np.float32).tobytes(): str(digit)
        for image, digit in zip(truth.data, truth.target, strict=True)
    }
    ours: dict[bytes, str] = {}
    for half in (Half.lower, Half.upper):
        problem = DigitsData(classes=half).load()
        for split in SPLITS:
            names = [problem.classes[label] for label in problem.targets[split]]
            assert set(names) == set(map(str, DIGITS[half]))
            ours |= dict(zip(images(problem, split), names, strict=True))
    assert ours == theirs
    assert len(ours) == 1797


@pytest.mark.parametrize("half", Half)
def test_splits_share_no_image_and_hold_the_classes_equally(half: Half) -> None:
    problem = DigitsData(classes=half).load()
    seen = [image for split in SPLITS for image in images(problem, split)]
    assert len(seen) == len(set(seen))
    for split in SPLITS:
        assert problem.inputs[split].dtype == np.float32
        assert problem.targets[split].dtype == np.int64
        assert (problem.inputs[split].min(), problem.inputs[split].max()) == (0, 1)
        counts = np.bincount(problem.targets[split], minlength=problem.outputs)
        # The classes themselves differ by 9 of 180.
        assert counts.max() <= 1.08 * counts.min() + 1


def test_an_image_is_in_the_same_split_whichever_digits_are_chosen() -> None:
    every = DigitsData(classes=Half.all).load()
    for half in (Half.lower, Half.upper):
        part = DigitsData(classes=half).load()
        for split in SPLITS:
            wanted = set(images(part, split))
            assert [image for image in images(every, split) if image in wanted] == images(
                part, split
            )


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("n", [1, 50, 507])
def test_fewer_examples_are_a_prefix_with_the_classes_in_proportion(n: int, tasks: int) -> None:
    whole, few = (DigitsData(tasks=tasks, train_examples=m).load() for m in (None, n))
    assert np.array_equal(few.inputs["train"], whole.inputs["train"][:n])
    assert np.array_equal(few.targets["train"], whole.targets["train"][:n])
    counts = np.bincount(few.targets["train"], minlength=5)
    assert counts.max() - counts.min() <= 1 + tasks + n // 100


def test_more_examples_than_there_are_mean_all() -> None:
    assert same(DigitsData(train_examples=10**6).load(), DigitsData().load())


def test_the_order_of_the_file_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = DigitsData().load()
    pixels, labels = digits._read()
    monkeypatch.setattr(digits, "_read", lambda: (pixels[::-1], labels[::-1]))
    assert same(before, DigitsData().load())


def test_the_seed_of_the_data_changes_the_split_and_the_split_is_pinned() -> None:
    problems = [DigitsData(seed=seed).load() for seed in (0, 1)]
    shared = set(images(problems[0], "test")) & set(images(problems[1], "test"))
    assert abs(len(shared) - 100) < 30
    # Every stored score stands on this split: it may change only with new run ids.
    assert problems[0].fingerprint.startswith("d61aef3d7cc2fd0e")


@pytest.mark.parametrize("task", [0, 1, 7])
def test_a_task_is_the_plain_images_with_their_pixels_in_its_order(task: int) -> None:
    plain, other = DigitsData(seed=2).load(), DigitsData(seed=2, task=task).load()
    for split in SPLITS:
        assert np.array_equal(other.inputs[split], plain.inputs[split][:, pixel_order(task)])
        assert np.array_equal(other.targets[split], plain.targets[split])


def test_tasks_differ_in_the_order_of_their_pixels() -> None:
    orders = {tuple(pixel_order(task)) for task in range(digits.MOST_TASKS)}
    assert len(orders) == digits.MOST_TASKS
    assert all(sorted(order) == list(range(PIXELS)) for order in orders)


def test_tasks_learned_together_are_the_single_tasks_in_turn() -> None:
    together = DigitsData(task=2, tasks=3).load()
    for k in range(3):
        alone = DigitsData(task=2 + k).load()
        for split in SPLITS:
            assert np.array_equal(together.inputs[split][k::3], alone.inputs[split])
            assert np.array_equal(together.targets[split][k::3], alone.targets[split])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": -1}, r"data\.task must be in \[0, 100\)"),
        ({"task": 100}, r"data\.task must be in \[0, 100\)"),
        ({"tasks": 0}, r"data\.tasks must be in \[1, 100\]"),
        ({"task": 90, "tasks": 11}, r"data\.tasks must be in \[1, 10\]"),
        ({"train_examples": 0}, r"data\.train_examples must be at least 1"),
    ],
)
def test_what_no_digits_are_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongInput, match=message):
        DigitsData(**fields)


def test_another_file_of_digits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / digits.FILE).parent.mkdir(parents=True)
    (tmp_path / digits.FILE).write_bytes(gzip.compress(b"0,1\n"))
    monkeypatch.setattr(digits, "distribution", lambda _: Installed(tmp_path))
    digits._read.cache_clear()
    with pytest.raises(WrongInput, match="checksum differs"):
        DigitsData().check()
    (tmp_path / digits.FILE).unlink()
    with pytest.raises(WrongInput, match="cannot be read"):
        DigitsData().check()


class Installed:
    """A distribution somewhere else."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def locate_file(self, name: str) -> Path:
        return self.place / name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=digits"], "model=minilm solves text problems; the data holds image"),
        (["model=digits_vit"], "the data holds text. Add data=digits"),
        (["model=digits_vit", "data=planted"], "the data holds regression. Add data=digits"),
        (["model=planted", "data=digits"], "the data holds image. Add data=planted"),
        ([*GROUND, "model.width=40"], "model.width must be a multiple of 16"),
        ([*GROUND, "model.depth=0"], "model.depth must be in"),
        ([*GROUND, "model.start=trained"], "model.start must be the id of a finished run or"),
        ([*GROUND, "adapter.r=65"], "r must be in [1, 64]"),
    ],
)
def test_models_and_data_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(WrongInput) as caught:
        hydra_bridge.plan([words])
    assert message in str(caught.value)


# ---- model -------------------------------------------------------------------------------------


def built(**fields: Any) -> Any:
    model = DigitsViT(**fields)
    return model.build(DigitsData(), DigitsData(test_examples=1, train_examples=1).load(), 0.0)


@pytest.mark.parametrize(("width", "depth"), [(16, 1), (64, 4), (48, 3)])
def test_stated_shapes_are_those_of_the_network(width: int, depth: int) -> None:
    net = built(width=width, depth=depth).base
    found = {
        name: tuple(module.weight.shape)
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert DigitsViT(width=width, depth=depth).shapes(DigitsData()) == found
    assert len(found) == 1 + 6 * depth


def test_every_word_for_targets_means_the_layers_of_the_blocks_that_it_says() -> None:
    shapes = DigitsViT(depth=2).shapes(DigitsData())
    last = {
        "attention": ["query", "key", "value", "out_proj"],
        "qv": ["query", "value"],
        "qk": ["query", "key"],
        "qkvo": ["query", "key", "value", "out_proj"],
        "mlp": ["up_proj", "down_proj"],
        "all": ["query", "key", "value", "out_proj", "up_proj", "down_proj"],
    }
    assert set(last) == set(WORDS)
    for word, names in last.items():
        layers = select(word, shapes)
        assert [layer.rpartition(".")[2] for layer in layers] == 2 * names
        assert all(layer.startswith("blocks.") for layer in layers)


def test_patches_are_embedded_as_a_convolution_of_their_size_does() -> None:
    net = built(width=32).base
    pixels = torch.rand(5, PIXELS, generator=torch.Generator().manual_seed(0))
    patch = net.embeddings.patch
    kernel = patch.weight.view(32, 1, PATCH, PATCH)
    truth = nn.functional.conv2d(pixels.view(5, 1, 8, 8), kernel, patch.bias, stride=PATCH)
    found = net.embeddings(pixels) - net.embeddings.position.weight
    torch.testing.assert_close(found, truth.flatten(2).transpose(1, 2))


def test_attention_equals_that_of_torch() -> None:
    ours = built(width=48).base.blocks[0].attention
    theirs = nn.MultiheadAttention(48, 48 // HEAD_WIDTH, batch_first=True)
    with torch.no_grad():
        layers = (ours.query, ours.key, ours.value)
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
    x = torch.randn(3, TOKENS, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_only_positions_tell_the_order_of_the_patches() -> None:
    model = built(width=32, depth=2)
    pixels = torch.rand(4, PIXELS, generator=torch.Generator().manual_seed(0))
    patches = pixels.view(4, 4, PATCH, 4, PATCH).transpose(2, 3).reshape(4, TOKENS, -1)
    mixed = patches.flip(1).view(4, 4, 4, PATCH, PATCH).transpose(2, 3).reshape(4, PIXELS)
    seen = [model.features({"inputs": p}) for p in (pixels, mixed)]
    assert (seen[0] - seen[1]).abs().max() > 1e-4
    nn.init.zeros_(model.base.embeddings.position.weight)
    seen = [model.features({"inputs": p}) for p in (pixels, mixed)]
    torch.testing.assert_close(seen[0], seen[1])


def test_untrained_weights_depend_on_width_and_depth_alone() -> None:
    def drawn(seed: int, **fields: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(seed)
        model = built(**fields)
        return model.base.state_dict(), model.classifier.weight

    (first, head), (second, other) = drawn(0, width=32), drawn(1, width=32)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(head, other), "the head is the run's own"
    data = DigitsData()
    hashes = {DigitsViT(width=w, depth=d).fingerprint(data) for w in (16, 32) for d in (1, 2)}
    assert len(hashes) == 4
    assert DigitsViT(width=32).fingerprint(data) == DigitsViT(width=32).fingerprint(data)
    weight = first["blocks.0.down_proj.weight"]
    assert abs(float(weight.std()) * (4 * 32) ** 0.5 - 1) < 0.05


# ---- pre-training ------------------------------------------------------------------------------


def test_one_pre_training_serves_a_whole_sweep_and_runs_first() -> None:
    lines = [
        [*TINY, "adapter=lora", "adapter.r=1,2", "seed=0,1"],
        [*TINY, "adapter=full", "data.task=3", "size=smoke"],
    ]
    found, _ = hydra_bridge.plan(lines)
    waves = in_order(found)
    assert [len(wave) for wave in waves] == [1, 5]
    (first,) = waves[0]
    assert {run.config.model.start for run in found} == {first.run_id}
    assert (first.config.model.width, first.config.model.depth) == (16, 1)
    assert first.config.model.start == ""
    assert first.config.data == DigitsData(classes=Half.lower)


def test_every_width_and_depth_has_a_pre_training_of_its_own() -> None:
    words = [*GROUND, "model.width=16,32", "model.depth=1,2"]
    found, _ = hydra_bridge.plan([words])
    assert len({run.needs[0].run_id for run in found}) == 4
    assert all(run.needs[0].config.model.width == run.config.model.width for run in found)


def test_an_empty_start_means_random_weights() -> None:
    ((only,), _) = hydra_bridge.plan([[*TINY, "model.start="]])
    assert only.needs == ()
    assert only.config.model.start == ""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planned, Store, Host]:
    """A fine-tuning of two steps with what it starts from."""
    results = tmp_path_factory.mktemp("results")
    words = [*TINY, "size=smoke", "adapter.r=2", "host.tracker=disabled", "host.device=cpu"]
    ((one,), host) = hydra_bridge.plan([[*words, f"host.results={results}"]])
    assert run_here(one, host) == "done"
    return one, Store(results), host


def started(words: list[str], store: Store, host: Host) -> Setup:
    ((one,), _) = hydra_bridge.plan([words], [f"host.results={store.root}"])
    return prepare(one.config, host, store.cache, **linked(one.config, store))


def test_pre_training_learns_its_half(pretrained: tuple[Planned, Store, Host]) -> None:
    one, store, _ = pretrained
    # A sixteenth of the default's width and a quarter of its depth.
    assert store.run(one.config.model.start).read_json("metrics")["score"] > 0.8


def test_the_start_is_the_pre_trained_network_with_a_fresh_head(
    pretrained: tuple[Planned, Store, Host],
) -> None:
    """Everything is carried over: with the old head it scores as it did, to the last digit."""
    one, store, host = pretrained
    run = store.run(one.config.model.start)
    setup = started([*TINY, "data.classes=lower", "adapter=head"], store, host)
    assert evaluate(setup.model, setup.splits["test"]).score < 0.5
    head = run.read_tensors("head")
    for name, parameter in setup.model.classifier.named_parameters():
        parameter.data = torch.from_numpy(head[f"classifier.{name}"])
    metrics = run.read_json("metrics")
    found = evaluate(setup.model, setup.splits["test"])
    assert found.score == metrics["score"]
    assert abs(found.loss - metrics["loss"]) < 1e-5


def test_pre_training_changes_every_parameter_of_the_network(
    pretrained: tuple[Planned, Store, Host],
) -> None:
    _, store, host = pretrained
    before = built(width=16, depth=1).base.state_dict()
    after = started([*TINY, "adapter=head"], store, host).model.base.state_dict()
    assert before.keys() == after.keys()
    # A bias of the keys adds the same to all scores of a query: its gradient is 0.
    unmoved = {name for name in before if torch.allclose(before[name], after[name], atol=1e-3)}
    assert unmoved <= {"blocks.0.attention.key.bias"}


@pytest.mark.parametrize("method", ["adapter=lora", "adapter=full"])
def test_runs_of_all_seeds_start_at_the_same_weights(
    pretrained: tuple[Planned, Store, Host], method: str
) -> None:
    _, store, host = pretrained
    setups = [started([*TINY, method, f"seed={seed}"], store, host) for seed in (0, 1)]
    assert setups[0].base.keys() == setups[1].base.keys()
    assert all(
        np.array_equal(setups[0].base[name], setups[1].base[name]) for name in setups[0].base
    )


def test_a_run_of_a_run_starts_at_the_sum_of_both_updates(
    pretrained: tuple[Planned, Store, Host],
) -> None:
    one, store, host = pretrained
    setup = started([*TINY, f"model.start={one.run_id}", "adapter=full"], store, host)
    first = started([*TINY, "adapter=full"], store, host)
    update = linked(setup.config, store)["start"]
    layer = "blocks.0.up_proj"
    dW = setup.base[layer] - first.base[layer]
    assert np.abs(dW).max() > 0
    np.testing.assert_allclose(dW, update.updates[layer].dense(), atol=1e-6)
