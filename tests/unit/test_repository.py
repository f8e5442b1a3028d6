"""Rules of the repository that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPONENT_ROOTS = ("broker", "worker", "client", "infra")
MAX_MODULE_LINES = 500
MAX_BROAD_EXCEPTS_PER_1000_LINES = 0.3
MAX_P90_FUNCTION_LINES = 20


def committed() -> list[Path]:
    """Every file of the repository that is not ignored, whether committed yet or not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def modules() -> list[Path]:
    """Every module of Flame itself."""
    return [path for root in COMPONENT_ROOTS for path in sorted((ROOT / root).rglob("*.py"))]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in committed():
        try:
            found.append((path.relative_to(ROOT), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # a picture
    return found


@pytest.mark.parametrize("root", COMPONENT_ROOTS)
def test_a_component_root_holds_packages_only(root: str) -> None:
    assert not list((ROOT / root).glob("*.py"))


def test_every_package_is_built_into_the_wheel_and_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    built = set(settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    present = {
        str(package.parent.relative_to(ROOT))
        for root in COMPONENT_ROOTS
        for package in (ROOT / root).glob("*/__init__.py")
    }
    assert built == present
    assert all((ROOT / package / "py.typed").exists() for package in present)


def test_no_module_is_longer_than_its_limit() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in modules()}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_MODULE_LINES} == {}


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert [path for path in modules() if path.stem in drawers] == []


def test_functions_are_short() -> None:
    lengths = sorted(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert lengths[int(len(lengths) * 0.9)] <= MAX_P90_FUNCTION_LINES


def broad_excepts(path: Path) -> list[int]:
    """Lines of handlers that catch everything and do not raise it again."""
    handlers = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
    ]
    return [
        handler.lineno
        for handler in handlers
        if _catches_everything(handler) and not _raises_again(handler)
    ]


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"})
        for kind in kinds
    )


def _raises_again(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise)


def test_broad_excepts_are_rare_and_each_says_why() -> None:
    broad, unexplained, lines = [], [], 0
    for path in modules():
        source = path.read_text().splitlines()
        lines += len(source)
        for number in broad_excepts(path):
            broad.append(f"{path.relative_to(ROOT)}:{number}")
            remark = source[number - 1].partition("#")[2].replace("noqa: BLE001", "")
            above = source[number - 2].lstrip().startswith("#")
            if not above and not re.search(r"\w+ \w+", remark):
                unexplained.append(broad[-1])
    assert unexplained == [], "say beside it why everything is caught there"
    allowed = max(1, round(MAX_BROAD_EXCEPTS_PER_1000_LINES * lines / 1000))
    assert len(broad) <= allowed, broad


def test_no_file_names_a_package_index_or_a_place_on_somebodys_machine() -> None:
    # Spelled in parts, or this file would name them.
    hosts = ["pypi" + r"\.org", "pythonhosted" + r"\.org", "docker" + r"\.io", "ghcr" + r"\.io"]
    places = [r"/ho" + r"me/\w+/", "/ro" + "ot/", "/work" + "/main", "/Us" + r"ers/\w+/"]
    options = ["--" + "index-url", "--extra-" + "index-url", "--" + "find-links"]
    forbidden = re.compile("|".join([*hosts, *places, *options]))
    offenders = {
        str(path): match.group() for path, text in texts() if (match := forbidden.search(text))
    }
    assert offenders == {}


def test_no_file_holds_a_note_to_oneself() -> None:
    note = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    assert [str(path) for path, text in texts() if note.search(text)] == []


@pytest.mark.parametrize("name", ["base", "examples", "dev", "bench"])
def test_compiled_requirements_pin_everything(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert pins
    assert all(re.match(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==\S+", pin) for pin in pins)


def test_every_dependency_is_in_the_compiled_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in project["dependencies"]}
    compiled = (ROOT / "requirements" / "base.txt").read_text().lower()
    pinned = {line.partition("==")[0] for line in compiled.splitlines()}
    assert wanted <= pinned


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
