"""An S3 (and SQS) server of one's own: moto behind real HTTP."""

from __future__ import annotations

import sys
import urllib.parse
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lab.ports import answers, free_port
from lab.processes import Process
from lab.services import MissingService
from lab.wait import wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

__all__ = ["CREDENTIALS", "S3Server"]

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""Environment that clients of the server need; it accepts any key."""


class S3Server:
    """A moto server in a process of its own, on loopback; it forgets everything when it ends."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: Process | None = None

    @property
    def endpoint(self) -> str:
        """HTTP address of the server, for S3 and for SQS."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.running

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None, "the server was never started"
        return self._process.pid

    def start(self) -> Self:
        """Start the server, empty, and wait until it answers.

        Raises:
            MissingService: moto's server is not installed.
        """
        if self.running:
            return self
        _require_moto()
        process = Process([sys.executable, "-m", "moto.server", "-p", str(self.port)])
        self._process = process

        def serving() -> bool:
            assert process.running, f"moto_server ended: {process.output()[-4000:]}"
            return answers(self.port)

        wait_until(serving, 60, lambda: f"moto_server: {process.output()[-4000:]}")
        return self

    def stop(self) -> None:
        """End the server and all it holds."""
        if self._process is not None:
            self._process.close()

    kill = stop

    def pause(self) -> None:
        """Freeze the server: it accepts connections and never answers."""
        assert self._process is not None
        self._process.pause()

    def resume(self) -> None:
        """Let a frozen server go on."""
        assert self._process is not None
        self._process.resume()

    def client(self) -> S3Client:
        """Return a plain boto3 client of the server."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its name."""
        self.client().create_bucket(Bucket=name)
        return name

    def store_url(self, bucket: str, prefix: str = "") -> str:
        """Return the URL that opens this place as an object store."""
        query = urllib.parse.urlencode(
            {"endpoint": self.endpoint, "region": CREDENTIALS["AWS_DEFAULT_REGION"]}, safe=":/"
        )
        return f"s3://{bucket}/{prefix}?{query}"

    def sqs_url(self) -> str:
        """Return the URL that opens this server as a message broker."""
        key, secret = CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
        region = CREDENTIALS["AWS_DEFAULT_REGION"]
        return f"sqs://{key}:{secret}@127.0.0.1:{self.port}/?region={region}&is_secure=0"

    def __enter__(self) -> Self:
        """Start the server."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the server."""
        self.stop()


def _require_moto() -> None:
    try:
        import moto.server  # noqa: F401  (only whether it is there)
    except ImportError as exc:
        raise MissingService("install moto[server] (it is in requirements/dev.txt)") from exc
