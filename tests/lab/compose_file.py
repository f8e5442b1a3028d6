"""``docker-compose.yml`` as an engine reads it: variables filled in, services as records."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ROOT", "ComposeFile", "Service", "read_env_file"]

ROOT = Path(__file__).parents[2]
"""The repository, from whose root everything is built."""

_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?:(:[-?])([^}]*))?\})")


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a ``.env`` file."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    pairs = (line.partition("=") for line in lines)
    return {name: value.strip("'") for name, _, value in pairs}


@dataclass(frozen=True)
class Service:
    """One service, with its settings as they stand in the file."""

    name: str
    settings: Mapping[str, Any]

    @property
    def image(self) -> str:
        """What it runs."""
        return str(self.settings["image"])

    @property
    def dockerfile(self) -> Path | None:
        """What its image is built by; None if it is somebody else's."""
        build = self.settings.get("build")
        return ROOT / build["dockerfile"] if build else None

    @property
    def build_arguments(self) -> dict[str, str]:
        """With what its image is built."""
        return dict(self.settings.get("build", {}).get("args", {}))

    @property
    def command(self) -> list[str]:
        """What it runs instead of the image's own command; empty for that one."""
        command = self.settings.get("command", [])
        return shlex.split(command) if isinstance(command, str) else list(command)

    @property
    def needs(self) -> dict[str, str]:
        """The services it starts after, with the condition for each."""
        after: Mapping[str, Any] = self.settings.get("depends_on", {})
        return {name: how["condition"] for name, how in after.items()}

    @property
    def health_check(self) -> list[str] | None:
        """The command that says inside whether it is well."""
        check = self.settings.get("healthcheck")
        if check is None:
            return None
        kind, *words = check["test"]
        return ["sh", "-c", *words] if kind == "CMD-SHELL" else words

    @property
    def replicas(self) -> int:
        """How many of them run."""
        return int(self.settings.get("deploy", {}).get("replicas", 1))

    @property
    def limits(self) -> dict[str, str]:
        """``cpus`` and ``memory``, as far as they are limited."""
        return dict(self.settings.get("deploy", {}).get("resources", {}).get("limits", {}))


class ComposeFile:
    """The services of the file, in an order in which they can start.

    Args:
        variables: What the file's variables stand for.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        text = (ROOT / "docker-compose.yml").read_text()
        self._variables = variables
        self.content: dict[str, Any] = self._filled(yaml.safe_load(text))
        self.services: dict[str, Service] = {}
        waiting = dict(self.content["services"])
        while waiting:
            ready = [
                Service(name, settings)
                for name, settings in waiting.items()
                if set(settings.get("depends_on", {})) <= set(self.services)
            ]
            assert ready, f"services wait for each other: {', '.join(waiting)}"
            for service in ready:
                self.services[service.name] = service
                del waiting[service.name]

    def _filled(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._filled(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._filled(part) for part in value]
        return _VARIABLE.sub(self._value, value) if isinstance(value, str) else value

    def _value(self, match: re.Match[str]) -> str:
        name, how, rest = match.groups()
        if name is None:
            return "$"
        if value := self._variables.get(name):
            return value
        assert how != ":?", f"{name}: {rest}"
        return rest or ""
