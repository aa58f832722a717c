"""Run a deployment with the parameters that it has, and wait for the end.

    python -m infra.ci.run pipeline/quickstart    # from the repository's root

`prefect deployment run --watch` does the same until the server's stream of events closes, and then ends with code 1 while the
run goes on; this asks for the state again and again, and waits for a server that is away. Exit codes: 0 Completed; 1 any other
end; 3 the server cannot be reached or has no such deployment; 130 after Ctrl-C, and the run goes on.
"""

from __future__ import annotations

import os
import sys

from infra.ci.flow_runs import Job, connect, follow, start
from infra.ci.report import Stop, say


def main(deployment: str, pause: float = 1.0, grace: float = 90.0) -> int:
    """The exit code. pause: seconds between two looks; grace: seconds in which a crashed run may come back."""
    job = Job(deployment, {}, f"hand-{os.urandom(8).hex()}")
    try:
        with connect(deployment) as server:
            start(server, [job], [])
            follow(server, [job], float("inf"), grace, pause, verdicts=())
    except Stop as stop:
        say(f"error {stop}", error=True)
        return stop.exit_code
    except KeyboardInterrupt:
        say(f"{deployment}: the run goes on, {job.page or 'in the UI'}")
        return 130
    assert job.outcome is not None
    return 1 if job.outcome.verdict in {"Failed", "Crashed", "Cancelled", "TimedOut"} else 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].count("/") != 1:
        sys.exit("usage: python -m infra.ci.run FLOW/NAME")
    sys.exit(main(sys.argv[1]))
