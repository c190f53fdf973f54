"""Updates of models on disk that were made elsewhere; the one home of PEFT's file format.

Only safetensors and JSON are read, one layer at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from lora_lab.checkpoints.job import Job, Layer
from lora_lab.checkpoints.peft import adapter_jobs
from lora_lab.checkpoints.tuned import tuned_jobs
from lora_lab.layers import natural
from lora_lab.registry import WrongInput
from lora_lab.tensorfile import local_folder, model_matrices

__all__ = ["Job", "read_updates", "updates"]


def updates(
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    adapter: str | Path | None = None,
) -> list[Job]:
    """What fine-tuning did to every weight matrix of a model on disk, checked but not loaded.

    Parameters
    ----------
    base : path
        Local Hugging Face folder of the base model, with safetensors (single or sharded). An
        adapter needs it only if its update depends on the base weight: DoRA, and the starts
        `pissa` and `olora`, which take a part out of the base weight before training.
    tuned : path
        Local Hugging Face folder of the tuned model, for example of a merged adapter.
    adapter : path
        Folder of a PEFT adapter, LoRA or AdaLoRA; exactly one of `tuned` and `adapter` is given.

    Returns
    -------
    list of Job
        Layers in the model's order, named as in the base's state dict without `.weight`, updates
        in the orientation of the state dict's weight. Kernels of convolutions are flattened to
        (out, in * kernel); vectors, also (1, 1, n), are no layers. A weight that several names
        share is given once. All that headers and configs tell is checked here; a job can be sent
        to another process and loaded there.

    Raises
    ------
    WrongInput
        A folder or file that is missing, damaged, quantised or pickled, shapes that differ, no
        layer in common, an adapter that needs a base and has none, or one whose update cannot be
        told from its files (random starts that change the base weight, and others; the message
        says what to do).

    Warns
    -----
    UserWarning
        Once, with all names: weights that only one side has, or that have no W0; keys of
        adapter_config.json that are missing or unknown.
    """
    return _checked(base, tuned, adapter)


def read_updates(
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    adapter: str | Path | None = None,
) -> Iterator[Layer]:
    """What fine-tuning did to every weight matrix of a model on disk, one layer at a time.

    Parameters
    ----------
    base, tuned, adapter : path
        As in `updates`, which also says what is checked before the first layer is read.

    Returns
    -------
    iterator of (layer, W0, update)
        W0 (m, n) in float64, None without base. The update is `Dense` for a tuned model, for a
        module that an adapter saved whole and for DoRA (all cast to float64 before subtracting),
        else `Factored`. A loop that keeps no layer holds two at most, see `Job.load`.

    Raises
    ------
    WrongInput
        As `updates`, at once; and where a file changes while it is read.

    Warns
    -----
    UserWarning
        As `updates`.
    """
    return (job.load() for job in _checked(base, tuned, adapter))


def _checked(
    base: str | Path | None, tuned: str | Path | None, adapter: str | Path | None
) -> list[Job]:
    if (tuned is None) == (adapter is None):
        raise WrongInput("give exactly one of tuned (a model folder) and adapter (a PEFT folder).")
    if tuned is not None and base is None:
        raise WrongInput("a tuned model needs its base: give the base model's folder as base.")
    weights = None if base is None else model_matrices(base, "base")
    if adapter is not None:
        jobs, notes = adapter_jobs(weights, local_folder(adapter, "adapter"))
    else:
        assert weights is not None
        assert tuned is not None
        jobs, notes = tuned_jobs(weights, model_matrices(tuned, "tuned"))
    if notes:
        warnings.warn("; ".join(notes) + ".", stacklevel=3)
    return sorted(jobs, key=lambda job: natural(job.layer))
