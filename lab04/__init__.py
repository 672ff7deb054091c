"""What the lab's scripts share: the classifier, the runtimes, the artefact folder, the measures, the charts."""


class LabError(Exception):
    """A foreseeable failure. Its message is one line: what is wrong and what to do about it."""

    exit_code = 2
