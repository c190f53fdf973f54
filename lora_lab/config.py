"""What a run is: frozen dataclasses, and the content hash that is the run's name.

What changes numbers is a field of `RunConfig`; what does not (folders, workers, devices' names in
a cluster, trackers) is a field of `Host`. The type says which.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from lora_lab.registry import WrongInput

ID_LENGTH = 12


class Precision(Enum):
    """Compute dtype of a run. `auto` is replaced by the model's measured default before hashing."""

    auto = "auto"
    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Schedule(Enum):
    """Learning rate after the warm-up."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class Optimizer(Enum):
    """What takes the steps."""

    adamw = "adamw"
    sgd = "sgd"


class Quantization(Enum):
    """Storage of the frozen base, see `linalg.quantize`; `none`: as the model comes."""

    none = "none"
    int8 = "int8"
    int4 = "int4"
    nf4 = "nf4"


class Tracker(Enum):
    """W&B modes. `auto` is online with an API key and disabled without one."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Keep(Enum):
    """How much of a full update stays on disk."""

    all = "all"
    top = "top"


def need(ok: bool, name: str, allowed: str, given: object, hint: str = "") -> None:
    """Raise `WrongInput` unless `ok`: ``name must be <allowed>; got <given>.``"""
    if not ok:
        raise WrongInput(f"{name} must be {allowed}; got {given}." + (f" {hint}" if hint else ""))


def need_positive(name: str, value: float) -> None:
    """A finite number above zero."""
    need(math.isfinite(value) and value > 0, name, "a finite number above 0", value)


@dataclass(frozen=True)
class ModelConfig:
    """Base of every `models/NAME.py` config.

    Attributes
    ----------
    start : str
        run_id (or an override line, which becomes one) of a finished run whose trained weights
        this run starts from; empty: the pretrained weights.
    quantize : Quantization
        Weights of the linear layers in the blocks (target word `all`) are replaced by what this
        storage gives back, before any of them is adapted: W0 is the dequantised weight, and dW is
        against it. Full fine-tuning trains all of it from there, in full precision.
    """

    start: str = ""
    quantize: Quantization = Quantization.none

    full_rate: ClassVar[float] = 1e-4
    """Learning rate at which full fine-tuning of this model works well (measured)."""

    def begin(self) -> str:
        """What `start` stands for: an id, an override line, or nothing; a model may add words."""
        return self.start


@dataclass(frozen=True)
class DataConfig:
    """Base of every `data/NAME.py` config.

    Attributes
    ----------
    train_examples, validation_examples, test_examples : int or None
        How many of each split to use; None: all. Subsets are nested and do not depend on the
        run's seed, so that seeds differ in training only.
    seed : int
        Seed of the split into train, validation and test.
    """

    kind: ClassVar[str] = "text"
    """What the examples are: ``"text"`` or ``"image"`` with classes, or a ``"regression"``."""
    sizes_are_limits: ClassVar[bool] = False
    """Whether a split with fewer examples than asked for is taken whole (data of a user or of few
    examples, so that `size=` fits any of it) or refused."""

    train_examples: int | None = None
    validation_examples: int | None = None
    test_examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_examples", "validation_examples", "test_examples"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"data.{name}", "at least 1 (or null: all)", value)
        need(0 <= self.seed < 2**31, "data.seed", "in [0, 2^31)", self.seed)


@dataclass(frozen=True)
class AdapterConfig:
    """Base of every `adapters/NAME.py` config.

    Attributes
    ----------
    targets : str
        Of methods that change layers: which ones. A word (`attention`, `qv`, `qk`, `qkvo`, `mlp`,
        `all`), words or names of layers joined by `+` (a name is its last dotted parts, such as
        `output.dense`), or a regular expression for whole names.
    """

    rate: ClassVar[float] = 1.0
    """Default learning rate as a multiple of the model's full fine-tuning rate."""


ALSO = ("classifier", "norms", "biases", "target_biases", "embeddings")
"""Words of `train.also`."""


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains; the same for every method.

    Attributes
    ----------
    lr : float or None
        Peak learning rate; None: the model's full fine-tuning rate times the method's factor.
    epochs : float
        Passes over the training examples; a fraction is allowed.
    batch_size, accumulate : int
        Examples per micro-batch, and micro-batches per optimizer step.
    warmup : float
        Share of the steps with a linearly rising rate, in [0, 1).
    clip : float or None
        Largest global gradient norm; None: no clipping. Traces are taken before clipping.
    weight_decay : float
        0 by default, because decay of factors and of a full weight differ.
    optimizer : Optimizer
        AdamW, or plain gradient descent (`sgd`), whose rates are other ones: give `train.lr`.
    momentum : float
        Of sgd, in [0, 1).
    dropout : float
        Dropout of the model itself, for all methods; 0 by default for a fair comparison.
    also : str
        Parameters outside the targets that train, the same for every method: words among
        `classifier`, `norms`, `biases` (all of them), `target_biases` (those of the changed
        layers), `embeddings` joined by `+`, or `none`.
    trace_every : int
        Steps between two trace rows.
    spectra : int
        Number of log-spaced steps at which the spectrum of dW_t is taken; 0: only the last.
    gradient_spectra : bool
        At these steps and the last also take the traces that decompose gradient, mean gradient
        and step of every layer. Each such step costs as much as ten others (MiniLM).
    evaluations : int
        Number of evenly spaced evaluations on the validation split; the last is at the end.
    """

    lr: float | None = None
    epochs: float = 1.0
    batch_size: int = 32
    accumulate: int = 1
    schedule: Schedule = Schedule.linear
    warmup: float = 0.1
    clip: float | None = 1.0
    weight_decay: float = 0.0
    optimizer: Optimizer = Optimizer.adamw
    momentum: float = 0.0
    precision: Precision = Precision.auto
    dropout: float = 0.0
    also: str = "classifier"
    trace_every: int = 10
    spectra: int = 6
    gradient_spectra: bool = False
    evaluations: int = 4

    def __post_init__(self) -> None:
        if self.lr is not None:
            need_positive("train.lr", self.lr)
        need_positive("train.epochs", self.epochs)
        for name in ("batch_size", "accumulate", "trace_every"):
            need(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        for name in ("spectra", "evaluations"):
            need(getattr(self, name) >= 0, f"train.{name}", "at least 0", getattr(self, name))
        need(0 <= self.warmup < 1, "train.warmup", "in [0, 1)", self.warmup)
        need(0 <= self.dropout < 1, "train.dropout", "in [0, 1)", self.dropout)
        need(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "train.weight_decay",
            "at least 0",
            self.weight_decay,
        )
        sgd = self.optimizer is Optimizer.sgd
        need(0 <= self.momentum < 1, "train.momentum", "in [0, 1)", self.momentum)
        need(
            sgd or not self.momentum,
            "train.momentum",
            "0 without train.optimizer=sgd",
            self.momentum,
        )
        if self.clip is not None:
            need_positive("train.clip", self.clip)
        words = set(self.also.split("+"))
        need(
            words <= set(ALSO) or words == {"none"},
            "train.also",
            f"'none' or words among {', '.join(ALSO)} joined by '+'",
            repr(self.also),
        )


@dataclass(frozen=True)
class Host:
    """Where and how runs are executed; nothing here changes a number (at equal `threads`).

    Attributes
    ----------
    results : str
        Results folder.
    workers, threads : int or None
        Processes at once and torch threads of each; None: one worker per core, and the cores shared
        out among the workers (so `workers=1` alone computes with all of them). Sums differ in the
        last bits between thread counts, so `threads` is recorded per run.
    device : str
        `auto`, `cpu`, `cuda`, `mps` …, as accelerate names them.
    tracker : Tracker
        W&B mode, see `trackers.resolved`.
    keep : Keep
        What is kept of a full update: `all`, or the leading `keep_k` directions with the exact
        spectrum. Low-rank updates are always kept whole.
    keep_k : int
        Directions per layer under `keep=top`.
    timeout : float
        Hours after which a run is ended as failed.
    checkpoint_minutes : float
        Time between two checkpoints of a run in work.
    yes : bool
        Start a sweep of more than 200 runs without being refused.
    """

    results: str = "results"
    workers: int | None = None
    threads: int | None = None
    device: str = "auto"
    tracker: Tracker = Tracker.auto
    keep: Keep = Keep.all
    keep_k: int = 64
    timeout: float = 24.0
    checkpoint_minutes: float = 5.0
    yes: bool = False

    def __post_init__(self) -> None:
        need(bool(self.results.strip()), "host.results", "a folder", "nothing")
        for name in ("workers", "threads"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"host.{name}", "at least 1 (or null)", value)
        need(self.keep_k >= 1, "host.keep_k", "at least 1", self.keep_k)
        need_positive("host.timeout", self.timeout)
        need(
            self.checkpoint_minutes >= 0,
            "host.checkpoint_minutes",
            "at least 0",
            self.checkpoint_minutes,
        )


@dataclass(frozen=True)
class RunConfig:
    """One training, completely: everything that changes its numbers.

    Attributes
    ----------
    model : models.Buildable
    data : data.DataSet
    adapter : adapters.Method
        Their classes are chosen by name and live on higher floors, hence `Any`.
    seed : int
        Of all that is random in training: first factors, order of the examples, dropout.
    """

    model: Any = field(default_factory=ModelConfig)
    data: Any = field(default_factory=DataConfig)
    adapter: Any = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        need(0 <= self.seed < 2**31, "seed", "in [0, 2^31)", self.seed)


GROUPS = ("model", "data", "adapter")
"""The groups of a RunConfig whose class is chosen by name."""


def choice(config: object) -> str:
    """Name of the file, and so of the choice, that defines a group's config."""
    return type(config).__module__.rpartition(".")[2]


def plain(value: Any) -> Any:
    """A config value as JSON types (enums by name, dataclasses by field)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The whole config as nested JSON types; each group carries its `choice`.

    This is what `config.json` holds: also fields at their default, so that a default that changes
    in code is noticed (`changed_default`).
    """
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        out[f.name] = plain(value)
        if f.name in GROUPS:
            out[f.name] = {"choice": choice(value), **out[f.name]}
    return out


def _hashed(config: Any) -> dict[str, Any]:
    """Only the fields that differ from their default: a new field leaves old ids alone."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default is not dataclasses.MISSING else None
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        if dataclasses.is_dataclass(value):
            out[f.name] = _hashed(value)
            if f.name in GROUPS:
                out[f.name]["choice"] = choice(value)
        elif value != default:
            # 1 and 1.0 are the same number and must be the same run.
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            out[f.name] = float(value) if number else plain(value)
            if isinstance(value, dict):
                # The first pattern that matches wins: other orders are other runs.
                out[f.name] = [[str(k), plain(v)] for k, v in value.items()]
    return out


def run_id(config: RunConfig) -> str:
    """The run's name: a hash of every field that differs from its default.

    Returns
    -------
    str
        12 hexadecimal digits of a SHA-256. Equal for equal numbers-changing content on every
        machine and Python, unchanged when a field with a no-op default is added.
    """
    text = json.dumps(_hashed(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


def changed_default(config: RunConfig, stored: dict[str, Any]) -> str | None:
    """Dotted name of a field whose value differs from a stored config of the same run_id.

    Same id and another value can only mean that the field's default changed in the code. Fields
    that the stored config does not know yet are new and at their no-op default.
    """
    if run_id(config) == stored.get("run_id"):
        ours = as_dict(config)
        for group, values in ours.items():
            old = stored["config"].get(group, values)
            if not isinstance(values, dict):
                if values != old:
                    return group
                continue
            for name, value in values.items():
                if name in old and old[name] != value:
                    return f"{group}.{name}"
    return None


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Nested config to the plain and dotted columns of the runs table.

    >>> flat({"model": {"choice": "minilm", "start": ""}, "seed": 3})
    {'model': 'minilm', 'model.start': '', 'seed': 3}
    """
    out: dict[str, Any] = {}
    for group, values in config.items():
        if not isinstance(values, dict):
            out[group] = values
            continue
        for name, value in values.items():
            key = group if name == "choice" else f"{group}.{name}"
            out[key] = json.dumps(value) if isinstance(value, (dict, list)) else value
    return out


def literal_path(text: str) -> Path:
    """A user's path with `~` expanded; nothing else in it has a meaning."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~name` of nobody on this machine is a name like any other
        return Path(text)
