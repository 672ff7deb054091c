"""What the lab's scripts share: the classifier, the runtimes, the artefact folder, the measures, the charts."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the scripts and the default folders are here, wherever one starts them


if find_spec("numpy") is None:  # no environment at all: say so before the first import of a library is a traceback
    print(
        f"{Path(sys.argv[0]).name}: the lab's libraries are not installed for {sys.executable}: run it with "
        f"{ROOT / '.venv' / 'bin' / 'python'}, which make lab sets up",
        file=sys.stderr,
    )
    sys.exit(2)


class LabError(Exception):
    """A foreseeable failure. Its message is one line: what is wrong and what to do about it."""

    exit_code = 2
