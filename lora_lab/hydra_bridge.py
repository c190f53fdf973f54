"""From override strings to typed configs. The only module, beside Hydra's own entries, that knows
hydra and omegaconf; below it there is no `cfg`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.adapters import ADAPTERS
from lora_lab.config import GROUPS, Host, Precision, RunConfig, TrainConfig, run_id
from lora_lab.data import DATA
from lora_lab.models import MODELS, device_type
from lora_lab.registry import Registry, WrongInput, did_you_mean, unknown

REGISTRIES: dict[str, Registry[Any]] = {"model": MODELS, "data": DATA, "adapter": ADAPTERS}

LITERAL = ("data.path", "data.name", "model.name", "model.start", "host.results")
"""Fields whose value is taken as it is typed: paths, and override lines of other runs."""


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


def conf_folder() -> Path:
    """`conf` beside the package (a checkout) or inside it (a wheel)."""
    package = Path(__file__).parent
    beside = package.parent / "conf"
    return beside if (beside / "config.yaml").is_file() else package / "conf"


def choices(group: str) -> list[str]:
    """Names that may stand after `group=`."""
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
        parts = [f"{key}={part}" for part in override.sweep_string_iterator()]
        return Axis(key, tuple(parser.parse_override(part).value() for part in parts))
    except (HydraException, OmegaConfBaseException) as error:
        raise WrongInput(
            f"{text!r} is not understood; write key=value, a list of runs as key=1,2,4, and quote "
            "values with spaces or brackets."
        ) from error


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
            if str(value) not in choices(key):
                raise unknown(key, str(value), choices(key))
            groups[key] = str(value)
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
    return isinstance(node, DictConfig) and (name in node or OmegaConf.is_missing(node, name))


def _no_key(key: str, cfg: DictConfig, groups: Mapping[str, str]) -> WrongInput:
    group, _, name = key.partition(".")
    if group in cfg and name and isinstance(cfg[group], DictConfig):
        keys = [str(k) for k in cfg[group]]
        owner = f"{group}={groups[group]}" if group in groups else group
        listed = ", ".join(keys) if keys else "none"
        return WrongInput(
            f"{owner} has no key {name!r}; its keys: {listed}.{did_you_mean(name, keys)}"
        )
    top = [str(k) for k in cfg] + ["size"]
    inside = [f"{g}.{k}" for g in map(str, cfg) if isinstance(cfg[g], DictConfig) for k in cfg[g]]
    return WrongInput(
        f"unknown key {key!r}; groups: {', '.join(top)}.{did_you_mean(key, top + inside)}"
    )


def _set(cfg: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(cfg, key, value, force_add=False)
    except OmegaConfBaseException as error:
        raise _wrong_value(key, value, error) from error


def _wrong_value(key: str, value: Any, error: Exception) -> WrongInput:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return WrongInput(f"{key}={value} is not allowed: {reason}.".replace("..", "."))


def typed(cfg: DictConfig) -> tuple[RunConfig, Host]:
    """A composed config as frozen dataclasses, ranges checked."""
    try:
        parts: dict[str, Any] = {k: OmegaConf.to_object(cfg[k]) for k in (*GROUPS, "train", "host")}
        host: Host = parts.pop("host")
        return RunConfig(seed=cfg.seed, **parts), host
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        raise WrongInput(f"the config does not fit its types: {reason}") from error


def resolve(config: RunConfig, device: str) -> RunConfig:
    """Fill in the defaults that depend on other fields, so that they enter the run id.

    The learning rate (model's full rate times method's factor), the precision (measured per model
    and device) and the method's own (α = 2r).
    """
    train = config.train
    if train.lr is None:
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
    config.adapter.layers(config.model.shapes(config.data))


def planned(config: RunConfig, device: str) -> Planned:
    """A typed config as a run to do, with the runs that it starts from."""
    needs: tuple[Planned, ...] = ()
    start = config.model.start
    if start and not re.fullmatch(r"[0-9a-f]{12}", start):
        first = plan([start.split()])[0]
        if len(first) != 1:
            raise WrongInput(f"model.start must name one run; {start!r} names {len(first)}.")
        needs = (first[0],)
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, start=first[0].run_id)
        )
    config = resolve(config, device)
    check(config)
    return Planned(config, run_id(config), needs)


def planned_of(cfg: DictConfig) -> tuple[Planned, Host]:
    """A config that Hydra composed, as a run to do."""
    config, host = typed(cfg)
    return planned(config, device_type(host.device)), host


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
    misfits: dict[str, WrongInput] = {}
    runs: dict[str, Planned] = {}
    host = Host()
    for line in lines:
        for values in expand([*parse([*defaults, *line]), *stronger]):
            cfg, refused = build(values)
            for key, error in refused.items():
                # A line's own keys may go too where the command line chose another method.
                if key not in {a.key for a in stronger} and key.partition(".")[0] not in regrouped:
                    raise error
                misfits.setdefault(key, error)
            fits |= set(values) - set(refused)
            config, host = typed(cfg)
            one = planned(config, device_type(host.device))
            runs.setdefault(one.run_id, one)
    for axis in stronger:
        if axis.key not in fits:
            raise misfits[axis.key]
    return list(runs.values()), host


def preset(name: str) -> list[list[str]]:
    """Lines of `conf/sweep/NAME.yaml`, each as a list of overrides.

    Raises
    ------
    WrongInput
        When there is no such preset.
    """
    folder = conf_folder() / "sweep"
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in names:
        raise unknown("sweep", name, names)
    loaded = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"), resolve=False)
    assert isinstance(loaded, dict)
    return [str(line).split() for line in loaded["lines"]]
