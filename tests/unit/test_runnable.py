"""Runnables: secrets, the safe context, and how extensions travel."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.runnable.execute import Flags, run
from flame.runnable.extensions import locate_extensions, unpack
from flame.runnable.secrets import find_secrets
from flame_broker.errors import ConfigError

HELLO = (
    "from flame.runnable import Runnable\nclass Hello(Runnable):\n    def run(self): print('hi')\n"
)


class Greeter(flame.Runnable):
    """Notes what it was run with."""

    def run(self, **kwargs: Any) -> object:
        return kwargs


# --- secrets -------------------------------------------------------------------------------------


def test_secrets_are_read_into_config(tmp_path: Path) -> None:
    file = tmp_path / "secrets.ini"
    file.write_text("[AWS]\nTOKEN = 50%-off;yes\n")
    greeter = Greeter()
    greeter.inject_secrets(str(file))
    assert greeter.config["AWS"]["TOKEN"] == "50%-off;yes"


def test_the_default_file_is_used_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_HOME", str(tmp_path))
    assert find_secrets(None) == ""
    (tmp_path / "secrets.ini").write_text("[A]\nB = 1\n")
    assert find_secrets(None) == "[A]\nB = 1\n"


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        find_secrets(str(tmp_path / "none.ini"))


@pytest.mark.parametrize(
    ("text", "line"),
    [("hunter2\n", 1), ("[A]\nB = 1\nhunter2\n", 3), ("[A]\nB = hunter2\nB = hunter2\n", 3)],
)
def test_a_broken_file_is_named_by_line_and_nothing_of_it_shows(
    tmp_path: Path, text: str, line: int
) -> None:
    file = tmp_path / "secrets.ini"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"line {line}") as caught:
        find_secrets(str(file))
    problem: BaseException | None = caught.value
    assert "hunter2" not in str(problem)
    assert problem.__suppress_context__


# --- running -------------------------------------------------------------------------------------


def test_run_gets_the_flags_that_it_takes() -> None:
    seen: list[dict[str, Any]] = []

    class Choosy(flame.Runnable):
        def run(self, force: bool = False) -> None:  # type: ignore[override]
            seen.append({"force": force})

    class Greedy(flame.Runnable):
        def run(self, **kwargs: Any) -> None:
            seen.append(kwargs)

    for made in (Choosy(), Greedy()):
        run(made, Flags(force=True))
    assert seen == [{"force": True}, {"force": True, "verbose": False, "debug": False}]


def test_the_user_provider_says_who_runs_it() -> None:
    assert Greeter(user_provider=lambda: "ada").user_provider() == "ada"
    assert Greeter().user_provider()


def test_a_runnable_needs_a_run() -> None:
    class Nothing(flame.Runnable):
        pass

    with pytest.raises(TypeError, match="run"):
        Nothing()  # type: ignore[abstract]


# --- the safe context ----------------------------------------------------------------------------


def test_the_context_turns_an_error_into_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("!nothing.Here {}\n")
    with flame.SafeExecutionContext(str(file)) as context:
        context.preprocess()
        raise AssertionError("not reached")
    assert "unknown tag !nothing.Here" in capsys.readouterr().err
    assert isinstance(context.error, ConfigError)


def test_the_context_explains_any_exception_and_lets_an_interrupt_through(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with flame.SafeExecutionContext("job.yaml"):
        raise ZeroDivisionError("of mine")
    assert "ZeroDivisionError: of mine" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), flame.SafeExecutionContext("job.yaml"):
        raise KeyboardInterrupt


# --- extensions on their way ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["file", "folder", "src", "package", "renamed"])
def test_a_local_extension_arrives_under_its_name(tmp_path: Path, layout: str) -> None:
    there = tmp_path / "there"
    places = {
        "file": ("hello.py", "hello.py"),
        "folder": ("hello.py", "."),
        "src": ("src/hello/__init__.py", "."),
        "package": ("hello/__init__.py", "hello"),
        "renamed": ("other/__init__.py", "other"),
    }
    source, location = places[layout]
    file = there / source
    file.parent.mkdir(parents=True)
    file.write_text(HELLO)
    [extension] = locate_extensions({"hello": location}, there)
    packed = extension.pack()
    assert packed is not None
    [arrived] = unpack([packed], tmp_path / "here")
    entry = arrived.entry
    assert entry is not None
    assert entry.stem == "hello"
    assert (entry if entry.is_file() else entry / "__init__.py").read_text() == HELLO


def test_what_does_not_belong_to_an_extension_stays_here(tmp_path: Path) -> None:
    for name in ("hello.py", "data.csv", ".git/config", "__pycache__/x.pyc", "venv/pyvenv.cfg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    [extension] = locate_extensions({"hello": "."}, tmp_path)
    packed = extension.pack()
    assert packed is not None
    assert zipfile.ZipFile(BytesIO(packed.blob)).namelist() == ["data.csv", "hello.py"]


def test_the_same_files_make_the_same_zip(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(HELLO)
    [extension] = locate_extensions({"hello": "hello.py"}, tmp_path)
    first, again = extension.pack(), extension.pack()
    assert first is not None
    assert again is not None
    assert first.sha256 == again.sha256


def test_an_installed_extension_does_not_travel(tmp_path: Path) -> None:
    [extension] = locate_extensions({"json": "json"}, tmp_path)
    assert extension.pack() is None
