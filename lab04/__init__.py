"""What the lab's scripts share: the classifier, the runtimes, the artefact folder, the measures, the charts."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the scripts and the default folders are here, wherever one starts them


class LabError(Exception):
    """A foreseeable failure. Its message is one line: what is wrong and what to do about it."""

    exit_code = 2
