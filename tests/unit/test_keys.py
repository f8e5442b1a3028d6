"""Cluster keys: derivation, rotation, and files that nobody else may read."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from flame_broker.errors import ConfigError
from flame_broker.keys import (
    Key,
    Keyring,
    ensure_key_file,
    generate_key,
    hkdf_sha256,
    load_key_file,
)

SECRET = "correct-horse-battery-staple-0123456789"


@pytest.mark.parametrize(
    ("secret", "salt", "info", "length", "expected"),
    [
        pytest.param(
            bytes([0x0B] * 22),
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            42,
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
            id="rfc5869-1",
        ),
        pytest.param(
            bytes(range(0x50)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            82,
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
            "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
            "cc30c58179ec3e87c14c01d5c1f3434f1d87",
            id="rfc5869-2",
        ),
        pytest.param(
            bytes([0x0B] * 22),
            b"",
            b"",
            42,
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
            id="rfc5869-3",
        ),
    ],
)
def test_hkdf_gives_the_vectors_of_rfc_5869(
    secret: bytes, salt: bytes, info: bytes, length: int, expected: str
) -> None:
    assert hkdf_sha256(secret, salt=salt, info=info, length=length).hex() == expected


def test_derived_parts_are_stable_and_differ_from_each_other() -> None:
    key = Key.parse(SECRET)
    assert key == Key.parse(f"  {SECRET}\n")
    assert key.hex_id == key.id.hex() == "4c8f366a"
    assert len({key.signing, key.encryption, SECRET.encode()}) == 3
    assert not key.signing.startswith(key.id)
    assert not key.encryption.startswith(key.id)


def test_generated_keys_are_accepted_and_never_the_same() -> None:
    texts = {generate_key() for _ in range(50)}
    assert len(texts) == 50
    assert len({Key.parse(text).id for text in texts}) == 50
    assert all(len(text) == 43 for text in texts)


@pytest.mark.parametrize("text", ["", "short", "x" * 31])
def test_short_keys_are_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match="flame config key"):
        Key.parse(text)


def test_a_key_is_never_printed_nor_pickled() -> None:
    keyring = Keyring.parse(SECRET)
    shown = f"{keyring!r} {keyring.signer!r} {keyring.signer}"
    assert SECRET not in shown
    assert keyring.signer.signing.hex() not in shown
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(keyring)


def test_the_first_key_signs_and_all_are_found() -> None:
    first, second = generate_key(), generate_key()
    keyring = Keyring.parse(f"{first}, {second}")
    assert keyring.signer == Key.parse(first)
    assert list(keyring) == [Key.parse(first), Key.parse(second)]
    assert keyring.ids == (Key.parse(first).hex_id, Key.parse(second).hex_id)
    assert keyring.find(Key.parse(second).id) == Key.parse(second)
    assert keyring.find(b"none") is None


def test_a_key_named_twice_counts_once() -> None:
    assert len(Keyring.parse(f"{SECRET},{SECRET}")) == 1


def test_two_keys_with_one_id_are_refused() -> None:
    one, other = Key.parse(generate_key()), Key.parse(generate_key())
    other.id = one.id
    with pytest.raises(ConfigError, match="have the id"):
        Keyring([one, other])


def test_a_bad_key_among_several_is_named_by_place_not_by_content() -> None:
    with pytest.raises(ConfigError, match="key 2 of 2") as caught:
        Keyring.parse(f"{SECRET},tooshort")
    assert "tooshort" not in str(caught.value)


@pytest.mark.parametrize("text", ["", " , ,"])
def test_an_empty_keyring_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no key"):
        Keyring.parse(text)


def test_a_key_file_is_made_private_and_kept(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "home"
    path = ensure_key_file(home)
    assert path.stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    first = load_key_file(path)
    assert load_key_file(ensure_key_file(home)).ids == first.ids
    assert [entry.name for entry in home.iterdir()] == ["key"]


def test_racing_processes_get_the_same_key(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from flame_broker.keys import *;"
        "sys.stdin.readline();"
        "print(load_key_file(ensure_key_file(Path(sys.argv[1]))).ids[0])"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "home")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    ids = {racer.communicate(timeout=30)[0].strip() for racer in racers}
    assert len(ids) == 1
    assert len(ids.pop()) == 8


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_file_others_may_read_is_refused_with_the_command(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_text(SECRET)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        load_key_file(path)


def test_a_key_file_holds_several_keys_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first, second = generate_key(), generate_key()
    path.write_text(f"# the new one\n{first}\n\n# the old one, until March\n{second}\n")
    path.chmod(0o400)
    assert load_key_file(path).ids == Keyring.parse(f"{first},{second}").ids


def test_unreadable_key_files_say_which_and_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.*No such file"):
        load_key_file(tmp_path / "absent")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff" * 40)
    binary.chmod(0o600)
    with pytest.raises(ConfigError, match=r"binary.*not text"):
        load_key_file(binary)


def test_a_home_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="FLAME_KEY"):
        ensure_key_file(tmp_path / "file" / "home")
