"""What single methods promise beyond the laws of tests/test_adapters.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from lora_lab.adapters import ADAPTERS, Adapted, Place, layer_seed, parts_dense, snapshot
from lora_lab.adapters.adaptive import Adaptive, AdaptiveLayer, allocate
from lora_lab.adapters.dynamic import Dynamic, DynamicLayer
from lora_lab.adapters.intrinsic import Intrinsic, Projection, walsh_hadamard
from lora_lab.adapters.lora import LoRA
from lora_lab.adapters.projected import Projected, truncated
from lora_lab.adapters.sparse import Sparse
from lora_lab.adapters.stacked import Order, Stacked
from lora_lab.linalg import decompose, updates_of
from lora_lab.measures import measure
from lora_lab.probes.live_r import live_r
from lora_lab.registry import WrongInput

OUT, IN, STEPS = 12, 10, 12
LAYER = "block.0.query"
Layers = dict[str, Adapted]


def place(layer: str = LAYER, weight: torch.Tensor | None = None) -> Place:
    linear = nn.Linear(IN, OUT, bias=False).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(layer_seed(0, "W0" + layer))
    drawn = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    linear.weight.data = drawn if weight is None else weight
    return Place(layer, linear, torch.Generator().manual_seed(layer_seed(0, layer)))


class Regression:
    """Layers side by side, each with a target of its own, trained with a method's hooks."""

    def __init__(
        self, method: Any, layers: int = 1, target_r: int = OUT, weight: torch.Tensor | None = None
    ) -> None:
        self.method = method
        names = [f"block.{i}.query" for i in range(layers)]
        self.adapted: Layers = method.adapt_all([place(name, weight) for name in names])
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(64, IN, generator=generator, dtype=torch.float64)
        self.targets = {}
        for i, name in enumerate(names):
            B = torch.randn(OUT, target_r, generator=generator, dtype=torch.float64)
            A = torch.randn(target_r, IN, generator=generator, dtype=torch.float64)
            # The first layer has most to learn.
            self.targets[name] = self.x @ (place(name).W0 + B @ A / (1 + 3 * i)).T
        found = {id(p): p for layer in self.adapted.values() for p in layer.parameters()}
        self.parameters = [p for p in found.values() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters, 0.02, weight_decay=0.1
        )

    def backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for name, layer in self.adapted.items():
            loss = loss + (layer(self.x) - self.targets[name]).square().mean()
        loss.backward()
        return loss.detach()

    def step(self, step: int, steps: int = STEPS) -> None:
        self.backward()
        self.method.before_step(self.adapted, step, steps)
        self.optimizer.step()
        self.method.after_step(self.adapted, step, steps, self.optimizer)

    def train(self, steps: int = STEPS) -> Regression:
        for step in range(1, steps + 1):
            self.step(step, steps)
        return self

    @property
    def layer(self) -> Any:
        return self.adapted[LAYER]

    def dW(self, layer: str = LAYER) -> np.ndarray:
        return updates_of(snapshot(self.adapted))[layer].dense()


# ---- stacked -----------------------------------------------------------------------------------


def test_blocks_together_are_one_lora_of_their_summed_rank_step_by_step() -> None:
    stacked = Regression(Stacked(r=2, blocks=3, alpha=4)).train()
    lora = Regression(LoRA(r=6, alpha=12)).train()
    assert stacked.layer.scaled()[2] == lora.layer.scaled()[2] == 2.0
    np.testing.assert_array_equal(stacked.dW(), lora.dW())
    assert np.abs(lora.dW()).max() > 0.01


def test_of_blocks_in_turn_only_the_active_one_moves_even_under_weight_decay() -> None:
    run = Regression(Stacked(r=2, blocks=3, order=Order.one_after_another, scaling="learned"))
    for step in range(1, STEPS + 1):
        before = [p.detach().clone() for p in run.parameters]
        run.step(step)
        active = (step - 1) // 4
        for old, parameter in zip(before, run.parameters, strict=True):
            along = parameter.dim() - 1 if parameter is run.layer.B else 0
            pairs = zip(old.chunk(3, along), parameter.detach().chunk(3, along), strict=True)
            assert [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)] == [active]


def test_a_later_block_trains_as_a_fresh_lora_on_what_the_earlier_ones_left() -> None:
    stacked = Regression(Stacked(r=2, blocks=2, order=Order.one_after_another)).train()
    A, B, s = stacked.layer.scaled()
    first = s * B.detach()[:, :2] @ A.detach()[:2]
    # The second block's start, drawn after the first one's.
    again = place()
    method = LoRA(r=2)
    method.start_of(again)
    fresh = Regression(method, weight=again.W0 + first)
    A, B = method.start_of(again)
    fresh.layer.A.data, fresh.layer.B.data = A.double(), B.double()
    fresh.train(6)
    np.testing.assert_allclose(stacked.dW(), first.numpy() + fresh.dW(), atol=1e-12)


# ---- sparse ------------------------------------------------------------------------------------


def test_at_sparsity_zero_it_is_lora_bit_for_bit() -> None:
    sparse, lora = Regression(Sparse(r=3, sparsity=0.0)).train(), Regression(LoRA(r=3)).train()
    assert torch.equal(sparse.layer.A, lora.layer.A)
    assert torch.equal(sparse.layer.B, lora.layer.B)
    assert sparse.layer.tensors().keys() == lora.layer.tensors().keys()


def test_the_share_of_zeros_follows_the_cubic_schedule() -> None:
    run = Regression(Sparse(r=3, sparsity=0.8, begin=0.25, end=0.75, every=2))
    shares = []
    for step in range(1, STEPS + 1):
        run.step(step)
        shares.append(float((run.dW() == 0).mean()))
    expected = {1: 0.0, 3: 0.0, 5: 0.8 * (1 - (2 / 3) ** 3), 7: 0.8 * (1 - (1 / 3) ** 3)}
    expected |= {6: expected[5], 9: 0.8, 12: 0.8}
    assert {step: shares[step - 1] for step in expected} == pytest.approx(expected, abs=0.5 / 120)


def test_the_smallest_entries_go_and_the_rank_exceeds_r() -> None:
    run = Regression(Sparse(r=2, sparsity=0.6, begin=1.0, end=1.0)).train()
    A, B, s = run.layer.scaled()
    whole, dW = (s * B @ A).detach().numpy(), run.dW()
    gone = dW == 0
    assert gone.sum() == round(0.6 * dW.size)
    assert np.abs(whole[gone]).max() <= np.abs(whole[~gone]).min()
    np.testing.assert_array_equal(dW[~gone], whole[~gone])
    assert np.linalg.matrix_rank(whole) == 2 < np.linalg.matrix_rank(dW)


def test_pruning_once_at_the_end_leaves_the_training_to_lora() -> None:
    once = Regression(Sparse(r=2, begin=1.0, end=1.0))
    lora = Regression(LoRA(r=2))
    for step in range(1, STEPS + 1):
        once.step(step)
        lora.step(step)
    assert torch.equal(once.layer.B, lora.layer.B)
    assert (once.dW() == 0).mean() == pytest.approx(0.5)


def test_the_factors_of_a_masked_product_get_the_masked_gradient() -> None:
    run = Regression(Sparse(r=2, begin=0.0, end=0.0)).train()
    layer = run.layer
    layer.watched = True
    layer.forget()
    run.backward()
    G = layer.mask * layer.implicit_gradient()
    A, B, s = layer.scaled()
    torch.testing.assert_close(layer.B.grad, s * G @ A.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.A.grad, s * B.T @ G, rtol=1e-10, atol=1e-12)


# ---- dynamic -----------------------------------------------------------------------------------


def test_a_cut_leaves_the_best_update_of_its_rank_in_balanced_factors() -> None:
    run = Regression(Dynamic(r=6, start_r=6, begin=1.0, end=1.0, threshold=0.4))
    for step in range(1, STEPS):
        run.step(step)
    layer, before = run.layer, run.dW()
    s = layer.scaled()[2]
    layer.resize(0.4, 0, STEPS, run.optimizer)
    U, S, Vh = np.linalg.svd(before)
    kept = int(np.count_nonzero(S / S[0] >= 0.4))
    assert 0 < kept < 6
    assert layer.live_r == kept
    assert len(layer.tensors()["A"]) == kept
    np.testing.assert_allclose(run.dW(), U[:, :kept] * S[:kept] @ Vh[:kept], atol=1e-12)
    A, B, _ = layer.scaled()
    balanced = torch.from_numpy(np.diag(S[:kept] / s))
    torch.testing.assert_close(A @ A.T, balanced, rtol=0, atol=1e-12)
    torch.testing.assert_close(B.T @ B, balanced, rtol=0, atol=1e-12)
    assert layer.A[kept:].abs().max() == layer.B[:, kept:].abs().max() == 0


def test_first_moments_turn_as_gradients_do_and_second_ones_as_of_uncorrelated_entries() -> None:
    run = Regression(Dynamic(r=4, start_r=4, begin=1.0, end=1.0)).train(4)
    layer = run.layer
    # One direction that adds nothing: the update, and so its gradient, stay as they are.
    layer.B.data[:, 3] = 0
    run.backward()
    for p in run.parameters:
        run.optimizer.state[p]["exp_avg"].copy_(p.grad)
        run.optimizer.state[p]["exp_avg_sq"].fill_(2.0)
    old_A, old_B = layer.A.detach().clone(), layer.B.detach().clone()
    layer.resize(1e-6, 0, STEPS, run.optimizer)
    assert layer.live_r == 3
    run.backward()
    for p in run.parameters:
        moment = run.optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(moment, p.grad, rtol=1e-9, atol=1e-12)
        assert moment.abs().max() > 1e-4
    # B = old_B T and A = S old_A: the gradient of B turns by Sᵀ, and so its variance by S∘S.
    S = layer.A.detach()[:3] @ torch.linalg.pinv(old_A)
    expected = 2.0 * S.square().sum(1)
    found = run.optimizer.state[layer.B]["exp_avg_sq"]
    torch.testing.assert_close(found[:, :3], expected.expand(OUT, 3), rtol=1e-8, atol=1e-10)
    assert found[:, 3].abs().max() == 0
    T = old_A @ torch.linalg.pinv(layer.A.detach()[:3])
    torch.testing.assert_close(old_B @ T, layer.B.detach()[:, :3], rtol=1e-9, atol=1e-12)
    found = run.optimizer.state[layer.A]["exp_avg_sq"][:3]
    expected = 2.0 * T.square().sum(0)[:, None].expand(3, IN)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_layer_grows_only_where_all_it_has_is_strong_and_starts_there_from_zero() -> None:
    run = Regression(Dynamic(r=5, start_r=2, begin=1.0, end=1.0))
    for step in range(1, 7):
        run.step(step, 99)
    layer, before = run.layer, run.dW()
    layer.resize(1e-9, 2, 6, run.optimizer)
    assert layer.live_r == 4
    np.testing.assert_array_equal(run.dW(), before)
    assert layer.A[2:4].abs().min() > 0
    v = run.optimizer.state[layer.B]["exp_avg_sq"]
    torch.testing.assert_close(v[:, 2], v[:, :2].mean(1))
    layer.resize(1e-9, 2, 7, run.optimizer)  # the fresh ones are still weak
    assert layer.live_r == 2
    np.testing.assert_allclose(run.dW(), before, atol=1e-13)
    for step in (8, 9, 10):
        layer.resize(1e-9, 2, step, run.optimizer)
        run.step(step, 99)
    assert layer.live_r == 5  # no more than r


def test_at_a_zero_update_nothing_is_said_and_nothing_changes() -> None:
    run = Regression(Dynamic(r=5, start_r=2))
    run.layer.resize(0.1, 1, 1, run.optimizer)
    assert run.layer.live_r == 2


def test_the_true_rank_is_found_from_below_and_from_above() -> None:
    found = []
    for start in (1, 8):
        method = Dynamic(r=8, start_r=start, every=30, end=1.0, threshold=0.05)
        run = Regression(method, target_r=3)
        run.optimizer = torch.optim.AdamW(run.parameters, 0.02)
        run.train(600)
        found.append(run.layer.live_r)
    assert set(found) <= {3, 4}  # one more may be on trial


# ---- adaptive ----------------------------------------------------------------------------------


def adaptive(layers: int = 3, **fields: Any) -> Regression:
    return Regression(Adaptive(**{"r": 2, "init_r": 4, "every": 2, **fields}), layers)


def test_the_whole_budget_falls_to_r_a_layer_and_goes_where_most_is_to_learn() -> None:
    run = adaptive(begin=0.25, end=0.75)
    budgets = []
    for step in range(1, STEPS + 1):
        run.step(step)
        budgets.append(sum(layer.live_r for layer in run.adapted.values()))
    # 12 directions in all, 6 in the end; (12 - 6)(1 - progress)³ above it.
    assert budgets == [12, 12, 12, 12, 8, 8, 6, 6, 6, 6, 6, 6]
    live = [layer.live_r for layer in run.adapted.values()]
    assert live[0] == max(live) > min(live)
    for name, update in updates_of(snapshot(run.adapted)).items():
        rank = measure("numerical_rank", decompose(update))
        assert rank == run.adapted[name].live_r
        assert update.r == max(rank, 1)


def test_a_layer_without_a_budget_has_a_zero_update() -> None:
    run = adaptive(layers=2, r=1, begin=0.0, end=0.0).train(1)
    one, other = run.adapted.values()
    assert isinstance(one, AdaptiveLayer)
    assert isinstance(other, AdaptiveLayer)
    other.live.fill_(False)
    other.cut()
    assert parts_dense(other.tensors()).abs().max() == 0
    assert other.live_r == 0


def test_importance_and_cut_are_those_of_peft() -> None:
    run, theirs = adaptive(gamma=0.0, begin=1.0, end=1.0), nn.Module()
    for i, layer in enumerate(run.adapted.values()):
        assert isinstance(layer, AdaptiveLayer)
        pair = nn.Module()
        own = {"lora_A": layer.Q, "lora_E": layer.lamda[:, None], "lora_B": layer.P}
        for name, tensor in own.items():
            pair.add_module(name, nn.ParameterDict({"default": nn.Parameter(tensor.detach())}))
        theirs.add_module(f"layer{i}", pair)
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.adapter_name, allocator.beta1, allocator.beta2 = "default", 0.85, 0.85
    allocator.init_bgt = 12
    allocator.reset_ipt()
    for step in range(1, 7):
        run.backward()
        run.method.before_step(run.adapted, step, STEPS)
        for i, layer in enumerate(run.adapted.values()):
            pair = getattr(theirs, f"layer{i}")
            for name, own in (("lora_A", layer.Q), ("lora_B", layer.P)):
                pair.get_submodule(name)["default"].data = own.detach().clone()
                pair.get_submodule(name)["default"].grad = own.grad
            pair.lora_E["default"].data = layer.lamda.detach()[:, None].clone()
            pair.lora_E["default"].grad = layer.lamda.grad[:, None]
        allocator.update_ipt(theirs)
        run.optimizer.step()
    kept = allocator.mask_to_budget(theirs, 7)
    allocate({n: m for n, m in run.adapted.items() if isinstance(m, AdaptiveLayer)}, 7)
    assert [layer.live.tolist() for layer in run.adapted.values()] == list(kept.values())


def test_the_penalty_adds_its_gradient() -> None:
    run = adaptive(layers=1, gamma=0.3)
    run.backward()
    P, Q = run.layer.P, run.layer.Q
    before = {p: p.grad.clone() for p in (P, Q)}
    run.layer.regularise(0.3)
    one = torch.eye(4, dtype=torch.float64)
    penalty = (P.T @ P - one).square().sum() + (Q @ Q.T - one).square().sum()
    for p, grad in zip((P, Q), torch.autograd.grad(0.3 * penalty, (P, Q)), strict=True):
        torch.testing.assert_close(p.grad, before[p] + grad, rtol=1e-12, atol=1e-12)


# ---- intrinsic ---------------------------------------------------------------------------------


def projection(run: Regression) -> np.ndarray:
    """P of all layers, (entries, d), column by column."""
    columns = []
    for i in range(run.method.d):
        layers = run.adapted.values()
        next(iter(layers)).z.data = torch.eye(run.method.d, dtype=torch.float64)[i]
        parts = [parts_dense(layer.tensors()).flatten() for layer in layers]
        columns.append(torch.cat(parts).numpy())
    return np.stack(columns, 1)


WAYS = [Projection.dense, Projection.fastfood]


@pytest.mark.parametrize("way", WAYS)
def test_all_layers_share_one_z_of_which_the_update_is_a_linear_map(way: Projection) -> None:
    run = Regression(Intrinsic(d=7, projection=way), layers=3)
    assert len({id(layer.z) for layer in run.adapted.values()}) == 1
    assert sum(p.numel() for p in run.parameters) == 7
    P = projection(run)
    run.layer.z.data = torch.randn(7, dtype=torch.float64)
    dW = np.concatenate([run.dW(name).ravel() for name in run.adapted])
    np.testing.assert_allclose(dW, P @ run.layer.z.detach().numpy(), atol=1e-14)
    # The gradient of z is Pᵀ vec(G).
    for layer in run.adapted.values():
        layer.watched = True
    run.backward()
    G = torch.cat([layer.implicit_gradient().flatten() for layer in run.adapted.values()])
    np.testing.assert_allclose(run.layer.z.grad.numpy(), P.T @ G.numpy(), atol=1e-12)


def test_columns_of_a_dense_projection_have_length_one() -> None:
    P = projection(Regression(Intrinsic(d=7, projection=Projection.dense), layers=3))
    np.testing.assert_allclose(np.linalg.norm(P, axis=0), 1, atol=1e-7)


def test_fastfood_is_its_formula() -> None:
    run = Regression(Intrinsic(d=13, projection=Projection.fastfood), layers=2)
    P, H, start = projection(run), scipy.linalg.hadamard(16), 0
    for layer in run.adapted.values():
        permutation = np.eye(16)[layer.order]
        blocks = [
            H @ np.diag(gains) @ permutation @ H[:, :13] @ np.diag(signs[:13])
            for signs, gains in zip(layer.signs.numpy(), layer.gains.numpy(), strict=True)
        ]
        expected = np.concatenate(blocks)[: OUT * IN]
        np.testing.assert_allclose(P[start : start + OUT * IN], expected, atol=1e-14)
        start += OUT * IN


def test_fastfood_spreads_evenly_and_hardly_correlates() -> None:
    run = Regression(Intrinsic(d=16, projection=Projection.fastfood), layers=40)
    P = projection(run)
    gram = P.T @ P
    # 120 of 128 rows are left of each layer's blocks; the rest is chance.
    np.testing.assert_allclose(np.diag(gram), 1, atol=0.05)
    chance = 1 / np.sqrt(len(P))
    assert np.sqrt(((gram - np.diag(np.diag(gram))) ** 2).sum() / (16 * 15)) < 2 * chance


@pytest.mark.parametrize("n", [1, 2, 64, 128, 8192])
def test_the_fast_transform_is_the_hadamard_matrix(n: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, n))
    expected, half = x, 1
    while half < n:  # the butterflies of the textbook
        a, b = np.moveaxis(expected.reshape(2, -1, 2, half), 2, 0)
        expected, half = np.stack([a + b, a - b], 2).reshape(2, n), 2 * half
    if n <= 128:
        np.testing.assert_allclose(expected, x @ scipy.linalg.hadamard(n), atol=1e-12)
    found = walsh_hadamard(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_a_dense_projection_of_all_dimensions_reaches_every_update() -> None:
    layer = Regression(Intrinsic(d=OUT * IN, projection=Projection.dense)).layer
    assert np.linalg.matrix_rank(layer.P.numpy()) == OUT * IN


# ---- projected ---------------------------------------------------------------------------------


def test_truncation_is_that_of_the_svd() -> None:
    for shape in ((7, 5), (5, 7)):
        matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(truncated(matrix, 3), U[:, :3] * S[:3] @ Vh[:3])


def test_the_update_has_rank_r_after_each_projection_and_at_the_end() -> None:
    run, ranks = Regression(Projected(r=2, every=5)), []
    for step in range(1, STEPS + 1):
        run.step(step)
        ranks.append(int(np.linalg.matrix_rank(run.dW(), tol=1e-10)))
    assert [ranks[i - 1] for i in (5, 10, 12)] == [2, 2, 2]
    assert min(ranks[i - 1] for i in (4, 6, 11)) > 2


def test_projected_descent_solves_a_problem_of_its_rank() -> None:
    run = Regression(Projected(r=3), target_r=3)
    run.optimizer = torch.optim.SGD(run.parameters, 3.0)
    start = float(run.backward())
    for step in range(1, 301):
        run.step(step, 300)
    assert float(run.backward()) < 1e-12 * start


# ---- all ---------------------------------------------------------------------------------------


def test_the_live_rank_is_traced_where_it_can_change() -> None:
    class Seen:
        adapted = Regression(Dynamic(r=5, start_r=2), layers=2).adapted | {
            "other": LoRA(r=3).adapt(place("other"))
        }

    assert live_r(Seen()) == {"block.0.query": 2, "block.1.query": 2}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("stacked", {"blocks": 0}, "adapter.blocks must be at least 1; got 0"),
        ("stacked", {"init": "symmetric"}, "adapter.init must be one of .*kaiming.*stacked"),
        ("sparse", {"sparsity": 1.0}, r"adapter.sparsity must be in \[0, 1\); got 1.0"),
        ("sparse", {"begin": 0.5, "end": 0.4}, r"adapter.end must be in \[adapter.begin = 0.5, 1"),
        ("sparse", {"init": "pissa"}, "adapter.init must be one that is not subtracted"),
        ("dynamic", {"start_r": 9}, r"adapter.start_r must be in \[1, adapter.r = 8\]; got 9"),
        ("dynamic", {"threshold": 0.0}, r"adapter.threshold must be in \(0, 1\)"),
        ("dynamic", {"freeze_a": True}, "adapter.freeze_a must be false"),
        ("adaptive", {"init_r": 4}, "adapter.init_r must be at least adapter.r = 8; got 4"),
        ("adaptive", {"scaling": "learned"}, "adapter.scaling must be one of .*rslora"),
        ("adaptive", {"beta1": 1.0}, r"adapter.beta1 must be in \[0, 1\)"),
        ("intrinsic", {"d": 0}, "adapter.d must be at least 1"),
        ("projected", {"every": 0}, "adapter.every must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(WrongInput, match=message) as caught:
        ADAPTERS[name](**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Adaptive(init_r=9), r"init_r must be in \[1, 8\] for layer 'a.query' \(8×9\); got 9"),
        (Adaptive(r=9), r"r must be in \[1, 8\] for layer 'a.query' \(8×9\); got 9"),
        (Projected(r=9), r"r must be in \[1, 8\] for layer 'a.query' \(8×9\); got 9"),
        (Intrinsic(d=73), "at most the 72 entries of the targets; got 73"),
    ],
)
def test_what_does_not_fit_the_layers_is_refused_in_one_line(method: Any, message: str) -> None:
    with pytest.raises(WrongInput, match=message):
        method.layers({"a.query": (8, 9)})


def test_a_dense_projection_too_large_for_memory_is_refused() -> None:
    with pytest.raises(WrongInput, match=r"at most d = 8; got 9\. Lower adapter\.d or use"):
        Intrinsic(d=9, projection=Projection.dense).layers({"a.query": (4096, 4096)})
    assert Intrinsic(d=9).layers({"a.query": (4096, 4096)})


def test_dynamic_starts_at_half_of_r_and_that_is_the_same_config() -> None:
    assert Dynamic(r=6).resolved() == Dynamic(r=6, start_r=3, alpha=12.0)
    layer = Dynamic(r=6).adapt(place())
    assert isinstance(layer, DynamicLayer)
    assert layer.live_r == 3
