"""The tables: their columns, what each holds, and its pandas dtype.

One row of `measures` per (run_id or source, step, layer, measure, k, side); missing is NaN or no
row, never 0, -1 or 999. Layer names are those of the base model's state dict without `.weight`;
an empty layer means the whole model.
"""

from __future__ import annotations

RUNS = {
    "run_id": ("string", "hash of the config, see config.run_id"),
    "status": ("string", "done, running, failed, interrupted or diverged"),
    "sweep": ("string", "names of the sweeps that hold this run, joined by ','"),
    "score": (
        "float64",
        "test accuracy (classification), R2 (planted) or exp(-loss) (language); higher is better",
    ),
    "validation_score": ("float64", "the same on the validation split after the last step"),
    "loss": ("float64", "mean training loss on the test split"),
    "trainable": ("int64", "parameters that train, everything included"),
    "adapter_parameters": ("int64", "of these, parameters of the update of the target layers"),
    "frozen": ("int64", "parameters that do not train"),
    "total": ("int64", "trainable + frozen"),
    "trainable_percent": ("float64", "100 trainable / total"),
    "steps": ("int64", "optimizer steps"),
    "seconds": ("float64", "wall time of the run, everything included"),
    "train_seconds": ("float64", "wall time from the first batch to the last step"),
    "samples_per_second": ("float64", "training examples / train_seconds, without evaluation"),
    "peak_memory": ("float64", "largest resident memory of the run's process, MB"),
    "error": ("string", "last line of the error of a failed or diverged run"),
}
"""Columns of `runs`; beside them `model`, `data`, `adapter` (the choices), every dotted config
field, and provenance columns (`git_commit`, `git_dirty`, `started`, `threads`, `device`, `cpu`,
`torch`, `lora_lab`, `model_hash`, `data_hash`)."""

MEASURES = {
    "run_id": ("string", "the run"),
    "step": ("int64", "optimizer step; the last step for the final update"),
    "layer": ("string", "layer, '' for the whole model"),
    "module": ("string", "last part of the layer's name, e.g. 'query'; see layers.module_of"),
    "depth": ("float64", "index of the block that holds the layer; NaN outside blocks"),
    "measure": ("string", "name of the measure: a file of lora_lab/measures"),
    "k": ("float64", "parameter of the measure (kept directions, threshold); NaN if it has none"),
    "side": ("string", "left or right, variant, or ''"),
    "value": ("float64", "the value; NaN where undefined"),
    "null": ("float64", "mean of the measure where there is nothing to find; NaN without a null"),
    "null_low": ("float64", "lower end of the null's central 95 %"),
    "null_high": ("float64", "upper end of the null's central 95 %"),
}

ADDED = ("null", "null_low", "null_high")
"""Columns that older tables lack: read as NaN."""

TRACES = {
    "run_id": ("string", "the run"),
    "step": ("int64", "optimizer step, 1 = first"),
    "layer": ("string", "layer, '' for the whole model"),
    "trace": ("string", "name of the trace"),
    "value": ("float64", "the value"),
}

SPECTRA = {
    "run_id": ("string", "the run"),
    "step": ("int64", "optimizer step"),
    "layer": ("string", "layer"),
    "i": ("int64", "1 = largest"),
    "sigma": ("float64", "i-th singular value of dW_t"),
}

EXAMPLES = {
    "run_id": ("string", "the run"),
    "i": ("int64", "place of the test example in the split, 0 = first; the same for all seeds"),
    "value": (
        "float64",
        "1 if it was classified right, else 0; its share of R2 (planted); its mean "
        "log probability per token (language models)",
    ),
}
"""What each test example contributes to the score: what paired comparisons of two runs read."""
