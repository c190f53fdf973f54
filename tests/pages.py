"""A small results folder and its pages, for the tests of the dashboard."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_lab import engine
from lora_lab.config import as_dict
from lora_lab.dashboard import server
from lora_lab.hydra_bridge import plan
from lora_lab.store import Store

TINY = ["model=planted", "data=planted", "size=smoke", "data.width=64", "host.tracker=disabled"]
ERROR = "RuntimeError: <b>out of memory</b> & more"


def made(results: Path) -> tuple[Store, list[str]]:
    """LoRA at r = 2 of two seeds and at r = 4 done, one run failed, one that nobody began."""
    words = [*TINY, f"host.results={results}"]
    lines = [["adapter.r=2", "seed=0,1"], ["adapter.r=4,8,16", "seed=0"]]
    planned, host = plan(lines, words)
    for one in planned[:3]:
        assert engine.run_here(one, host) == "done"
    store = Store(results)
    store.write_sweep("ranks", [one.run_id for one in planned])
    failed = store.run(planned[3].run_id)
    with failed.lock():
        failed.begin({"run_id": failed.run_id, "config": as_dict(planned[3].config)}, {})
        failed.fail(ERROR)
    return store, [one.run_id for one in planned]


@contextmanager
def served(store: Store) -> Iterator[int]:
    """The port on which the pages of a store are served."""
    with server(store) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield serving.port
        serving.shutdown()
        thread.join()
