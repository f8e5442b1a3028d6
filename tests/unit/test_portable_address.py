from __future__ import annotations

import pytest

from flame_broker.errors import ConfigError
from flame_broker.portable.address import PortableAddress


def test_one_url_for_each_host_with_login_and_path() -> None:
    address = PortableAddress.parse("redis://me:pw@one;two:6380/3?visibility_s=5", ["visibility_s"])
    assert address.urls == ("redis://me:pw@one/3", "redis://me:pw@two:6380/3")
    assert address.options == {"visibility_s": "5"}


def test_the_password_is_never_shown() -> None:
    address = PortableAddress.parse("redis://me:hunter2@one/0", [])
    assert "hunter2" not in repr(address)
    assert "hunter2" not in address.masked


def test_unknown_options_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'colour'; known are region, wait_s"):
        PortableAddress.parse("sqs://k:s@host/?colour=red", ["region", "wait_s"])


def test_seconds_have_a_default_and_a_minimum() -> None:
    address = PortableAddress.parse("redis://one/0?a=2.5&b=-1&c=soon&d=nan", list("abcd"))
    assert address.seconds("a", 60, minimum=1) == 2.5
    assert address.seconds("missing", 60, minimum=1) == 60
    for name in "bcd":
        with pytest.raises(ConfigError, match=name):
            address.seconds(name, 60, minimum=1)
