"""An S3 server in a process of its own: moto's, which keeps in memory what it is given.

It shows that we speak S3, and what we do when it is silent. It does not show that S3 keeps what it promises:

- Exclusive creation. Moto looks for the object and then puts it, so it is served by a single thread here: that of many
  who create one key together a single one succeeds is this thread's doing, and S3's own affair there.
- Consistency, and the order of what is under way. A request that was given up may reach S3 after later ones.
- Throttling (503 SlowDown) and other errors that it has at times, credentials and their expiry, TLS, buckets with
  versions or a quota.
- `gs://` and `az://`: only `s3://` was ever tried.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from itertools import count

import httpx

SERVE = """
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

app = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, app, request_handler=MotoRequestHandler)
print(server.port, flush=True)
server.serve_forever()
"""


class S3Server:
    """Runs until `close`. `environment`: the variables by which a Store finds it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self._endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self._numbers = count(1)
        self.environment = {
            "AWS_ENDPOINT": self._endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    @property
    def pid(self) -> int:
        return self._process.pid

    def new_bucket(self) -> str:
        """The URL of an empty one."""
        name = f"bucket-{next(self._numbers)}"
        httpx.put(f"{self._endpoint}/{name}", timeout=60).raise_for_status()
        return f"s3://{name}/cell"

    def stop(self) -> None:
        """From here on it is silent: it takes connections, and what is sent, and answers nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
