"""Amazon SQS (or what speaks its protocol): durable queues, and nothing but queues.

Order is not kept, messages live 14 days, a body is small, and there are no exchanges, streams,
bounded or exclusive queues: asking for one is a ``ConfigError``, never something weaker. A queue
stays until it is deleted (``x-expires`` has no counterpart). Without a host in the URL it is
Amazon's own endpoint of the region.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from itertools import cycle
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError
from kombu.exceptions import KombuError

from flame_broker.errors import ConfigError
from flame_broker.portable.address import PortableAddress
from flame_broker.portable.link import Letter, Parcel, Receipt, Subscription
from flame_broker.portable.mailbox import Mailbox
from flame_broker.transport import Capabilities, QueueKind, QueueSpec, Unroutable

__all__ = ["SqsDialect", "SqsLink"]

_MAX_SQS_BYTES: Final = 256 * 1024
_ENVELOPE_BYTES: Final = 16 * 1024  # for kombu's JSON around the body, headers included
_MAX_MESSAGE_BYTES: Final = (_MAX_SQS_BYTES - _ENVELOPE_BYTES) * 3 // 4  # base64
_MAX_NAME: Final = 80
_RETENTION_S: Final = 14 * 24 * 3600  # the most that SQS offers; its default is four days
_BATCH: Final = 10  # the most that SQS takes or gives in one request
_NO_QUEUE: Final = ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist")
_OPTIONS: Final = ("region", "is_secure", "visibility_s", "wait_s")


class SqsDialect:
    """SQS in one region.

    URL options: ``region``; ``is_secure=0`` for plain HTTP; ``visibility_s``, how long a message
    stays with a process that no longer says so (60 seconds, renewed three times as often);
    ``wait_s``, how long one request waits for a message (5 seconds, at most 20).
    """

    product = "SQS"
    failures: tuple[type[Exception], ...] = (
        BotoCoreError,
        ClientError,
        OSError,
        KombuError,
    )
    capabilities = Capabilities(
        durable=True,
        confirms=True,
        dead_letters=False,
        redelivery=True,
        fanout=False,
        max_message_bytes=_MAX_MESSAGE_BYTES,
        streams=False,
    )

    def __init__(self, url: str) -> None:
        self._address = PortableAddress.parse(url, _OPTIONS)
        self.visibility_s = self._address.seconds("visibility_s", 60, minimum=1)
        self._urls = cycle(self._address.urls)

    def connect(self) -> SqsLink:
        """Connect to the next host."""
        options = self._address.options
        wait_s = self._address.seconds("wait_s", 5, minimum=0)
        kombu_options = {
            "region": options.get("region"),
            "is_secure": options.get("is_secure", "1") not in ("0", "false", "no"),
            "visibility_timeout": self.visibility_s,
            "wait_time_seconds": min(int(wait_s), 20),
            "polling_interval": 0,  # the request itself waits
            "sqs_base64_encoding": False,  # the body is base64 inside the envelope already
            "client-config": {"connect_timeout": 5, "read_timeout": 30},
        }
        return SqsLink(next(self._urls), kombu_options)

    def __str__(self) -> str:
        return self._address.masked


class SqsLink:
    """One client of SQS."""

    def __init__(self, url: str, kombu_options: dict[str, Any]) -> None:
        self._mailbox = Mailbox(url, kombu_options)
        self._client: Any = self._mailbox.channel.sqs()
        self._visibility_s = int(kombu_options["visibility_timeout"])
        self._subscription: Subscription | None = None
        self._urls: dict[str, str] = {}

    def declare(self, spec: QueueSpec) -> None:
        """Make a queue.

        Raises:
            ConfigError: It is one of those that SQS has not.
        """
        bounded = any(name.startswith("x-max-length") for name in spec.arguments)
        if spec.bindings or spec.exclusive or bounded or spec.kind is QueueKind.STREAM:
            raise ConfigError(
                f"queue {spec.name!r}: SQS has no exchanges, streams, bounded or exclusive queues"
            )
        if self._find(spec.name) is None:
            attributes = {
                "VisibilityTimeout": str(self._visibility_s),
                "MessageRetentionPeriod": str(_RETENTION_S),
            }
            self._client.create_queue(QueueName=_sqs_name(spec.name), Attributes=attributes)

    def declare_exchange(self, name: str, kind: str) -> None:
        """Refuse: there are none."""
        raise ConfigError(f"{kind} exchange {name!r}: SQS has no exchanges")

    def delete(self, queue: str) -> None:
        """Delete a queue."""
        url = self._find(queue)
        if url is not None:
            self._client.delete_queue(QueueUrl=url)
            del self._urls[queue]

    def depth(self, queue: str) -> int | None:
        """Messages ready in a queue: an estimate, as SQS gives it."""
        self._urls.pop(queue, None)  # another process may have deleted it
        url = self._find(queue)
        if url is None:
            return None
        name = "ApproximateNumberOfMessages"
        reply = self._client.get_queue_attributes(QueueUrl=url, AttributeNames=[name])
        return int(reply["Attributes"][name])

    def publish(self, letter: Letter) -> None:
        """Send to one queue, which must exist: kombu would make a missing one."""
        if letter.exchange:
            raise ConfigError(f"exchange {letter.exchange!r}: SQS has no exchanges")
        sent = self._find(letter.key) is not None and self._send(letter)
        if letter.mandatory and not sent:
            raise Unroutable(f"no queue takes what is sent to {letter.key!r}")

    def _send(self, letter: Letter) -> bool:
        try:
            self._mailbox.send(_sqs_name(letter.key), letter.body, letter.headers)
        except ClientError as exc:
            if not _is_missing(exc):
                raise
            del self._urls[letter.key]
            return False
        return True

    def _find(self, queue: str) -> str | None:
        if queue not in self._urls:
            try:
                reply = self._client.get_queue_url(QueueName=_sqs_name(queue))
            except ClientError as exc:
                if _is_missing(exc):
                    return None
                raise
            self._urls[queue] = reply["QueueUrl"]
        return self._urls[queue]

    def subscribe(self, subscription: Subscription) -> None:
        """Read a queue."""
        self._subscription = subscription
        self._mailbox.listen(_sqs_name(subscription.queue), self._on_message)

    def receive(self, credit: int) -> None:
        """Ask once for up to ten messages."""
        # The request itself waits (``wait_s``); a timeout that is over at once prevents a second.
        self._mailbox.receive(credit=min(credit, _BATCH), timeout_s=0.001)

    def _on_message(self, message: Any) -> None:
        assert self._subscription is not None
        info = message.delivery_info
        source = info["sqs_message"]
        self._subscription.on_parcel(
            Parcel(
                queue=self._subscription.queue,
                body=bytes(message.body or b""),
                headers=message.headers,
                redelivered=int(source["Attributes"]["ApproximateReceiveCount"]) > 1,
                receipt=Receipt(info["sqs_queue"], source["ReceiptHandle"]),
            )
        )

    def ack(self, receipt: Receipt) -> None:
        """Delete a message; one whose receipt is out of date is with another consumer."""
        try:
            self._client.delete_message(QueueUrl=receipt.place, ReceiptHandle=receipt.tag)
        except ClientError as exc:
            if not (_is_missing(exc) or _is_stale(exc)):
                raise

    def hold(self, receipts: Iterable[Receipt]) -> None:
        """Start the visibility time of messages in hand anew."""
        self._change_visibility(receipts, self._visibility_s)

    def give_back(self, receipts: Iterable[Receipt]) -> None:
        """Make messages in hand visible at once."""
        self._change_visibility(receipts, 0)

    def _change_visibility(self, receipts: Iterable[Receipt], seconds: int) -> None:
        queues: dict[str, list[str]] = {}
        for receipt in receipts:
            queues.setdefault(receipt.place, []).append(receipt.tag)
        for url, tags in queues.items():
            for start in range(0, len(tags), _BATCH):
                self._change_batch(url, tags[start : start + _BATCH], seconds)

    def _change_batch(self, url: str, tags: list[str], seconds: int) -> None:
        entries = [
            {"Id": str(number), "ReceiptHandle": tag, "VisibilityTimeout": seconds}
            for number, tag in enumerate(tags)
        ]
        try:
            # Single entries that fail are reported, not raised: their messages have moved on.
            self._client.change_message_visibility_batch(QueueUrl=url, Entries=entries)
        except ClientError as exc:
            if not (_is_missing(exc) or _is_stale(exc)):
                raise

    def tidy(self) -> None:
        """Nothing: SQS brings messages back by itself."""

    def close(self) -> None:
        """Forget the client."""
        try:
            self._mailbox.close()
        except SqsDialect.failures:
            return  # it was gone already


def _sqs_name(queue: str) -> str:
    """SQS allows 80 letters, digits, ``-`` and ``_``; a longer name ends in its hash."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", queue)
    if len(name) <= _MAX_NAME:
        return name
    return f"{name[:47]}-{hashlib.sha256(queue.encode()).hexdigest()[:32]}"


def _is_missing(exc: ClientError) -> bool:
    return exc.response["Error"]["Code"] in _NO_QUEUE


def _is_stale(exc: ClientError) -> bool:
    return exc.response["Error"]["Code"] in ("InvalidParameterValue", "ReceiptHandleIsInvalid")
