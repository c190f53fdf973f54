"""Plain Hydra over the same engine: `python -m experiments.sweep -m adapter=lora adapter.r=1,2,4`.

Any Hydra launcher works, because every run is idempotent: what is done is skipped. The default one
(`hydra_plugins/lora_lab_launcher.py`) hands the whole batch to the engine.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from lora_lab.engine import run_here
from lora_lab.hydra_bridge import planned_of, register_all
from lora_lab.registry import conf_folder

register_all()


@hydra.main(config_path=str(conf_folder().resolve()), config_name="experiment", version_base="1.3")
def main(cfg: DictConfig) -> str:
    """One run in this process; returns its status."""
    one, host = planned_of(cfg)
    status = run_here(one, host)
    if status not in ("done", "diverged"):
        raise RuntimeError(f"run {one.run_id} {status}: see log.txt in its folder")
    return status


if __name__ == "__main__":
    main()
