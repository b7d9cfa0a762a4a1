"""A plugin for pytest, ``-p tools.lease.pytest_lines``: appends each test's result to the file of results at once.

A run in which every test was skipped proves nothing, so it fails (status 5, as if no test had been collected).
"""

from __future__ import annotations

from typing import Any

from tools.lease.log import case

NOTHING_RAN = 5
_ran: list[str] = []
_reports_to_another = False


def pytest_configure(config: Any) -> None:
    """A worker of pytest-xdist reports to the process that started it, which appends the lines of all."""
    global _reports_to_another
    _reports_to_another = hasattr(config, "workerinput")


def pytest_runtest_logreport(report: Any) -> None:
    if _reports_to_another or (report.when != "call" and report.outcome == "passed"):
        return
    said = {"message": str(report.longrepr)[-1500:]} if report.outcome == "failed" else {}
    case(report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), **said)
    if report.outcome != "skipped":
        _ran.append(report.nodeid)


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    if exitstatus == 0 and not _ran and not _reports_to_another:
        session.exitstatus = NOTHING_RAN
