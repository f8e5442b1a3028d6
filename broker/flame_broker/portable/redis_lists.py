"""Queues as Redis lists: whoever is killed when, a message is always in one place.

=================== =============================================================================
its list            until somebody takes it
``flame.landing``   while it changes hands: a command that waits can move a message, not record it
``flame.taken``     a hash, by tag, until it is acked; ``flame.taken.index`` has the time of each
=================== =============================================================================

Each step is one command or one script, which Redis runs whole or not at all. kombu takes a message
with one command and records it with the next; what a process dies with in between is lost.

Times are those of the server. A message that is given back is marked by a key in front of those
of its envelope (JSON, as kombu writes it), so that it need not be read for that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, Final, NamedTuple
from uuid import uuid4

import redis

__all__ = ["RedisLists", "Taken"]

_LANDING: Final = "flame.landing"
_TAKEN: Final = "flame.taken"
_INDEX: Final = "flame.taken.index"
_MOST: Final = 64  # messages at a time
_ENOUGH_BYTES: Final = 1024 * 1024  # no further message is added to so much
_WAIT_S: Final = 5.0  # how long the server lets us wait at a time
_GLANCE_S: Final = 0.2  # how often a waiting thread looks whether it shall stop; costs no request
_PATIENCE_S: Final = 10.0  # a server whose answer is so late is gone
_RESTORED: Final = 1000  # messages in one run of the script, for which all others wait

_TAKE: Final = f"""
local queue, landing, taken, index = unpack(KEYS)
local landed, prefix, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
if landed ~= '' and redis.call('LREM', landing, 1, landed) == 1 then
    redis.call('RPUSH', queue, landed)
end
-- A client that did not get our answer asks once more: what it has then comes back in time.
if redis.call('HEXISTS', taken, prefix .. '1 ' .. queue) == 1 then return {{}} end
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local found, size = {{}}, 0
while #found < 2 * most and size < {_ENOUGH_BYTES} do
    local message = redis.call('RPOP', queue)
    if not message then break end
    local tag = prefix .. (#found / 2 + 1) .. ' ' .. queue
    redis.call('HSET', taken, tag, message)
    redis.call('ZADD', index, now, tag)
    found[#found + 1], found[#found + 2] = tag, message
    size = size + #message
end
return found
"""
_GIVE_BACK: Final = f"""
local taken, index = unpack(KEYS)
local mark, visibility, tags = ARGV[1], tonumber(ARGV[2]), {{}}
for number = 3, #ARGV do tags[#tags + 1] = ARGV[number] end
if visibility >= 0 then
    local clock = redis.call('TIME')
    local before = clock[1] + clock[2] / 1000000 - visibility
    tags = redis.call('ZRANGE', index, '-inf', before, 'BYSCORE', 'LIMIT', 0, {_RESTORED})
end
for number = #tags, 1, -1 do  -- the first of them is the next to be taken
    local tag = tags[number]
    local message = redis.call('HGET', taken, tag)
    redis.call('HDEL', taken, tag)
    redis.call('ZREM', index, tag)
    if message then
        if string.sub(message, 1, #mark) ~= mark then
            message = mark .. string.sub(message, 2)
        end
        redis.call('RPUSH', string.match(tag, ' (.*)'), message)
    end
end
"""
_HOLD: Final = """
local clock = redis.call('TIME')
for _, tag in ipairs(ARGV) do
    redis.call('ZADD', KEYS[1], 'XX', clock[1] + clock[2] / 1000000, tag)
end
"""
_MARK: Final = '{"redelivered": true, '


class Taken(NamedTuple):
    """A message in hand.

    Args:
        tag: What to ack it by.
        envelope: As kombu made it.
        redelivered: Whether somebody had it in hand before.
    """

    tag: str
    envelope: dict[str, Any]
    redelivered: bool


class RedisLists:
    """The lists of one server, for one thread.

    Args:
        client: The server.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._take_script = client.register_script(_TAKE)
        self._give_back_script = client.register_script(_GIVE_BACK)
        self._hold_script = client.register_script(_HOLD)
        self._waiter: _Waiter | None = None
        self._lay: set[bytes] = set()

    def receive(self, queue: str, most: int) -> list[Taken]:
        """Take up to ``most`` messages of a queue, always the same; wait a moment for the first."""
        waiter = self._waiter = self._waiter or _Waiter(self._client, queue)
        if not waiter.waits:
            if taken := self._take(queue, most):
                return taken
            waiter.begin()
        landed = waiter.look(_GLANCE_S)
        return self._take(queue, most, landed) if landed else []

    def _take(self, queue: str, most: int, landed: bytes = b"") -> list[Taken]:
        keys = (queue, _LANDING, _TAKEN, _INDEX)
        found = self._take_script(keys, (landed, f"{uuid4().hex}-", min(most, _MOST)))
        return [_read(tag, raw) for tag, raw in zip(found[::2], found[1::2], strict=True)]

    def ack(self, tag: str) -> None:
        """Forget a message in hand; one that is not is fine."""
        with self._client.pipeline() as pipe:
            pipe.zrem(_INDEX, tag)
            pipe.hdel(_TAKEN, tag)
            pipe.execute()

    def hold(self, tags: list[str]) -> None:
        """Start the visibility time of messages in hand anew."""
        if tags:
            self._hold_script((_INDEX,), tags)

    def give_back(self, tags: Iterable[str]) -> None:
        """Put messages in hand back to where they came from, marked."""
        self._give_back_script((_TAKEN, _INDEX), (_MARK, -1, *tags))

    def restore(self, visibility_s: float) -> None:
        """Put back what others had in hand and have not held for so long, and what lies about.

        What lies in the landing at two calls in a row, its taker died with. Should the taker be
        slow instead, it finds the message gone from there, and takes another one.
        """
        self._give_back_script((_TAKEN, _INDEX), (_MARK, visibility_s))
        lies = set(self._client.lrange(_LANDING, 0, -1))
        for raw in lies & self._lay:
            self._put_down(raw)
        self._lay = lies

    def _put_down(self, raw: bytes) -> None:
        """Move a message from the landing back to its list, unmarked: nobody has seen it."""
        queue = json.loads(raw)["properties"]["delivery_info"]["routing_key"]
        self._take(queue, 0, raw)

    def close(self) -> None:
        """Wait no more; the connection itself is another one's."""
        if self._waiter is not None and (landed := self._waiter.end()):
            self._put_down(landed)


class _Waiter:
    """A connection that waits until a list has a message, and has it moved to the landing."""

    def __init__(self, client: Any, queue: str) -> None:
        self.waits = False
        self._client, self._queue = client, queue
        own: Any = redis.Redis
        self._own = own(connection_pool=client.connection_pool, single_connection_client=True)
        self._id = int(self._own.client_id())
        self._until = 0.0

    def begin(self) -> None:
        """Ask the server."""
        command = ("BLMOVE", self._queue, _LANDING, "RIGHT", "LEFT", _WAIT_S)
        self._own.connection.send_command(*command)
        self._until = time.monotonic() + _WAIT_S + _PATIENCE_S
        self.waits = True

    def look(self, timeout_s: float) -> bytes | None:
        """What has landed; None if nothing has, be it that we still wait or not."""
        self.waits = False  # a connection that fails brings no answer any more
        if self._own.connection.can_read(timeout_s):
            return self._answer()
        if time.monotonic() > self._until:
            raise redis.TimeoutError("no answer")
        self.waits = True
        return None

    def end(self) -> bytes | None:
        """Wait no more; what has landed meanwhile."""
        if not self.waits:
            return None
        self.waits = False
        self._client.client_unblock(self._id)
        return self._answer()

    def _answer(self) -> bytes | None:
        answer: bytes | None = self._own.connection.read_response()
        return answer


def _read(tag: bytes, raw: bytes) -> Taken:
    return Taken(tag.decode(), json.loads(raw), raw.startswith(_MARK.encode()))
