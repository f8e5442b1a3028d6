"""The frame of the ``flame`` command: lazy commands, exit codes, tables and settings."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import MagicMock

import pytest
import typer

from flame_broker import errors
from flame_broker.keys import Key, generate_key
from flame_broker.resources import ResourceRequirement
from flame_cli import connecting, exits, workers
from flame_cli.commands import COMMANDS, Command
from flame_cli.main import main
from flame_cli.tables import Column, show_json, show_record, show_table
from lab.wait import wait_until

RunFlame = Callable[..., int]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("FLAME_", "_FLAME_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLAME_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def flame(*words: str) -> int:
    """Runs the command line in this process; its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds a command to ``flame``: a function, or an error that it raises."""

    def add(name: str, run: Callable[..., Any] | BaseException) -> None:
        def fail() -> None:
            """Fails."""
            assert isinstance(run, BaseException)
            raise run

        module = types.ModuleType("probe_command")
        module.command = run if callable(run) else fail  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(COMMANDS, name, Command("probe_command:command", "Probes."))

    return add


# --- the frame ---------------------------------------------------------------------------------


def test_every_command_of_the_table_imports_and_has_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert flame("--help") == exits.DONE
    overview = capsys.readouterr().out
    assert "flame run FILE.yaml" in overview
    assert "flame FILE.yaml" in overview
    for name, command in COMMANDS.items():
        assert name in overview
        assert command.summary.endswith(".")
        assert flame(name, "--help") == exits.DONE
        assert "Usage: flame" in capsys.readouterr().out


def test_help_imports_no_command_and_nothing_heavy() -> None:
    heavy = {"flame", "pydantic", "yaml", "rich", "boto3", "pika", "asyncio", "flame_cli.config"}
    program = (
        "import sys\nfrom flame_cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"sys.stderr.write(' '.join(sorted({heavy} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert "Commands:" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [["ps"], ["ps", "--json"], ["show", "a-1"], ["queues"], ["workers", "--timeout", "0.1"]],
)
def test_commands_that_only_ask_load_nothing_that_makes_or_carries_calls(words: list[str]) -> None:
    heavy = {
        *("flame.client", "flame.courier", "flame.futures", "flame.packaging", "flame.values"),
        *("flame_broker.codec", "cloudpickle", "cryptography", "boto3"),
        *("pydantic", "yaml", "rich", "structlog", "importlib.metadata"),
    }
    program = (
        "import sys\nfrom flame_cli.main import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        f"sys.stdout.write(' '.join(sorted({heavy} & set(sys.modules))) + '|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FLAME_BROKER_URL": "memory://alone", "FLAME_KEY": generate_key()},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("|")
    assert done.stdout.rpartition("\n")[2] == "|"


def test_the_end_of_a_command_looks_for_no_garbage() -> None:
    program = (
        "import atexit, gc\nfrom flame_cli.main import main\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000))\nmain(['config', 'key'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.endswith("\nTrue\n")


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert flame("--version") == exits.DONE
    assert capsys.readouterr().out == f"flame {version('flame')}\n"


@pytest.mark.parametrize("words", [["confg"], ["config", "--nonsense"], ["config", "sho"]])
def test_wrong_usage_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert flame(*words) == exits.USAGE
    assert "Usage: flame" in capsys.readouterr().err


def test_a_misspelt_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    flame("confg")
    assert "config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["job.yaml"], ("job.yaml", None, False)),
        (["dir/job.yml", "-c", "cluster.yaml"], ("dir/job.yml", "cluster.yaml", False)),
        (["-v", "job.yaml"], ("job.yaml", None, True)),
        (["run", "job.yaml", "-v"], ("job.yaml", None, True)),
    ],
)
def test_a_yaml_file_alone_means_run(
    words: list[str], seen: tuple[object, ...], probe: Callable[..., None]
) -> None:
    calls = []

    def run(
        file: str,
        cluster: Annotated[str | None, typer.Option("-c")] = None,
        verbose: Annotated[bool, typer.Option("-v")] = False,
    ) -> None:
        calls.append((file, cluster, verbose))

    probe("run", run)
    assert flame(*words) == exits.DONE
    assert calls == [seen]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("what"), 22),
        (errors.ResourceError("what"), 22),
        (errors.BrokerUnavailable("what"), 69),
        (errors.StoreError("what"), 69),
        (errors.ObjectNotFound("what"), 1),
        (errors.RemoteError("what", "c-1", "ValueError"), 1),
        (errors.WorkerLost("what"), 1),
        (errors.FlameError("what"), 1),
    ],
)
def test_errors_end_with_the_code_of_the_contract_and_no_traceback(
    error: errors.FlameError,
    code: int,
    probe: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    probe("fail", error)
    assert flame("fail") == code
    out, err = capsys.readouterr()
    assert err.startswith("flame: error: ")
    assert "what" in err
    assert "Traceback" not in out + err


def test_an_interrupt_ends_with_130(probe: Callable[..., None]) -> None:
    probe("wait", KeyboardInterrupt())
    assert flame("wait") == exits.INTERRUPTED


def test_a_command_chooses_its_own_code(probe: Callable[..., None]) -> None:
    probe("fail", typer.Exit(exits.WORK_FAILED))
    assert flame("fail") == exits.WORK_FAILED


def test_a_mistake_of_ours_is_not_hidden(probe: Callable[..., None]) -> None:
    probe("fail", ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_program(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flame("completion", shell) == exits.DONE
    script = capsys.readouterr().out
    assert "_FLAME_COMPLETE" in script
    assert "flame" in script


@pytest.mark.parametrize(
    ("typed", "word", "expected"),
    [
        ("flame co", 1, "config"),
        ("flame config s", 2, "show"),
        ("flame config show --j", 3, "--json"),
    ],
)
def test_bash_completes_commands_and_options_of_lazy_commands(
    typed: str, word: int, expected: str
) -> None:
    program = "import sys; sys.argv[0] = 'flame'; from flame_cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "_FLAME_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(word),
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert expected in done.stdout.split()


# --- flame config ------------------------------------------------------------------------------


def test_config_shows_values_with_sources_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = generate_key()
    monkeypatch.setenv("FLAME_KEY", key)
    monkeypatch.setenv("FLAME_BROKER_URL", "amqp://ann:pa55word@broker.example/")
    for words in (
        ["config"],
        ["config", "show"],
        ["config", "show", "--json"],
        ["config", "--json"],
    ):
        assert flame(*words) == exits.DONE
        shown = capsys.readouterr().out
        assert "amqp://ann:***@broker.example/" in shown
        assert "FLAME_BROKER_URL" in shown
        assert Key.parse(key).hex_id in shown
        assert "pa55word" not in shown
        assert key not in shown
    assert json.loads(shown)["sources"]["key"] == "FLAME_KEY"


def test_showing_settings_makes_no_key_file(home: Path) -> None:
    assert flame("config") == exits.DONE
    assert not home.exists()


def test_config_key_prints_a_key_that_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert flame("config", "key") == exits.DONE
    assert len(Key.parse(capsys.readouterr().out).hex_id) == 8


def test_config_path_prints_the_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flame("config", "path") == exits.DONE
    assert capsys.readouterr().out == f"{home}/flame.yaml\n"


def test_a_broken_file_ends_with_22_and_its_place(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.mkdir()
    (home / "flame.yaml").write_text("contexts:\n- name: a\n  clutser: {}\n")
    assert flame("config") == exits.CONFIG_ERROR
    assert "flame.yaml, line 3" in capsys.readouterr().err


# --- tables ------------------------------------------------------------------------------------

ROWS = [
    {"name": "alpha", "calls": 5, "since": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "id": 1},
    {"name": "be\x1b[31mta\n", "calls": 1234, "since": None, "id": 2},
]
COLUMNS = (Column("name"), Column("calls", right=True), Column("since", "up since"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_in_a_pipe_is_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(ROWS, COLUMNS)
    assert capsys.readouterr().out.splitlines() == [
        "NAME       CALLS  UP SINCE",
        "alpha          5  2026-01-02 03:04:05Z",
        "be [31mta   1234  -",
    ]


def test_a_table_on_a_terminal_holds_the_same_and_no_control_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    show_table([*ROWS, {"name": "[bold]x[/bold]"}], COLUMNS)
    shown = terminal.getvalue()
    assert "alpha" in shown
    assert "[bold]x[/bold]" in shown
    assert "\x1b[31m" not in shown


def test_a_narrow_terminal_leaves_out_what_can_be_spared_and_breaks_no_id_or_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")  # no bold
    monkeypatch.setenv("COLUMNS", "80")
    started = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    row = {
        "worker": "node-17.an-example-abc123",
        "pool": "default",
        "host": "node-17.an-example",
        "slots": 16,
        "busy": 3,
        "gpus": 0,
        "started": started,
        "python": "3.11.12",
        "connected": True,
        "draining": False,
        "last_heartbeat": started,
        "silent_since": started,
    }
    show_table([row], workers._COLUMNS)
    header, line = terminal.getvalue().splitlines()
    assert header.split() == ["WORKER", "POOL", "SLOTS", "BUSY", "GPUS", "SILENT", "SINCE", "RUNS"]
    assert row["worker"] in line
    assert started.astimezone().strftime("%m-%d %H:%M") in line
    assert max(len(header.rstrip()), len(line.rstrip())) <= 80


def test_the_last_column_goes_on_in_the_next_line_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    show_table([{"id": "a" * 20, "text": "b" * 50}], (Column("id"), Column("text")))
    shown = terminal.getvalue()
    assert "a" * 20 in shown
    assert shown.count("b") == 50


def test_json_holds_every_key_and_times_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    east = datetime(2026, 1, 2, 5, 0, tzinfo=timezone(timedelta(hours=2)))
    show_table(
        [{"name": "a", "at": east, "for": timedelta(minutes=1), "id": 7}], COLUMNS, as_json=True
    )
    assert json.loads(capsys.readouterr().out) == [
        {"name": "a", "at": "2026-01-02T03:00:00Z", "for": 60.0, "id": 7}
    ]


def test_json_of_an_empty_list_is_an_empty_list(capsys: pytest.CaptureFixture[str]) -> None:
    show_table([], COLUMNS, as_json=True, empty="no workers")
    assert capsys.readouterr() == ("[]\n", "")
    show_table([], COLUMNS, empty="no workers")
    assert capsys.readouterr() == ("", "no workers\n")


def test_json_takes_the_values_that_records_hold(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"path": Path("/a"), "kinds": {"b", "a"}, "needs": ResourceRequirement(2)})
    assert json.loads(capsys.readouterr().out) == {
        "path": "/a",
        "kinds": ["a", "b"],
        "needs": {"cpu": 2, "mem_bytes": 0, "gpu": 0},
    }
    with pytest.raises(TypeError, match="no JSON form"):
        show_json(object())


def test_a_record_is_a_line_for_each_value(capsys: pytest.CaptureFixture[str]) -> None:
    show_record(
        {"name": "a", "gpus": [0, 1], "free": True, "load": 0.123456, "for": timedelta(0, 9)}
    )
    assert capsys.readouterr().out.splitlines() == [
        "name  a",
        "gpus  0, 1",
        "free  yes",
        "load  0.1235",
        "for   9 s",
    ]


# --- connecting --------------------------------------------------------------------------------


def test_who_waits_for_a_broker_at_a_terminal_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import flame as library

    terminal, client = Terminal(), MagicMock()

    def connect(*, context: str | None) -> MagicMock:
        assert context == "far"
        wait_until(lambda: "still trying" in terminal.getvalue(), 10, "a word")
        return client

    monkeypatch.setattr(library, "connect", connect)
    monkeypatch.setattr(connecting, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    with connecting.connected("far") as found:
        assert found is client
    client.__exit__.assert_called_once()
