"""Tools on updates: a tuned model to an adapter, an adapter to a smaller one, adapters to a model.

Weights are read from disk and written to a new folder, layer by layer, without torch.
"""

from lora_lab.convert.cut import Size
from lora_lab.convert.extract import extract
from lora_lab.convert.merge import merge
from lora_lab.convert.truncate import truncate

__all__ = ["Size", "extract", "merge", "truncate"]
