"""`make load`: a load test of the demo service, which is started for it and stopped after it, on this machine.

Arguments are locust's and those of load_tests/locustfile.py; without any it is STEADY. `--service FILE` is the
configuration of the service, in place of its defaults. The exit status is locust's, that of the verdict.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from load_tests.figures import running_service, stream

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
STEADY = ["--users", "2", "--spawn-rate", "1", "--run-time", "3m", "--preset", "realtime"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], add_help=False, allow_abbrev=False)
    parser.add_argument("--service", type=Path)
    chosen, arguments = parser.parse_known_args()
    with running_service("{}" if chosen.service is None else chosen.service.read_text()) as (url, _, _):
        stream(url, chunks=1)  # the service says that it is ready before its replicas are
        # What stands last counts.
        options = ["--headless", "--only-summary", "--host", url, *STEADY, *arguments]
        return subprocess.run([sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *options]).returncode


if __name__ == "__main__":
    sys.exit(main())
