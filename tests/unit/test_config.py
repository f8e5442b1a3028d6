"""Settings: the order they are looked up in, the key rule, and exact words for what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flame_broker.config import PackageSettings, load
from flame_broker.errors import ConfigError
from flame_broker.keys import Keyring, generate_key, load_key_file
from flame_broker.urls import broker_hosts, check_store_url, is_local_broker, mask_url

REMOTE = "amqp://ann:pa55word@broker.example/flame"
LOCAL = "amqp://ann:pa55word@127.0.0.1:5672/flame"

FULL = """\
current-context: factory
contexts:
  - name: laptop
  - name: factory
    cluster:
      endpoint: amqps://ann:pa55word@one.example;two.example:5671/flame?cacert=/etc/ca.pem
      key-file: factory.key
    cache:
      endpoint: s3://bucket/prefix?endpoint=https://s3.example
    package:
      storage: https://files.example/packages
      excludes: ["*.log", "data/"]
    runner:
      template: flmrun
"""

WriteConfig = Callable[[str], dict[str, str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def write(home: Path) -> WriteConfig:
    """Writes ``flame.yaml`` and gives the environment that finds it."""

    def write_text(text: str) -> dict[str, str]:
        (home / "flame.yaml").write_text(text)
        return {"FLAME_HOME": str(home)}

    return write_text


# --- the order ---------------------------------------------------------------------------------


def test_with_nothing_configured_the_embedded_default_holds(home: Path) -> None:
    settings = load(environ={"FLAME_HOME": str(home)})
    assert settings.broker_url is None
    assert settings.local
    assert settings.store_url == f"file://{home}/store"
    assert settings.package == PackageSettings()
    assert (settings.context, settings.file, settings.template) == (None, None, None)
    assert settings.sources == {"store": "default", "key": "default"}


def test_home_is_in_the_users_folder_unless_set() -> None:
    assert load(environ={"FLAME_CONFIG": ""}).home == Path.home() / ".flame"
    assert load(environ={"FLAME_HOME": "~/elsewhere"}).home == Path.home() / "elsewhere"


def test_the_whole_file_is_read(home: Path, write: WriteConfig) -> None:
    settings = load(environ=write(FULL))
    assert settings.context == "factory"
    assert settings.file == home / "flame.yaml"
    assert settings.broker_url is not None
    assert broker_hosts(settings.broker_url) == [("one.example", None), ("two.example", 5671)]
    assert settings.store_url == "s3://bucket/prefix?endpoint=https://s3.example"
    assert settings.key_file == home / "factory.key"
    assert settings.package == PackageSettings("https://files.example/packages", ("*.log", "data/"))
    assert settings.template == "flmrun"
    assert settings.sources["broker"] == f"{home}/flame.yaml, context 'factory'"


def test_argument_beats_environment_beats_file_each_for_itself(write: WriteConfig) -> None:
    environ = write(FULL)
    key = generate_key()
    environ |= {"FLAME_BROKER_URL": REMOTE, "FLAME_KEY": key, "FLAME_DATABASE_URL": "sqlite:///x"}
    settings = load(store="s3://argument", environ=environ)
    assert settings.store_url == "s3://argument"
    assert settings.broker_url == REMOTE
    assert settings.keyring.ids == Keyring.parse(key).ids
    assert settings.database_url == "sqlite:///x"
    assert settings.template == "flmrun"
    assert settings.sources == {
        "store": "argument",
        "broker": "FLAME_BROKER_URL",
        "key": "FLAME_KEY",
        "database": "FLAME_DATABASE_URL",
    }
    assert load(broker="memory://mine", environ=environ).broker_url == "memory://mine"


def test_an_empty_variable_counts_as_unset(home: Path) -> None:
    environ = dict.fromkeys(
        ("FLAME_BROKER_URL", "FLAME_STORE_URL", "FLAME_KEY", "FLAME_KEY_FILE"), ""
    )
    settings = load(environ={**environ, "FLAME_HOME": str(home)})
    assert (settings.broker_url, settings.sources) == (None, {"store": "default", "key": "default"})


def test_a_context_is_chosen_by_argument(write: WriteConfig) -> None:
    settings = load(context="laptop", environ=write(FULL))
    assert (settings.context, settings.broker_url) == ("laptop", None)


def test_the_only_context_needs_no_current_context(write: WriteConfig) -> None:
    assert load(environ=write("contexts: [{name: only}]")).context == "only"


def test_another_file_is_named_by_flame_config(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("contexts: [{name: other}]")
    assert load(environ={"FLAME_CONFIG": str(path)}).context == "other"


# --- keys and stores ---------------------------------------------------------------------------


@pytest.mark.parametrize("broker", [None, "memory://x", LOCAL, "redis://[::1]:6379/0", "redis://"])
def test_a_broker_on_this_machine_gets_a_private_key_file(home: Path, broker: str | None) -> None:
    settings = load(broker=broker, environ={"FLAME_HOME": str(home)})
    assert not (home / "key").exists()  # not before it is asked for
    assert settings.keyring.ids == load_key_file(home / "key").ids
    assert (home / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "broker", [REMOTE, "amqp://127.0.0.1;elsewhere", "sqs://", "amqp://127.evil.example"]
)
def test_a_broker_elsewhere_needs_a_key_that_is_configured(home: Path, broker: str) -> None:
    settings = load(broker=broker, environ={"FLAME_HOME": str(home)})
    with pytest.raises(ConfigError, match="flame config key") as caught:
        _ = settings.keyring
    assert "pa55word" not in str(caught.value)
    assert not (home / "key").exists()


def test_a_key_comes_from_the_named_file(home: Path) -> None:
    path = home / "mine"
    path.write_text(generate_key())
    path.chmod(0o600)
    environ = {"FLAME_HOME": str(home), "FLAME_KEY_FILE": str(path)}
    assert load(broker=REMOTE, environ=environ).keyring.ids == load_key_file(path).ids


def test_a_short_key_names_the_variable_and_hides_the_key(home: Path) -> None:
    settings = load(environ={"FLAME_HOME": str(home), "FLAME_KEY": "hunter2"})
    with pytest.raises(ConfigError, match=r"FLAME_KEY: .*32") as caught:
        _ = settings.keyring
    assert "hunter2" not in str(caught.value)


def test_a_remote_broker_without_a_store_says_so_at_first_need(home: Path) -> None:
    settings = load(broker=REMOTE, environ={"FLAME_HOME": str(home)})
    assert settings.store_url is None
    with pytest.raises(ConfigError, match="FLAME_STORE_URL"):
        settings.require_store()
    assert load(broker=LOCAL, environ={"FLAME_HOME": str(home)}).require_store().startswith("file:")


def test_settings_print_neither_key_nor_password(write: WriteConfig) -> None:
    key = generate_key()
    settings = load(key=key, environ=write(FULL))
    shown = repr(settings) + repr(settings.keyring)
    assert "one.example" in shown
    assert "pa55word" not in shown
    assert key not in shown


# --- what is wrong, and where ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("contexts:\n  - name: a\n    clutser: {}\n", 3, r"contexts\[0\]\.clutser.*mean 'cluster'"),
        ("contexts:\n  - name: a\n    cluster:\n      endpont: x\n", 4, "mean 'endpoint'"),
        ("contexts:\n  - name: a\n    cluster:\n      key_file: x\n", 4, "mean 'key-file'"),
        ("contexts:\n  - name: a\n    zzz: 1\n", 3, "expected one of name, cluster"),
        (
            "contexts:\n- name: a\n  cluster:\n    endpoint: http://127.0.0.1:8080\n",
            4,
            r"contexts\[0\]\.cluster\.endpoint: expected .*amqp.*found 'http://127.0.0.1:8080'",
        ),
        (
            "contexts:\n- name: a\n  cache:\n    endpoint: grpc://127.0.0.1:9090\n",
            4,
            r"cache\.endpoint: expected .*s3://.*found 'grpc:",
        ),
        ("contexts:\n- name: a\n  package: {excludes: '*.log'}\n", 3, "valid list, found"),
        ("contexts:\n- cluster: {}\n", 2, r"contexts\[0\]\.name: is missing"),
        ("contexts:\n- name: 5\n", 2, r"valid string, found 5"),
        ("contexts: []\n", 1, "at least 1 item"),
        ("current-context: b\ncontexts:\n- name: a\n", 1, "no context 'b'"),
        ("contexts:\n- name: a\n- name: b\n", 1, "current-context is needed"),
        ("contexts:\n- name: a\n- name: a\n", 3, "'a' is taken"),
        ("contexts:\n- name: a\n  name: b\n", 3, "'name' stands twice"),
        ("contexts:\n- name: a\n  cluster: 5\n", 3, "expected keys and values, found 5"),
        ("contexts: [\n  {name: a},\n", 3, "expected"),
        ("contexts:\n\t- name: a\n", 2, "cannot start any token"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_file_line_and_remedy(
    home: Path, write: WriteConfig, text: str, line: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load(environ=write(text))
    assert f"{home}/flame.yaml, line {line}, column " in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "just text", "[1, 2]", "? {a: 1}\n: b\n", "a: !!python/none\n"]
)
def test_a_file_of_another_shape_is_a_config_error(write: WriteConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=r"flame\.yaml"):
        load(environ=write(text))


def test_all_mistakes_are_told_at_once(write: WriteConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ=write("contexts:\n- name: a\n  one: 1\n  two: 2\n"))
    assert len(str(caught.value).splitlines()) == 2


def test_a_password_in_a_wrong_url_is_not_told(write: WriteConfig) -> None:
    text = "contexts: [{name: a, cluster: {endpoint: 'http://ann:pa55word@h/'}}]"
    with pytest.raises(ConfigError) as caught:
        load(environ=write(text))
    assert "pa55word" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: \x01"])
def test_a_file_that_is_no_text_is_a_config_error(home: Path, content: bytes) -> None:
    (home / "flame.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"flame\.yaml"):
        load(environ={"FLAME_HOME": str(home)})


def test_a_missing_file_or_context_is_told(home: Path, write: WriteConfig) -> None:
    with pytest.raises(ConfigError, match="FLAME_CONFIG: there is no file"):
        load(environ={"FLAME_CONFIG": str(home / "absent.yaml")})
    with pytest.raises(ConfigError, match="no settings file"):
        load(context="x", environ={"FLAME_HOME": str(home)})
    with pytest.raises(ConfigError, match="mean 'factory'"):
        load(context="factry", environ=write(FULL))


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FLAME_BROKER_URL", "localhost", "amqp://"),
        ("FLAME_BROKER_URL", "http://localhost", "schemes: amqp"),
        ("FLAME_BROKER_URL", "amqp://", "no host in 'amqp://'"),
        ("FLAME_BROKER_URL", "amqp://host:port", "host:port"),
        ("FLAME_BROKER_URL", "amqp://host:99999", "host:port"),
        ("FLAME_STORE_URL", "bucket", "s3://"),
        ("FLAME_STORE_URL", "s3:///prefix", "s3://bucket"),
        ("FLAME_STORE_URL", "file://relative/path", "file:///"),
        ("FLAME_DATABASE_URL", "mysql://x", "postgresql"),
    ],
)
def test_a_wrong_url_names_its_variable_and_what_was_expected(
    home: Path, variable: str, value: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{variable}: .*{expected}"):
        load(environ={"FLAME_HOME": str(home), variable: value})


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "postgres", "sqlite"])
def test_a_database_url_may_name_its_driver(home: Path, scheme: str) -> None:
    url = f"{scheme}://flame@host/name"
    found = load(environ={"FLAME_HOME": str(home), "FLAME_DATABASE_URL": url})
    assert found.database_url == url


def test_a_wrong_argument_is_named() -> None:
    with pytest.raises(ConfigError, match=r"broker \(argument\): expected"):
        load(broker="", environ={})


# --- URLs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("amqp://ann:secret@h:5672/v?x=1", "amqp://ann:***@h:5672/v?x=1"),
        ("amqp://ann:se:cr/et@x@h/", "amqp://ann:***@h/"),
        ("amqp://a:one@h1;b:two@h2:1/", "amqp://a:***@h1;b:***@h2:1/"),
        ("redis://:secret@h", "redis://:***@h"),
        ("s3://bucket/p?secret_key=abc&region=x", "s3://bucket/p?secret_key=***&region=x"),
        ("amqp://h:5672/;x", "amqp://h:5672/;x"),
        ("memory://", "memory://"),
    ],
)
def test_masking_hides_what_is_secret_and_nothing_else(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("memory://x", True),
        ("amqp://localhost", True),
        ("amqp://u:p@127.0.0.1;[::1]:1/", True),
        ("amqp://broker.localhost", True),
        ("amqp://localhost;h2", False),
        ("amqp://127.0.0.1.example", False),
        ("amqp://notlocalhost", False),
        ("sqs://k:s@127.0.0.1:5000/?is_secure=0", True),
    ],
)
def test_local_means_this_machine_for_every_host(url: str, local: bool) -> None:
    assert is_local_broker(url) is local


def test_a_file_store_is_an_absolute_path() -> None:
    assert check_store_url("file:///var/lib/flame") == "file:///var/lib/flame"


def test_the_default_needs_neither_pydantic_nor_yaml(home: Path) -> None:
    program = (
        "import sys; from flame_broker.config import load; load().keyring;"
        "sys.exit(sorted({'pydantic', 'yaml', 'cryptography', 'asyncio'} & set(sys.modules)) or 0)"
    )
    environ = {"PATH": os.environ["PATH"], "FLAME_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, timeout=30, check=False)
    assert done.returncode == 0
