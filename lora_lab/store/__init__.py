"""The results folder: the only place that knows a file name, and where every write is whole."""

from lora_lab.store.files import Busy, Corrupt, StoreError, write_bytes
from lora_lab.store.folder import CLAIMS, Store
from lora_lab.store.rundir import Record, RunDir
from lora_lab.store.tables import Tables, load, pack
from lora_lab.store.work import Work

__all__ = [
    "CLAIMS",
    "Busy",
    "Corrupt",
    "Record",
    "RunDir",
    "Store",
    "StoreError",
    "Tables",
    "Work",
    "load",
    "pack",
    "write_bytes",
]
