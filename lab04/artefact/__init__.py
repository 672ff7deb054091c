"""The artefact folder: what each lab hands to whoever runs it."""

from lab04.artefact.contract import Artefact, load
from lab04.artefact.tokeniser import Tokeniser, Tokens

__all__ = ["Artefact", "Tokeniser", "Tokens", "load"]
