"""Conditions on runs: what they choose, and what is refused in one line."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lora_lab.registry import WrongInput
from lora_lab.where import where

RUNS = pd.DataFrame(
    {
        "adapter": ["lora", "lora", "full", "dora"],
        "adapter.r": [4.0, 8.0, math.nan, 8.0],
        "score": [0.7, 0.9, 0.8, math.nan],
        "adapter.freeze_a": [True, False, False, True],
        "error": [None, None, None, "NaN loss, at (step 3)"],
    }
)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("adapter = lora", [0, 1]),
        ("adapter != lora", [2, 3]),
        ("score > 0.75", [1, 2]),
        ("score>.75 and adapter.r>=8", [1]),
        ("adapter = full or adapter.r = 8 and score > 0", [1, 2]),
        ("(adapter = full or adapter.r = 8) and score > 0.85", [1]),
        ("adapter in (full, dora)", [2, 3]),
        ("not adapter in (full, 'dora')", [0, 1]),
        ("score = none", [3]),
        ("score != NONE", [0, 1, 2]),
        ("adapter.freeze_a = true", [0, 3]),
        ('error = "NaN loss, at (step 3)"', [3]),
        ("adapter.r in (4, 8e0) AND NOT (score = none)", [0, 1]),
        ('adapter = "or"', []),
    ],
)
def test_a_condition_chooses_rows(condition: str, rows: list[int]) -> None:
    assert where(RUNS, condition).index.tolist() == rows


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("", "ends where a field should stand"),
        ("adapter.rr >= 8", "Did you mean 'adapter.r'"),
        ("adapter.r >= many", "'adapter.r' is a number and 'many' is none"),
        ("adapter > lora", "is text, which only = and != compare"),
        ("score", "after 'score' one of"),
        ("score >", "ends where a value should stand"),
        ("(score > 1", r"'\)' is missing"),
        ("score > 1 score", "one word too many"),
        ("score in 1", r"'\(' is missing"),
        ("score ! 1", "not understood"),
        ("(" * 3000 + "score > 1", "too many brackets"),
        ("not " * 3000 + "score > 1", "too many brackets"),
        ("__import__('os').system('true')", "unknown field"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(condition: str, message: str) -> None:
    with pytest.raises(WrongInput, match=message) as caught:
        where(RUNS, condition)
    assert "\n" not in str(caught.value)
