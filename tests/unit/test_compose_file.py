"""What ships for containers fits together, and fits what Flame asks of it."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flame_broker import topology
from flame_broker.keys import Key
from flame_broker.rabbit import RabbitAddress
from flame_broker.store import open_store
from flame_broker.transport import QueueKind, QueueSpec
from flame_broker.urls import check_database_url
from lab.compose_file import ROOT, ComposeFile, read_env_file

DOCKER = ROOT / "infra" / "docker"
KEY_ID = "0a0b0c0d"
QUEUES = [
    topology.calls_queue(KEY_ID, "default", "c1"),
    topology.suspects_queue(KEY_ID, "default"),
    topology.dead_queue(KEY_ID, "default"),
    topology.parked_queue(KEY_ID, "default"),
    topology.classes_queue(KEY_ID, "default"),
    topology.ledger_queue(KEY_ID),
    topology.custody_queue(KEY_ID),
    topology.questions_queue(KEY_ID),
    topology.reply_queue(KEY_ID, "client", 1),
    topology.control_queue(KEY_ID, "worker"),
    topology.logs_queue(KEY_ID, "client"),
]
EXCHANGES = [
    topology.calls_exchange(KEY_ID),
    topology.control_exchange(KEY_ID),
    topology.logs_exchange(KEY_ID),
]
# By its name a client reaches a queue that is bound to no exchange of ours.
DEFAULT_EXCHANGE = "amq.default"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ``tools/secrets`` makes."""
    path = tmp_path_factory.mktemp("secrets") / "env"
    subprocess.run([ROOT / "tools" / "secrets", path], check=True, capture_output=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return read_env_file(path)


@pytest.fixture(scope="module")
def file(secrets: dict[str, str]) -> ComposeFile:
    return ComposeFile(secrets)


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    return json.loads((DOCKER / "rabbitmq" / "definitions.json").read_text())  # type: ignore[no-any-return]


def environment(file: ComposeFile, service: str) -> dict[str, str]:
    return dict(file.services[service].settings["environment"])


def test_every_service_that_stays_says_whether_it_is_well(file: ComposeFile) -> None:
    staying = {name for name, each in file.services.items() if name != "bucket"}
    assert staying == {"rabbitmq", "s3", "postgres", "orchestrator", "worker"}
    assert {name for name in staying if file.services[name].health_check} == staying
    assert all(file.services[name].settings["restart"] == "unless-stopped" for name in staying)


def test_services_wait_for_what_they_need_until_it_is_well(file: ComposeFile) -> None:
    assert file.services["worker"].needs == {
        "rabbitmq": "service_healthy", "bucket": "service_completed_successfully",
    }  # fmt: skip
    assert set(file.services["orchestrator"].needs) == {"rabbitmq", "postgres"}
    for service in file.services.values():
        for name, condition in service.needs.items():
            can_be_healthy = file.services[name].health_check is not None
            assert can_be_healthy == (condition == "service_healthy"), (service.name, name)


def test_images_of_this_repository_are_built_here_and_never_fetched(file: ComposeFile) -> None:
    built = {each.image: each.dockerfile for each in file.services.values() if each.dockerfile}
    assert built == {
        "flame": DOCKER / "flame.Dockerfile",
        "flame-rabbitmq": DOCKER / "rabbitmq.Dockerfile",
        "flame-s3": DOCKER / "s3.Dockerfile",
    }
    for service in file.services.values():
        if service.image in built:
            assert service.settings["pull_policy"] == "build"
        else:
            assert re.fullmatch(r"\w+:\d[\w.]*", service.image), "a version is named"


def test_no_service_may_gain_rights_and_none_runs_as_root(file: ComposeFile) -> None:
    for service in file.services.values():
        assert service.settings["cap_drop"] == ["ALL"]
        assert service.settings["security_opt"] == ["no-new-privileges:true"]
        if service.dockerfile is None:
            assert service.settings["user"] not in {"root", "0"}
        else:
            users = re.findall(r"^USER (\S+)$", service.dockerfile.read_text(), re.MULTILINE)
            assert users, service.name
            assert users[-1] not in {"root", "0"}


def test_what_dockerfiles_copy_is_there_and_not_left_out() -> None:
    left_out = (ROOT / ".dockerignore").read_text().split()
    for dockerfile in DOCKER.glob("*.Dockerfile"):
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.MULTILINE):
            for source in line.split():
                assert (ROOT / source).exists(), f"{dockerfile.name}: {source}"
                assert source not in left_out


def test_every_volume_that_is_used_is_declared(file: ComposeFile) -> None:
    used = {
        mount.partition(":")[0]
        for service in file.services.values()
        for mount in service.settings.get("volumes", [])
    }
    assert used == set(file.content["volumes"])


def test_secrets_are_needed_and_never_the_same(secrets: dict[str, str]) -> None:
    Key.parse(secrets["FLAME_KEY"])
    names = [name for name in secrets if not name.endswith("_URL")]
    assert len({secrets[name] for name in names}) == len(names) == 4
    for name in names:
        with pytest.raises(AssertionError, match="run tools/secrets first"):
            ComposeFile({**secrets, name: ""})


def test_secrets_are_made_once(tmp_path: Path) -> None:
    path = tmp_path / "env"
    made = []
    for _ in range(2):
        subprocess.run([ROOT / "tools" / "secrets", path], check=True, capture_output=True)
        made.append(path.read_text())
    assert made[0] == made[1]


def test_programs_of_the_system_and_outside_log_in_alike(
    file: ComposeFile, secrets: dict[str, str], definitions: dict[str, Any]
) -> None:
    outside = RabbitAddress.parse(secrets["FLAME_BROKER_URL"])
    assert outside.hosts == (("127.0.0.1", 5672),)
    user, permissions = definitions["users"][0], definitions["permissions"][0]
    for service in ("worker", "orchestrator"):
        inside = RabbitAddress.parse(environment(file, service)["FLAME_BROKER_URL"])
        assert (inside.user, inside.password, inside.vhost) == (
            outside.user, outside.password, outside.vhost,
        )  # fmt: skip
        assert inside.hosts == (("rabbitmq", 5672),)
    assert (outside.user, outside.vhost) == (user["name"], permissions["vhost"])
    assert outside.password == environment(file, "rabbitmq")["FLAME_BROKER_PASSWORD"]
    assert environment(file, "worker")["FLAME_KEY"] == secrets["FLAME_KEY"]


def test_urls_of_store_and_database_are_ones_that_flame_takes(
    file: ComposeFile, secrets: dict[str, str]
) -> None:
    open_store(environment(file, "worker")["FLAME_STORE_URL"])
    open_store(secrets["FLAME_STORE_URL"])
    check_database_url(environment(file, "orchestrator")["FLAME_DATABASE_URL"])


def test_a_password_is_put_into_the_definitions_and_no_guest_is_made(
    definitions: dict[str, Any],
) -> None:
    assert [user["name"] for user in definitions["users"]] == ["flame"]
    assert definitions["users"][0]["password"] == "@password@"
    assert "administrator" not in definitions["users"][0]["tags"]
    start = (DOCKER / "rabbitmq" / "start").read_text()
    config = (DOCKER / "rabbitmq" / "rabbitmq.conf").read_text()
    (target,) = re.findall(r"^load_definitions = (\S+)$", config, re.MULTILINE)
    assert f's/@password@/$FLAME_BROKER_PASSWORD/" /etc/rabbitmq/flame.json >{target}' in start
    assert not re.search("^consumer_timeout", config, re.MULTILINE)


@pytest.mark.parametrize("password", ["", "a/b", "x y", "&"])
def test_a_password_that_would_not_fit_is_refused_with_the_remedy(password: str) -> None:
    done = subprocess.run(
        ["sh", DOCKER / "rabbitmq" / "start", "true"],
        env={"FLAME_BROKER_PASSWORD": password},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 22
    assert "tools/secrets makes one" in done.stderr


def test_the_files_for_tls_name_the_same_places(file: ComposeFile) -> None:
    added = yaml.safe_load((DOCKER / "tls.yml").read_text())["services"]
    assert set(added) <= set(file.services)
    certificates, config = (mount.split(":") for mount in added["rabbitmq"]["volumes"][0:2])
    settings = (ROOT / config[0]).read_text()
    named = re.findall(r"= (/\S+)/(\S+)$", settings, re.MULTILINE)
    assert {folder for folder, _ in named} == {certificates[-2]}
    assert all(name in certificates[1] for _, name in named)
    assert added["rabbitmq"]["ports"][0].endswith(f":{_port(settings)}")


def _port(settings: str) -> str:
    (port,) = re.findall(r"^listeners.ssl.default = (\d+)$", settings, re.MULTILINE)
    return port


def test_the_user_may_do_all_that_flame_does_and_no_more(definitions: dict[str, Any]) -> None:
    (granted,) = definitions["permissions"]
    names = [spec.name for spec in QUEUES] + EXCHANGES
    for right in ("configure", "write", "read"):
        assert all(re.search(granted[right], name) for name in names), right
        assert not re.search(granted[right], "somebody.else")
        assert not re.search(granted[right], "amq.topic")
    assert re.search(granted["write"], DEFAULT_EXCHANGE)


def test_policies_tune_and_change_nothing_that_flame_declares(definitions: dict[str, Any]) -> None:
    for policy in definitions["policies"]:
        concerned = [spec for spec in QUEUES if _applies(policy, spec)]
        assert concerned, policy["name"]
        for spec in concerned:
            declared = {name.removeprefix("x-") for name in spec.arguments}
            assert not declared & set(policy["definition"]), (policy["name"], spec.name)


def _applies(policy: dict[str, Any], spec: QueueSpec) -> bool:
    kinds = {
        "quorum_queues": {QueueKind.QUORUM},
        "classic_queues": {QueueKind.CLASSIC},
        "queues": set(QueueKind),
        "streams": {QueueKind.STREAM},
    }
    named = re.search(policy["pattern"], spec.name) is not None
    return named and not spec.exclusive and spec.kind in kinds[policy["apply-to"]]
