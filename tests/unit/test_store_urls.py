"""Which store a URL opens, and what it never shows."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flame_broker.errors import ConfigError
from flame_broker.store import Store, open_store
from flame_broker.store.file import FileStore
from flame_broker.store.http import HttpStore
from flame_broker.store.s3 import S3Store


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("s3://bucket", S3Store),
        ("s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=eu-west-1", S3Store),
        ("S3://bucket/prefix?read_timeout_s=2.5&retry_s=1&addressing=virtual", S3Store),
        ("file:///srv/flame", FileStore),
        ("file://localhost/srv/flame?fsync=true", FileStore),
        ("http://host:8080/prefix", HttpStore),
        ("https://user:secret@host/prefix?token=abc", HttpStore),
    ],
)
def test_a_url_opens_its_store_without_connecting(url: str, kind: type[Store]) -> None:
    assert isinstance(open_store(url), kind)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "starts with none of s3://, file://"),
        ("/srv/flame", "starts with none of"),
        ("ftp://host/x", "starts with none of"),
        ("s3://", "expected s3://bucket/prefix"),
        ("s3://bucket/../x", "prefix"),
        ("s3://bucket?endpont=http://h", "'endpont'; known are: addressing, connect_timeout_s"),
        ("s3://bucket?retry_s=soon", "retry_s='soon'.*seconds above 0"),
        ("s3://bucket?retry_s=-1", "seconds above 0"),
        ("s3://bucket?retry_s=nan", "seconds above 0"),
        ("s3://bucket?retry_s=inf", "seconds above 0"),
        ("s3://bucket?addressing=both", "path or virtual"),
        ("s3://bucket?endpoint=127.0.0.1:9000", "endpoint.*http"),
        ("file://", "file:///absolute/folder"),
        ("file:///", "file:///absolute/folder"),
        ("file://server/share", "file:///absolute/folder"),
        ("file:///srv?fsync=yes", "true or false"),
        ("file:///srv?sync=true", "known are: fsync"),
        ("http:///prefix", "http://host/prefix"),
        ("http://host:port/prefix", "cannot be read"),
    ],
)
def test_a_wrong_url_is_a_config_error_that_says_why(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (
            "s3://AKIA:hidden@bucket/prefix?endpoint=http://host",
            "s3://AKIA:***@bucket/prefix?endpoint=http://host",
        ),
        ("https://user:hidden@host:1/p?token=hidden", "https://user:***@host:1/p?***"),
        ("http://hidden%40@host/p", "http://***@host/p"),
    ],
)
def test_secrets_are_masked(url: str, shown: str) -> None:
    store = open_store(url)
    assert store.describe() == shown
    assert "hidden" not in repr(store)


def test_a_config_error_masks_secrets_too() -> None:
    with pytest.raises(ConfigError) as caught:
        open_store("s3://AKIA:hidden@bucket?nonsense=1")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("url", ["file:///srv/flame", "http://host/prefix"])
def test_a_store_without_s3_does_not_import_boto3(url: str) -> None:
    program = (
        "import sys; from flame_broker.store import open_store;"
        f"open_store({url!r}); print('boto3' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
