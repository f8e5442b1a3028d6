"""One bucket as S3Store talks to it: the boto3 client, and its errors in our words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import boto3
from botocore import exceptions as vendor
from botocore.config import Config

from flame_broker.errors import ConfigError, ObjectNotFound, PreconditionFailed, StoreError
from flame_broker.objects import is_key
from flame_broker.store.per_process import PerProcess
from flame_broker.store.retries import DEFAULT_RETRY_S, Retries, Transient
from flame_broker.store.urls import StoreUrl

__all__ = ["InvalidRange", "S3Connection", "UploadGone"]

_OPTIONS: Mapping[str, str | float | bool] = {
    "endpoint": "",
    "region": "",
    "profile": "",
    "addressing": "",
    "connect_timeout_s": 5.0,
    "read_timeout_s": 30.0,
    "retry_s": DEFAULT_RETRY_S,
}

_Addressing = Literal["path", "virtual", "auto"]

_POOL_CONNECTIONS = 32

_UNANSWERED = (vendor.ConnectionError, vendor.HTTPClientError, vendor.IncompleteReadError)
_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
"""OpenSSL's word for what no retry changes; other TLS failures are broken connections."""

_NOT_FOUND = {"NoSuchKey", "NotFound", "404"}
_PRECONDITION = {"PreconditionFailed", "412"}
_REFUSED = {
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "401",
    "403",
}
_TRANSIENT = {
    # Two conditional writes at once: S3 asks to send the loser's again.
    "ConditionalRequestConflict",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_TOO_MANY = 429
_SERVER_ERROR = 500


class InvalidRange(StoreError):
    """The range starts behind the end of the object; that of an empty object always does."""


class UploadGone(StoreError):
    """The multipart upload was completed or aborted before."""


class S3Connection:
    """A bucket and how to reach it; thread-safe, and made anew after a fork.

    Args:
        url: See ``S3Store``.
    """

    def __init__(self, url: StoreUrl) -> None:
        if not url.host:
            raise ConfigError(f"the store URL {url.masked}: expected s3://bucket/prefix")
        self.url = url
        self.bucket = url.host
        prefix = url.path.strip("/")
        if prefix and not is_key(prefix):
            raise ConfigError(f"the store URL {url.masked} has a prefix that is no object key")
        self.prefix = f"{prefix}/" if prefix else ""
        self._options = url.options(_OPTIONS)
        self._endpoint = str(self._options["endpoint"])
        if self._endpoint and not self._endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint in {url.masked}: expected http://host:port or https://…")
        self._addressing = self._checked_addressing()
        self.retries = Retries(float(self._options["retry_s"]))
        self._client = PerProcess(self._make_client)

    def once(self, operation: str, key: str, **parameters: object) -> Any:
        """Send one request about an object, without retries.

        Args:
            operation: A method of the boto3 client.
            key: The object, below the store's prefix.
            parameters: As boto3 documents them; bucket and key are added.
        """
        with self.translating(key):
            send = getattr(self._client.get(), operation)
            return send(Bucket=self.bucket, Key=self.prefix + key, **parameters)

    def call(self, operation: str, key: str, **parameters: object) -> Any:
        """Send a request about an object, and try it again while the failure may pass."""
        return self.retries.run(lambda: self.once(operation, key, **parameters))

    def page(self, prefix: str, **parameters: object) -> Any:
        """One page of the listing of the objects below the store's prefix that start so."""

        def attempt() -> Any:
            with self.translating(f"{prefix}…"):
                return self._client.get().list_objects_v2(
                    Bucket=self.bucket, Prefix=self.prefix + prefix, **parameters
                )

        return self.retries.run(attempt)

    def describe(self, key: str) -> str:
        """An object's name in messages."""
        return f"object {key} in {self.url.masked}"

    def close(self) -> None:
        """Close the pooled connections of this process."""
        self.retries.stop()
        client = self._client.take()
        if client is not None:
            client.close()

    @contextmanager
    def translating(self, key: str) -> Iterator[None]:
        """Turn botocore's errors into ours; also around the reading of a body."""
        name = self.describe(key)
        try:
            yield
        except vendor.ClientError as exc:
            raise self._answered(exc, name) from exc
        except _UNANSWERED as exc:
            if _CERTIFICATE in str(exc):
                raise StoreError(f"{name}: the certificate was refused: {exc}") from exc
            raise Transient(
                f"{name}: no answer from {self._endpoint or 'S3'}"
                f" ({_first_line(exc)}); is it up, and the endpoint in the store URL right?"
            ) from exc
        except vendor.NoCredentialsError as exc:
            raise StoreError(
                f"{name}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
                " a profile, or an instance role"
            ) from exc
        except vendor.BotoCoreError as exc:
            raise StoreError(f"{name}: {_first_line(exc)}") from exc

    def _answered(self, exc: vendor.ClientError, name: str) -> StoreError:
        """What an error answer of the server means."""
        code = str(exc.response.get("Error", {}).get("Code", ""))
        status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        detail = f"{name}: {_first_line(exc)}"
        if code in _NOT_FOUND:
            return ObjectNotFound(f"there is no {name}")
        if code in _PRECONDITION:
            return PreconditionFailed(f"{name} exists already, or was changed by someone else")
        if code in _TRANSIENT or status == _TOO_MANY or status >= _SERVER_ERROR:
            return Transient(detail)
        if code == "NoSuchBucket":
            return StoreError(f"there is no bucket {self.bucket}: create it, or mend the store URL")
        if code in _REFUSED:
            return StoreError(f"{detail} (check the credentials and their permissions)")
        kinds = {"InvalidRange": InvalidRange, "416": InvalidRange, "NoSuchUpload": UploadGone}
        return kinds.get(code, StoreError)(detail)

    def _checked_addressing(self) -> _Addressing:
        match self._options["addressing"]:
            case "":
                # A host of one's own rarely has a name per bucket in its DNS.
                return "path" if self._endpoint else "auto"
            case "path":
                return "path"
            case "virtual":
                return "virtual"
        raise ConfigError(f"addressing in {self.url.masked}: expected path or virtual")

    def _make_client(self) -> Any:
        options = {name: str(value) or None for name, value in self._options.items()}
        try:
            # A session of our own: boto3's default one is not thread-safe.
            session = boto3.session.Session(
                aws_access_key_id=self.url.username,
                aws_secret_access_key=self.url.password,
                profile_name=options["profile"],
                region_name=options["region"],
            )
            return session.client(
                "s3",
                endpoint_url=options["endpoint"],
                region_name=session.region_name or "us-east-1",
                config=self._config(),
            )
        except (vendor.BotoCoreError, ValueError) as exc:
            raise StoreError(f"{self.url.masked}: {_first_line(exc)}") from exc

    def _config(self) -> Config:
        return Config(
            connect_timeout=float(self._options["connect_timeout_s"]),
            read_timeout=float(self._options["read_timeout_s"]),
            # `Retries` does it, with a bound in time rather than in number.
            retries={"total_max_attempts": 1},
            max_pool_connections=_POOL_CONNECTIONS,
            tcp_keepalive=True,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False, "addressing_style": self._addressing},
        )


def _first_line(exc: Exception) -> str:
    return str(exc).split("\n", 1)[0]
