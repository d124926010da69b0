"""Failures written to a file as they happen: `pytest --failures FILE`. A run that is killed leaves those that came before."""

from pathlib import Path

LINES = 25  # of a failure's report, its last ones


class Failures:
    """With pytest-xdist in the process that gathers the reports, one at a time, so that no two mix."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self._append(f"{report.nodeid} ({report.when})", report)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._append(f"{report.nodeid} (collection)", report)

    def _append(self, title: str, report) -> None:
        lines = report.longreprtext.splitlines()[-LINES:]
        with self.path.open("a") as file:
            file.write("\n".join([f"FAILED {title}", *(f"  {line}" for line in lines), "", ""]))
