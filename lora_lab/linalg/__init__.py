"""Updates as factors or dense matrices, and their spectra. numpy and scipy only."""

from lora_lab.linalg.factored import Dense, Factored, Update, updates_of
from lora_lab.linalg.spectrum import Spectrum, decompose

__all__ = ["Dense", "Factored", "Spectrum", "Update", "decompose", "updates_of"]
