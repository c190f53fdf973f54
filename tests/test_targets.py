"""What a target string matches, on real layer names, and that nothing matches by accident."""

from __future__ import annotations

import re

import pytest
from peft.utils.other import get_pattern_key

from lora_lab.data.planted import LAYERS
from lora_lab.data.rotten_tomatoes import RottenTomatoes
from lora_lab.models.minilm import MiniLM
from lora_lab.registry import WrongInput
from lora_lab.targets import ROLES, WORDS, by_pattern, role, select

BLOCKS = range(6)
ATTENTION = "encoder.layer.{}.attention.self.{}"
MINILM = list(MiniLM().shapes(RottenTomatoes()))
PLANTED = list(LAYERS)


def blocks(*endings: str) -> set[str]:
    return {f"encoder.layer.{i}.{ending}" for i in BLOCKS for ending in endings}


Q, K, V = (f"attention.self.{name}" for name in ("query", "key", "value"))
OUT, UP, DOWN = "attention.output.dense", "intermediate.dense", "output.dense"


def test_minilm_has_the_layers_that_these_tests_are_about() -> None:
    assert set(MINILM) == blocks(Q, K, V, OUT, UP, DOWN) | {"pooler.dense"}


@pytest.mark.parametrize(
    ("word", "minilm", "planted"),
    [
        ("attention", (Q, K, V, OUT), "q k v o"),
        ("qv", (Q, V), "q v"),
        ("qk", (Q, K), "q k"),
        ("qkvo", (Q, K, V, OUT), "q k v o"),
        ("mlp", (UP, DOWN), "up down"),
        ("all", (Q, K, V, OUT, UP, DOWN), "q k v o up down"),
    ],
)
def test_words_name_the_same_roles_in_every_model(
    word: str, minilm: tuple[str, ...], planted: str
) -> None:
    assert set(select(word, MINILM)) == blocks(*minilm)
    assert select(word, PLANTED) == planted.split()


def test_every_word_is_tested_above() -> None:
    assert set(WORDS) == {"attention", "qv", "qk", "qkvo", "mlp", "all"}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("encoder.layer.0.attention.self.query", "q"),  # BERT
        ("encoder.layer.0.attention.output.dense", "o"),
        ("encoder.layer.0.intermediate.dense", "mlp"),
        ("encoder.layer.0.output.dense", "mlp"),
        ("pooler.dense", "outside"),
        ("encoder.layer.0.attention.self.query_proj", "q"),  # DeBERTa
        ("encoder.layer.0.attention.self.value_proj", "v"),
        ("transformer.layer.0.attention.k_lin", "k"),  # DistilBERT
        ("transformer.layer.0.attention.out_lin", "o"),
        ("transformer.layer.0.ffn.lin1", "mlp"),
        ("layers.0.attn.Wqkv", "qkv"),  # ModernBERT
        ("layers.0.attn.Wo", "o"),
        ("layers.0.mlp.Wo", "mlp"),
        ("model.layers.0.self_attn.v_proj", "v"),  # Llama
        ("model.layers.0.self_attn.o_proj", "o"),
        ("model.layers.0.mlp.gate_proj", "mlp"),
        ("h.0.attn.c_attn", "qkv"),  # GPT-2
        ("h.0.attn.c_proj", "o"),
        ("h.0.mlp.c_proj", "mlp"),
        ("h.0.mlp.c_fc", "mlp"),
        ("layers.0.attention.query_key_value", "qkv"),  # GPT-NeoX
        ("layers.0.attention.dense", "o"),
        ("layers.0.mlp.dense_4h_to_h", "mlp"),
        ("h.0.self_attention.dense", "o"),  # Falcon, BLOOM
        ("encoder.block.0.layer.0.SelfAttention.q", "q"),  # T5
        ("encoder.block.0.layer.1.DenseReluDense.wo", "mlp"),
        ("lm_head", "outside"),
        ("classifier.dense", "outside"),
        ("embeddings.projection", "outside"),
        ("blocks.0.adapter_in", "other"),
        ("blocks.0.mlp.router", "other"),
    ],
)
def test_roles_of_layers_of_known_architectures(layer: str, expected: str) -> None:
    assert role(layer) == expected


def test_no_ending_stands_for_two_roles() -> None:
    endings = [ending for names in ROLES.values() for ending in names]
    assert len(endings) == len(set(endings))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("query", blocks(Q)),
        ("self.query", blocks(Q)),
        ("encoder.layer.3.attention.self.query", {ATTENTION.format(3, "query")}),
        ("layer.3.attention.self.query", {ATTENTION.format(3, "query")}),
        ("intermediate.dense", blocks(UP)),
        ("output.dense", blocks(OUT, DOWN)),
        ("pooler.dense", {"pooler.dense"}),
        ("query+key", blocks(Q, K)),
        ("qv+intermediate.dense", blocks(Q, V, UP)),
        ("mlp+pooler.dense", blocks(UP, DOWN) | {"pooler.dense"}),
        ("query+query", blocks(Q)),
        (r".*\.(query|value)", blocks(Q, V)),
        (r"encoder\.layer\.[01]\..*\.key", {ATTENTION.format(i, "key") for i in (0, 1)}),
        (r".*layer\.\d+.*query", blocks(Q)),  # a plus that joins no names is the regex's
    ],
)
def test_names_joined_names_and_regular_expressions(targets: str, expected: set[str]) -> None:
    found = select(targets, MINILM)
    assert set(found) == expected
    assert found == [layer for layer in MINILM if layer in expected], "the model's order"


@pytest.mark.parametrize(
    "targets",
    [
        *("quer", "uery", "Query", "QV", "self", "encoder", "encoder.layer.0", "layer.0", "0"),
        *("", "+", "query+", "+query", "query++key", "query+nope", "nope", "attention.self"),
        *("query|key", "[", "(", "*", "layer.*query.", r"\.query", "attention mlp", " qv"),
    ],
)
def test_what_names_no_whole_layer_is_refused(targets: str) -> None:
    with pytest.raises(WrongInput, match="matches no layer; allowed: attention, qv") as error:
        select(targets, MINILM)
    assert "\n" not in str(error.value)


def test_a_refusal_names_the_wrong_part_and_the_nearest_word() -> None:
    with pytest.raises(WrongInput, match=r"'quary' matches no layer.*Did you mean 'query'\?"):
        select("key+quary", MINILM)


def test_a_word_that_a_model_has_no_layers_for_is_refused() -> None:
    with pytest.raises(WrongInput, match="'mlp' matches no layer"):
        select("mlp", ["q", "k"])


# ---- r and alpha by pattern --------------------------------------------------------------------

PATTERNS = [
    "query",
    "self.query",
    "attention.self.query",
    "encoder.layer.0.attention.self.query",
    "layer.0.attention.self.query",
    r"layer\.[0-2]\..*query",
    "query|key",
    "(query|key)",
    "uery",
    "dense",
    "output.dense",
    "attention.output.dense",
    ".*",
    "",
    "encoder",
    "q",
    "^query",
    "query$",
    r"encoder\.layer\.1\..*",
    "Query",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_exactly_what_peft_lets_it_match(pattern: str) -> None:
    layers = [*MINILM, *PLANTED]
    ours = [layer for layer in layers if by_pattern(layer, {pattern: 1.0}, 0.0)]
    assert ours == [layer for layer in layers if get_pattern_key([pattern], layer) == pattern]


def test_the_first_matching_pattern_wins_as_in_peft() -> None:
    patterns = {"key": 1.0, "self.query": 2.0, "query": 3.0, ".*": 4.0}
    for layer in MINILM:
        assert by_pattern(layer, patterns, 0.0) == patterns[get_pattern_key(patterns, layer)]
    backwards = dict(reversed(patterns.items()))
    assert {by_pattern(layer, backwards, 0.0) for layer in MINILM} == {4.0}


def test_a_name_is_no_part_of_another_name() -> None:
    assert by_pattern("a.subquery", {"query": 1.0}, 0.0) == 0.0
    assert by_pattern("a.query.b", {"query": 1.0}, 0.0) == 0.0
    assert re.match("query", "queryx"), "which a bare match would not notice"
    assert by_pattern("queryx", {"query": 1.0}, 0.0) == 0.0


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(WrongInput, match=r"pattern '\*q' is no regular expression"):
        by_pattern("q", {"*q": 1.0}, 0.0)
