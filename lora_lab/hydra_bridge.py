"""From override strings to typed configs. The only module, beside Hydra's own entries, that knows
hydra and omegaconf; below it there is no `cfg`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.adapters import ADAPTERS
from lora_lab.config import (
    GROUPS,
    ID_LENGTH,
    Host,
    Optimizer,
    Precision,
    RunConfig,
    TrainConfig,
    choice,
    literal_path,
    need,
    run_id,
)
from lora_lab.data import DATA
from lora_lab.models import MODELS, device_type
from lora_lab.registry import Registry, WrongInput, conf_folder, did_you_mean, unknown
from lora_lab.store import Store

REGISTRIES: dict[str, Registry[Any]] = {"model": MODELS, "data": DATA, "adapter": ADAPTERS}

LITERAL = (
    *("data.path", "data.name", "data.text", "data.label", "data.config", "data.revision"),
    *("model.name", "model.revision", "model.start", "adapter.reference", "host.results"),
)
"""Fields whose value is taken as it is typed: paths, names that others chose, and override lines
of other runs."""

MOST = 5000
"""Combinations that one command plans; each takes milliseconds."""


@dataclass
class Schema:
    """Root of the composed config; the groups are filled by their choices."""

    model: Any = MISSING
    data: Any = MISSING
    adapter: Any = MISSING
    train: Any = MISSING
    host: Any = MISSING
    seed: int = 0


@dataclass(frozen=True)
class Planned:
    """A run to do.

    Attributes
    ----------
    config : RunConfig
        Resolved: every default that depends on other fields is filled in.
    run_id : str
    needs : tuple of Planned
        Runs whose weights it starts from; they run first.
    """

    config: RunConfig
    run_id: str
    needs: tuple[Planned, ...] = ()


@dataclass(frozen=True)
class Axis:
    """One override: a key and the values that it takes in turn."""

    key: str
    values: tuple[Any, ...]


def choices(group: str) -> list[str]:
    """Names that may stand after `group=`; of `sweep`, the presets."""
    if group in REGISTRIES:
        return list(REGISTRIES[group])
    return sorted(p.stem for p in (conf_folder() / group).glob("*.yaml"))


def register(group: str, name: str, config: type) -> None:
    """Enter one choice of a group into Hydra's store."""
    # A frozen dataclass would be read-only to overrides; `to_object` still returns it frozen.
    node = OmegaConf.structured(config)
    OmegaConf.set_readonly(node, False)
    ConfigStore.instance().store(group=group, name=name, node=node)


@lru_cache(maxsize=1)
def register_fixed() -> None:
    """Enter what does not depend on a choice."""
    ConfigStore.instance().store(name="schema", node=Schema)
    register("train", "default", TrainConfig)
    register("host", "default", Host)


def register_all() -> None:
    """Enter every choice, for plain Hydra, which looks them up by itself."""
    register_fixed()
    for group, registry in REGISTRIES.items():
        for name, config in registry.items():
            register(group, name, config)


# ---- override strings -> axes ---------------------------------------------------------------


def parse(overrides: Sequence[str]) -> list[Axis]:
    """Overrides as axes; a comma list in Hydra's grammar is an axis of several values.

    Raises
    ------
    WrongInput
        For what is not `key=value` in Hydra's grammar.
    """
    return [_axis(text) for text in overrides]


def _axis(text: str) -> Axis:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise WrongInput(
            f"{text!r} is not an override; write key=value, for example adapter.r=1,2,4."
        )
    if key in LITERAL:
        return Axis(key, (value,))
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text)
        if not override.is_sweep_override():
            return Axis(key, (override.value(),))
        parts = list(itertools.islice(override.sweep_string_iterator(), MOST + 1))
        need_few(len(parts))
        return Axis(key, tuple(parser.parse_override(f"{key}={p}").value() for p in parts))
    except (HydraException, OmegaConfBaseException) as error:
        raise WrongInput(
            f"{text!r} is not understood; write key=value, several runs as key=1,2,4, and a value "
            f"with brackets in two pairs of quotes: '{key}=\"(a|b)\"'."
        ) from error


def need_few(combinations: int) -> None:
    """Refuse what would take minutes only to be planned."""
    if combinations > MOST:
        raise WrongInput(f"more than {MOST} runs in one command; give fewer values.")


def count(axes: Sequence[Axis]) -> int:
    """How many combinations `expand` gives."""
    return math.prod(len(values) for values in {a.key: a.values for a in axes}.values())


def expand(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Every combination of the axes' values; a later axis of the same key replaces an earlier."""
    last = {axis.key: axis.values for axis in axes}
    for values in itertools.product(*last.values()):
        yield dict(zip(last, values, strict=True))


# ---- axes -> typed configs --------------------------------------------------------------------


@lru_cache(maxsize=256)
def _composed(groups: tuple[tuple[str, str], ...]) -> DictConfig:
    """The config of one choice of groups; composing is slow, so it is done once for each."""
    register_fixed()
    picked = dict(groups)
    for group in GROUPS:
        register(group, picked[group], REGISTRIES[group][picked[group]])
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder().resolve()), version_base="1.3"):
        cfg = compose("config", [f"{g}={v}" for g, v in groups])
    return cfg


DEFAULT_GROUPS = {"model": "minilm", "data": "rotten_tomatoes", "adapter": "lora"}
"""The choices of conf/config.yaml."""


def build(values: Mapping[str, Any]) -> tuple[DictConfig, dict[str, WrongInput]]:
    """Compose one combination of override values.

    Parameters
    ----------
    values : mapping
        Key or group to value.

    Returns
    -------
    cfg : DictConfig
    refused : dict of str to WrongInput
        The keys that the chosen groups do not have, with the error that says so.
    """
    groups = dict(DEFAULT_GROUPS)
    for key, value in values.items():
        if key in (*GROUPS, "size", "host"):
            name = "null" if value is None else str(value)
            if name not in choices(key):
                raise unknown(key, name, choices(key))
            groups[key] = name
    cfg = _composed(tuple(sorted(groups.items()))).copy()
    refused = {}
    for key, value in values.items():
        if key in groups:
            continue
        if _has(cfg, key):
            _set(cfg, key, value)
        else:
            refused[key] = _no_key(key, cfg, groups)
    return cfg, refused


def _has(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    # `train=...` is none: it would replace the whole group.
    return isinstance(node, DictConfig) and name in node and key != "train"


def _no_key(key: str, cfg: DictConfig, groups: Mapping[str, str]) -> WrongInput:
    group, _, name = key.partition(".")
    inside = [f"{g}.{k}" for g in map(str, cfg) if isinstance(cfg[g], DictConfig) for k in cfg[g]]
    # `lr=1` and `adapter.lr=1` can only mean `train.lr=1`.
    meant = [k for k in inside if k.endswith(f".{key.rpartition('.')[2]}")]
    hint = f" Did you mean {meant[0]!r}?" if meant else ""
    if key == "train":
        listed = ", ".join(k for k in inside if k.startswith("train."))
        return WrongInput(f"{key!r} is a group; write one of its keys: {listed}.")
    if group in cfg and name and isinstance(cfg[group], DictConfig):
        keys = [str(k) for k in cfg[group]]
        owner = f"{group}={groups[group]}" if group in groups else group
        listed = ", ".join(keys) if keys else "none"
        return WrongInput(
            f"{owner} has no key {name!r}; its keys: {listed}.{hint or did_you_mean(name, keys)}"
        )
    top = [str(k) for k in cfg] + ["size"]
    return WrongInput(
        f"unknown key {key!r}; groups: {', '.join(top)}.{hint or did_you_mean(key, top + inside)}"
    )


def _set(cfg: DictConfig, key: str, value: Any) -> None:
    if key in LITERAL:
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # omegaconf would resolve `${…}`
    try:
        # A mapping replaces the default mapping: merged, its keys would have to exist.
        OmegaConf.update(cfg, key, value, merge=False)
    except OmegaConfBaseException as error:
        parent, _, name = key.rpartition(".")
        owner = OmegaConf.get_type(OmegaConf.select(cfg, parent) if parent else cfg)
        allowed, words = expected(get_type_hints(owner)[name])
        given = str(value).lower() if isinstance(value, bool) else repr(value)
        given = "null" if value is None else given
        raise WrongInput(
            f"{key} must be {allowed}; got {given}.{did_you_mean(str(value), words)}"
        ) from error


def expected(kind: Any) -> tuple[str, list[str]]:
    """A field's type in words, and the words that it allows if they are few.

    >>> expected(int | None), expected(bool)
    (('a whole number or null', []), ('true or false', []))
    """
    if isinstance(kind, UnionType):
        found = [expected(part) for part in get_args(kind)]
        return " or ".join(text for text, _ in found), [w for _, words in found for w in words]
    if get_origin(kind) is dict:
        numbers = get_args(kind)[1] is not Any
        such = "of name patterns to numbers such as {query:4}" if numbers else "such as {r:8}"
        return f"a mapping {such}", []
    if issubclass(kind, Enum):
        words = [member.name for member in kind]
        return f"one of {', '.join(words)}", words
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "null" if kind is NoneType else known[kind], []


def typed(cfg: DictConfig) -> tuple[RunConfig, Host]:
    """A composed config as frozen dataclasses, ranges checked."""
    try:
        parts: dict[str, Any] = {k: OmegaConf.to_object(cfg[k]) for k in (*GROUPS, "train", "host")}
        host: Host = parts.pop("host")
        config = RunConfig(seed=cfg.seed, **parts)
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        raise WrongInput(f"a value refers to what is not there: {reason}.") from error
    need_device(host.device)
    return config, dataclasses.replace(host, results=str(literal_path(host.results)))


def config_of(store: Store, run_id: str) -> RunConfig:
    """The config of a run, read back from its folder."""
    values = {}
    for group, own in store.run(run_id).read_json("config")["config"].items():
        for name, value in (own if isinstance(own, dict) else {"choice": own}).items():
            values[group if name == "choice" else f"{group}.{name}"] = value
    return typed(build(values)[0])[0]


def need_device(name: str) -> None:
    """Refuse a device that this machine does not have."""
    here = list(dict.fromkeys(["auto", "cpu", device_type("auto")]))
    need(name in here, "host.device", f"{' or '.join(here)} on this machine", repr(name))


def resolve(config: RunConfig, device: str) -> RunConfig:
    """Fill in the defaults that depend on other fields, so that they enter the run id.

    The learning rate (model's full rate times method's factor), the precision (measured per model
    and device) and the method's own (α = 2r).
    """
    train = config.train
    if train.lr is None:
        need(
            train.optimizer is Optimizer.adamw,
            "train.lr",
            "given with train.optimizer=sgd",
            "nothing",
            "The default rates are AdamW's.",
        )
        rate = float(f"{type(config.model).full_rate * type(config.adapter).rate:.6g}")
        train = dataclasses.replace(train, lr=rate)
    if train.precision is Precision.auto:
        train = dataclasses.replace(train, precision=Precision[config.model.precision(device)])
    adapter = config.adapter
    if hasattr(adapter, "resolved"):
        adapter = adapter.resolved()
    return dataclasses.replace(config, train=train, adapter=adapter)


def check(config: RunConfig) -> None:
    """Refuse what cannot run before anything is made: data, model, targets, ranges."""
    config.data.check()
    config.adapter.layers(shapes(config.model, config.data))


@lru_cache(maxsize=64)
def shapes(model: Any, data: Any) -> Mapping[str, tuple[int, int]]:
    """(out, in) of the model's linear layers; a sweep asks for the same ones again and again."""
    return dict(model.shapes(data))


def planned(config: RunConfig, host: Host) -> Planned:
    """A typed config as a run to do, with the run that it starts from."""
    needs = starts(config.model.begin(), host)
    if needs:
        first = needs[0].config
        if shapes(first.model, first.data) != shapes(config.model, config.data):
            raise WrongInput(
                f"model.start must name a run of the same model; {config.model.start!r} trains "
                f"model={choice(first.model)}, this run is of model={choice(config.model)}."
            )
        model = dataclasses.replace(config.model, start=needs[0].run_id)
        config = dataclasses.replace(config, model=model)
    reference = starts(getattr(config.adapter, "reference", ""), host, "adapter.reference")
    if reference:
        adapter = dataclasses.replace(config.adapter, reference=reference[0].run_id)
        config = dataclasses.replace(config, adapter=adapter)
    config = resolve(config, device_type(host.device))
    check(config)
    return Planned(config, run_id(config), (*needs, *reference))


def starts(start: str, host: Host, key: str = "model.start") -> tuple[Planned, ...]:
    """The run that an override line in `model.start` or another key names; none for an id or
    nothing.

    Raises
    ------
    WrongInput
        When it names no run or several, or the run of that id is not done in `host.results`.
    """
    if not start:
        return ()
    if re.fullmatch(rf"[0-9a-f]{{{ID_LENGTH}}}", start):
        there = Path(host.results).is_dir()
        if not there or Store(host.results).run(start).status() != "done":
            raise WrongInput(f"{key}={start}: no such finished run in {host.results!r}.")
        return ()
    if "=" not in start:
        raise WrongInput(
            f"{key} must be the id of a finished run or an override line such as "
            f"'adapter=full seed=0'; got {start!r}."
        )
    found, _ = plan([start.split()], defaults=[f"host.device={host.device}"])
    if len(found) != 1:
        raise WrongInput(f"{key} must name one run; {start!r} names {len(found)}.")
    return (found[0],)


def planned_of(cfg: DictConfig) -> tuple[Planned, Host]:
    """A config that Hydra composed, as a run to do."""
    config, host = typed(cfg)
    return planned(config, host), host


def plan(
    lines: Sequence[Sequence[str]], extra: Sequence[str] = (), defaults: Sequence[str] = ()
) -> tuple[list[Planned], Host]:
    """The union of the lines' runs, without doubles.

    Parameters
    ----------
    lines : sequence of override lists
        Each line is expanded on its own.
    extra : override list
        From the command line: after each line's own, and stronger. A key that a line's method
        lacks is left out of that line.
    defaults : override list
        Weaker than the lines' own.

    Raises
    ------
    WrongInput
        Also when a key of `extra` fits no line.
    """
    stronger = parse(extra)
    regrouped = {axis.key for axis in stronger} & set(GROUPS)
    fits: set[str] = set()
    misfits: dict[str, list[WrongInput]] = {}
    runs: dict[str, Planned] = {}
    host = Host()
    axes = [[*parse([*defaults, *line]), *stronger] for line in lines]
    need_few(sum(count(line) for line in axes))
    for line in axes:
        for values in expand(line):
            cfg, refused = build(values)
            for key, error in refused.items():
                # A line's own keys may go too where the command line chose another method.
                if key not in {a.key for a in stronger} and key.partition(".")[0] not in regrouped:
                    raise error
                misfits.setdefault(key, []).append(error)
            fits |= set(values) - set(refused)
            config, host = typed(cfg)
            one = planned(config, host)
            runs.setdefault(one.run_id, one)
    for axis in stronger:
        if axis.key not in fits:
            # The method with the most keys says the most.
            raise max(misfits[axis.key], key=lambda error: len(str(error)))
    return list(runs.values()), host


def preset(name: str) -> list[list[str]]:
    """Lines of `conf/sweep/NAME.yaml`, each as a list of overrides.

    Raises
    ------
    WrongInput
        When there is no such preset.
    """
    if name not in choices("sweep"):
        raise unknown("sweep", name, choices("sweep"))
    path = conf_folder() / "sweep" / f"{name}.yaml"
    loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(loaded, dict)
    return [str(line).split() for line in loaded["lines"]]
