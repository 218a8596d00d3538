"""Item `suite`: the tests that need a GPU, each with what came of it."""

import pytest

from experiments.gpu.lease import ROOT
from experiments.gpu.record import Measured
from experiments.gpu.terms import Terms


class Watch:
    """A plugin of pytest that writes every test's outcome down as soon as there is one."""

    def __init__(self, measured: Measured):
        self.measured, self.outcomes = measured, {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":  # a set-up that fails or skips has no call
            outcome = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
            if report.outcome != "passed":
                reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                outcome["said"] = reason.splitlines()[-1][:300]
            self.outcomes[report.nodeid] = outcome
            self.measured.keep("tests", self.outcomes)


def run(measured: Measured, terms: Terms) -> None:
    """Raises:
    RuntimeError: a test failed, or, unless this is a trial, none passed.
    """
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in file.read_text()]
    watch = Watch(measured)
    code = pytest.main(["-m", "cuda", "-q", "-p", "no:cacheprovider", *files], plugins=[watch])
    passed = [name for name, test in watch.outcomes.items() if test["outcome"] == "passed"]
    if code != 0 or (not passed and terms.sizes == "real"):
        raise RuntimeError(f"pytest ended with {code}; {len(passed)} tests passed")


def table(measured: Measured) -> str:
    lines = ["| test | outcome | seconds | said |", "|---|---|--:|---|"]
    for name, test in measured.values["tests"].items():
        said = test.get("said", "").replace("|", "\\|")
        lines.append(f"| {name} | {test['outcome']} | {test['seconds']:.2f} | {said} |")
    return "\n".join(lines)
