"""Upload a folder to an S3 bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3

from flame.runnable import Runnable


class S3Pusher(Runnable):
    """Uploads every file below a folder, under its path in the folder.

    Credentials come from the section ``AWS`` of the secrets file (``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY`` and, for temporary ones, ``AWS_SESSION_TOKEN``), else from where boto3
    looks by itself.

    Args:
        experiment_path: The folder, on the machine that runs ``run``.
        bucket_name: The bucket; it must exist.
        prefix: Put before every key.
        endpoint_url: An S3 of another make.
    """

    def __init__(
        self,
        experiment_path: str,
        bucket_name: str,
        prefix: str = "",
        endpoint_url: str | None = None,
    ) -> None:
        super().__init__()
        self.experiment_path = Path(experiment_path)
        self.bucket_name = bucket_name
        self.prefix = prefix
        self.endpoint_url = endpoint_url

    def run(self, **kwargs: Any) -> None:
        """Upload."""
        client = boto3.client("s3", endpoint_url=self.endpoint_url, **self._credentials())
        files = sorted(path for path in self.experiment_path.rglob("*") if path.is_file())
        if not files:
            raise FileNotFoundError(f"there are no files in {self.experiment_path.absolute()}")
        for path in files:
            key = self.prefix + path.relative_to(self.experiment_path).as_posix()
            client.upload_file(str(path), self.bucket_name, key)
            print(f"{path} -> s3://{self.bucket_name}/{key}")

    def _credentials(self) -> dict[str, str]:
        if "AWS" not in self.config:
            return {}
        # ConfigParser spells names in lower case, which is how boto3 wants them.
        names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
        return {name: self.config["AWS"][name] for name in names if name in self.config["AWS"]}
