"""Models: what the lab computes in place of a library's own code equals it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bert import modeling_bert

from lora_lab.models.hf import WIDTHS, Tokens
from lora_lab.models.minilm import ATTENTION


def bert(attention: str) -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    return transformers.BertModel(config).double()


@pytest.mark.parametrize("padded", [False, True])
def test_attention_equals_the_networks_own_forward_and_backward(padded: bool) -> None:
    ids = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 3:] = mask[2, 6:] = 0
    found = []
    for attention in ("eager", ATTENTION):
        net = bert(attention)
        states = net(input_ids=ids, attention_mask=mask).last_hidden_state
        (states * mask.unsqueeze(-1)).square().sum().backward()
        grad = net.encoder.layer[0].attention.self.key.weight.grad
        assert grad is not None
        found.append((states.detach(), grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_attention_drops_weights_as_the_networks_own_does() -> None:
    net = bert("eager").encoder.layer[0].attention.self.train()
    q, k, v = torch.randn(3, 2, 3, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()
    out = []
    for attention in (modeling_bert.eager_attention_forward, _ours()):
        torch.manual_seed(5)
        out.append(attention(net, q, k, v, None, scaling=0.3, dropout=0.5)[0])
    torch.testing.assert_close(out[1], out[0])
    torch.manual_seed(6)
    assert not torch.equal(_ours()(net, q, k, v, None, scaling=0.3, dropout=0.5)[0], out[1])


def _ours():  # type: ignore[no-untyped-def]
    return transformers.AttentionInterface()[ATTENTION]


def test_batches_have_few_widths_and_padding_is_masked() -> None:
    lengths = np.array([3, 9, 17])
    tokens = Tokens(np.arange(1, 30), np.concatenate([[0], lengths.cumsum()]), np.zeros(3), 0, 20)
    for i, n in enumerate(lengths):
        batch = tokens.collate([i])
        assert batch["input_ids"].shape[1] == min(-(-n // WIDTHS) * WIDTHS, 20)
        assert int(batch["attention_mask"].sum()) == n
        assert bool((batch["input_ids"][0, n:] == 0).all())
