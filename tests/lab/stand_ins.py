"""Images that stand in for the official ones, made of Debian's packages on this machine.

For machines that reach no registry of images: with them the Dockerfiles of ``infra/docker`` build,
and ``docker-compose.yml`` starts. RabbitMQ, PostgreSQL and Python are the real programs; the S3
server is a test double.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lab.compose_file import ROOT, ComposeFile
from lab.container_engine import CACHE, ContainerEngine
from lab.debian import DebianFolder, newer_rabbit
from lab.services import MissingService

__all__ = ["make_stand_ins", "python_version"]

_PYTHONS = {"3.11": "bookworm", "3.13": "trixie"}
"""Releases of Debian, by their Python."""

_RECIPES = Path(__file__).with_name("images")
_DOWNLOAD_TIMEOUT_S = 600


def python_version() -> str:
    """This Python's minor version, which workers must have too.

    Raises:
        MissingService: No release of Debian that we know brings it.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version not in _PYTHONS:
        raise MissingService(
            f"a base image with Python {version} cannot be made of Debian's packages: "
            f"run the tests with one of {', '.join(_PYTHONS)}"
        )
    return version


def make_stand_ins(engine: ContainerEngine, file: ComposeFile) -> None:
    """Make every image that the compose file and its Dockerfiles start from.

    Raises:
        MissingService: This machine cannot.
    """
    version = python_version()
    python = DebianFolder(_PYTHONS[version], ["python3", "python3-venv"]).make()
    engine.import_folder(python.path, "flame-lab-python")
    engine.import_folder(newer_rabbit().make().path, "flame-lab-rabbitmq")
    postgres = DebianFolder("trixie", ["postgresql"]).make()
    engine.import_folder(postgres.path, "flame-lab-postgres")
    with tempfile.TemporaryDirectory(prefix="flame-images-") as folder:
        context = Path(folder) / "context"
        shutil.copytree(_RECIPES, context)
        shutil.copytree(_wheels(version), context / "wheels")
        python_image = f"python:{version}-slim"
        for recipe, tag in {
            "python": python_image,
            "rabbitmq": _base(file, "rabbitmq"),
            "postgres": file.services["postgres"].image,
            "s3": _base(file, "s3"),
        }.items():
            dockerfile = context / f"{recipe}.Dockerfile"
            arguments = {"PYTHON_IMAGE": python_image} if recipe == "s3" else {}
            engine.build(tag, dockerfile, context, arguments)


def _base(file: ComposeFile, service: str) -> str:
    """What a service's Dockerfile starts from."""
    dockerfile = file.services[service].dockerfile
    assert dockerfile is not None
    first = next(line for line in dockerfile.read_text().splitlines() if line.startswith("FROM "))
    return first.split()[1]


def _wheels(version: str) -> Path:
    """A folder with the packages that the images need, fetched by this Python's own pip."""
    base, tests = (ROOT / "requirements" / name for name in ("base.txt", "dev.txt"))
    digest = hashlib.sha256(base.read_bytes() + tests.read_bytes()).hexdigest()[:12]
    folder = CACHE / f"wheels-{version}-{digest}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place) / "wheels"
        # Their markers would be judged by this Python; Debian's may be an older 3.11.
        pins = [line.partition(";")[0] for line in base.read_text().splitlines()]
        (Path(place) / "pins.txt").write_text("\n".join(pins))
        _pip_download(made, "--no-deps", f"--requirement={place}/pins.txt")
        _pip_download(made, f"--constraint={tests}", "hatchling", "moto[s3,server]")
        if not folder.exists():  # somebody else may have been faster
            made.rename(folder)
    return folder


def _pip_download(folder: Path, *words: str) -> None:
    options = ["--quiet", "--only-binary=:all:", f"--dest={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *words],
        capture_output=True,
        text=True,
        timeout=_DOWNLOAD_TIMEOUT_S,
    )
    if done.returncode:
        raise MissingService(f"pip cannot fetch what the images need: {done.stderr[-1000:]}")
