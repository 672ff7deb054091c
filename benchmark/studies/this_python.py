"""Whether this Python and its libraries pass the lab's tests: `python -m benchmark.studies.this_python`. Some minutes.

Runs all tests and notes in results/python-versions/results.json how many passed, in place of an earlier run of the
same versions; README.md shows the table. Make an environment for another Python with `make PYTHON=python3.13 test`.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from benchmark import environment, results
from lab04 import ROOT, LabError, console


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.this_python", description=console.first_line(__doc__)
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="results folder (default: results)")
    parser.add_argument("tests", nargs="*", help="files of tests (default: all, as for a table)")
    arguments = parser.parse_args()
    run = count(arguments.tests)
    folder = arguments.output / "python-versions"
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict = (
        results.load(folder) if (folder / results.RESULTS).exists() else {"format": results.FORMAT, "runs": []}
    )
    others = [row for row in measured["runs"] if (row["python"], row["torch"]) != (run["python"], run["torch"])]
    measured["runs"] = sorted([*others, run], key=lambda row: [int(part) for part in str(row["python"]).split(".")])
    results.save_json(folder / results.RESULTS, measured)
    print(json.dumps(run))
    print(f"Wrote {folder / results.RESULTS}")
    console.suggest("make readme")


def count(tests: list[str]) -> dict:
    """Run tests and count how they ended. Raises LabError if pytest itself could not run."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        ended = subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}", *tests], cwd=ROOT)
        if ended.returncode not in (0, 1):
            raise LabError(f"pytest ended with code {ended.returncode}: pip install -r requirements/test.txt")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    ran, skipped, *faults = (int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors"))
    git = environment.describe_commit()
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": version("torch").partition("+")[0],
        "passed": ran - skipped - sum(faults),
        "failed": sum(faults),
        "not_run": skipped,
        "commit": git["commit"][:7] if git else None,
    }


if __name__ == "__main__":
    console.run(main, "requirements/test.txt")
