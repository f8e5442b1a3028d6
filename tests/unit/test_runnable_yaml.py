"""The YAML of a Runnable: what is accepted, and what each mistake is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flame.runnable import Runnable, SafeExecutionContext, TagError
from flame_broker.errors import ConfigError

EXTENSION = """
from flame.runnable import Runnable


class Part:
    def __init__(self, size=1):
        self.size = size

    @classmethod
    def large(cls, factor=1):
        return cls(100 * factor)

    def method(self):
        raise AssertionError("tags name no plain methods")


class Job(Runnable):
    def __init__(self, path: str, parts=(), extra=None):
        super().__init__()
        self.path, self.parts, self.extra = path, parts, extra

    def run(self, **kwargs):
        return self.path


class Bare(Runnable):
    def run(self, **kwargs):
        pass


class Picky(Runnable):
    def __init__(self, value):
        super().__init__()
        raise ValueError(f"{value} is bad")

    def run(self, **kwargs):
        pass


class Forgetful(Runnable):
    def __init__(self):
        pass

    def run(self, **kwargs):
        pass


def function():
    return Part()
"""

Preprocess = Callable[[str], tuple[Runnable, dict[str, str]]]


@pytest.fixture
def preprocess(tmp_path: Path) -> Iterator[Preprocess]:
    """Prepares YAML whose extension ``ext`` has the classes above."""
    (tmp_path / "ext.py").write_text(EXTENSION)
    contexts: list[SafeExecutionContext] = []

    def prepare(text: str) -> tuple[Runnable, dict[str, str]]:
        file = tmp_path / "job.yaml"
        file.write_text(text)
        contexts.append(SafeExecutionContext(str(file)))
        return contexts[-1].preprocess()

    yield prepare
    for context in contexts:
        context.close()


def refused(preprocess: Preprocess, text: str) -> str:
    """The message that a text is refused with."""
    with pytest.raises(ConfigError) as caught:
        preprocess(text)
    return str(caught.value)


# --- what is accepted ----------------------------------------------------------------------------


def test_keywords_go_to_the_constructor(preprocess: Preprocess) -> None:
    job, extensions = preprocess("ext: ext.py\n---\n!ext.Job\npath: /data\n")
    assert job.run() == "/data"
    assert job.extensions == extensions == {"ext": "ext.py"}
    assert job.content is not None
    assert "path: /data" in job.content


def test_components_nest_anywhere_and_factories_make_them(preprocess: Preprocess) -> None:
    job: Any
    job, _ = preprocess(
        "ext: .\n---\n!ext.Job\npath: x\n"
        "parts: [!ext.Part {size: 2}, !ext.Part.large {factor: 3}]\nextra: {deep: !ext.Part }\n"
    )
    assert [part.size for part in job.parts] == [2, 300]
    assert job.extra["deep"].size == 1


def test_a_class_name_alone_will_do(preprocess: Preprocess) -> None:
    job, _ = preprocess("ext: .\n---\n!Job {path: x}\n")
    assert type(job).__name__ == "Job"


def test_an_anchor_is_one_object(preprocess: Preprocess) -> None:
    job: Any
    job, _ = preprocess("ext: .\n---\n!ext.Job\npath: x\nparts: [&p !ext.Part {}, *p]\n")
    assert job.parts[0] is job.parts[1]


def test_a_package_with_submodules_is_an_extension(preprocess: Preprocess, tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").write_text(EXTENSION)
    job, _ = preprocess("pkg: ./pkg\n---\n!pkg.inner.Job {path: x}\n")
    assert job.run() == "x"


def test_a_folder_of_another_name_is_imported_by_the_name_of_the_file(
    preprocess: Preprocess, tmp_path: Path
) -> None:
    package = tmp_path / "some-folder"
    package.mkdir()
    (package / "__init__.py").write_text("from ext_classes import *")
    (package / "ext_classes.py").write_text(EXTENSION)
    (package / "__init__.py").write_text("from .ext_classes import Job")
    job, _ = preprocess("mine: some-folder\n---\n!mine.Job {path: x}\n")
    assert job.run() == "x"


def test_extensions_are_forgotten_afterwards(tmp_path: Path) -> None:
    (tmp_path / "ext.py").write_text(EXTENSION)
    file = tmp_path / "job.yaml"
    file.write_text("ext: .\n---\n!ext.Bare {}\n")
    path = [*sys.path]
    with SafeExecutionContext(str(file)) as context:
        context.preprocess()
        assert "ext" in sys.modules
    assert context.error is None
    assert "ext" not in sys.modules
    assert sys.path == path


# --- what is refused -----------------------------------------------------------------------------


def test_the_stray_colon_of_the_documentation_is_pointed_at(preprocess: Preprocess) -> None:
    message = refused(preprocess, "ext: /path/to/extension:\n---\n!ext.S3Pusher\n  bucket: b\n")
    assert "job.yaml:1:24: not YAML" in message
    assert "remove the ':' at the end of the line" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", "the file is empty", id="empty"),
        pytest.param("ext: .\n", "job.yaml:1:1: expected one tagged Runnable", id="no_tag"),
        pytest.param("ext: .\n---\n- 1\n", "job.yaml:3:1: expected one tagged", id="list"),
        pytest.param("a: .\n---\n!a.B {}\n---\n!a.C {}\n", "at most two documents", id="three"),
        pytest.param("[1]\n---\n!ext.Job {}\n", "job.yaml:1:1: expected extensions", id="ext_list"),
        pytest.param("ext: [1]\n---\n!ext.Job {}\n", "job.yaml:1:6: expected a loc", id="ext_loc"),
        pytest.param("a-b: .\n---\n!ext.Job {}\n", "1:1: expected the name of a mod", id="ext_id"),
        pytest.param(
            "ext: .\n---\n!ext.Job\n  a: 1\n  a: 2\n", "job.yaml:5:3: the key 'a'", id="2x"
        ),
        pytest.param("ext: .\n---\n!ext.Job\n\tpath: x\n", "job.yaml:4:1: not YAML", id="tab"),
        pytest.param(
            "ext: .\n---\n!ext.Job [1]\n", "3:1: !ext.Job takes keywords", id="positional"
        ),
        pytest.param("ext: .\n---\n!ext.Part {}\n", "3:1: !ext.Part is a Part, which", id="other"),
        pytest.param("ext: .\n---\n!ext.Picky {value: 3}\n", "ValueError: 3 is bad", id="raises"),
        pytest.param("ext: .\n---\n!ext.Forgetful {}\n", "must call super()", id="no_super"),
        pytest.param("ext: .\n---\n!ext.Bare {x: 1}\n", "keyword argument 'x'", id="swallowed"),
        pytest.param("ext: nowhere/\n---\n!ext.Job {}\n", "there is no", id="no_path"),
        pytest.param("json2: json2\n---\n!json2.A {}\n", "neither a path nor installed", id="pip"),
        pytest.param("os: ext.py\n---\n!os.A {}\n", "another module of this name", id="taken"),
        pytest.param("e: https://x/y\n---\n!e.A {}\n", "cannot be fetched", id="remote"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    preprocess: Preprocess, text: str, expected: str
) -> None:
    assert expected in refused(preprocess, text)


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("!ext.Jop", "did you mean !ext.Job?"),
        ("!exd.Job", "did you mean !ext.Job?"),
        ("!Jobs", "there is no extension or class 'Jobs'"),
        ("!ext", "it names a module"),
        ("!ext.function", "'ext' has no 'function' that a tag can name"),
        ("!ext.Part.method", "'Part' has no 'method'"),
        ("!ext.Part.__init__", "expected names with dots"),
        ("!ext.Part.large.__self__", "expected names with dots"),
        ("!!python/object/apply:os.system", "unknown tag"),
        ("!@", "links (!@) come with experiments"),
        ("!g", "grids (!g)"),
    ],
)
def test_an_unknown_tag_is_refused_with_its_place(
    preprocess: Preprocess, tag: str, expected: str
) -> None:
    message = refused(preprocess, f"ext: .\n---\n!ext.Job\npath:\n  - {tag} {{}}\n")
    assert "job.yaml:5:5: " in message
    assert expected in message


def test_a_tag_error_is_a_config_error(preprocess: Preprocess) -> None:
    with pytest.raises(TagError):
        preprocess("ext: .\n---\n!ext.Nothing {}\n")


def test_nothing_is_made_before_every_tag_is_known(preprocess: Preprocess) -> None:
    text = "ext: .\n---\n!ext.Job\npath: !ext.Picky {value: 1}\nparts: !ext.Nothing {}\n"
    assert "unknown tag !ext.Nothing" in refused(preprocess, text)


def test_a_bad_keyword_names_the_class_and_what_it_takes(preprocess: Preprocess) -> None:
    message = refused(preprocess, "ext: .\n---\n!ext.Job\npath: x\npart: [1]\n")
    assert message.startswith(message.split("job.yaml")[0] + "job.yaml:5:1: ")
    assert "!ext.Job(path, parts=(), extra=None) takes no 'part'; did you mean 'parts'?" in message


def test_a_missing_keyword_is_named(preprocess: Preprocess) -> None:
    assert "needs 'path'" in refused(preprocess, "ext: .\n---\n!ext.Job {}\n")


def test_a_broken_extension_says_what_its_import_raised(
    preprocess: Preprocess, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there\n")
    message = refused(preprocess, "broken: broken.py\n---\n!broken.Job {}\n")
    assert "ModuleNotFoundError" in message
    assert "install 'a_module_that_is_not_there'" in message
    (tmp_path / "broken.py").write_text("def (:\n")
    message = refused(preprocess, "broken: broken.py\n---\n!broken.Job {}\n")
    assert "broken.py:1)" in message


def test_a_folder_without_the_module_says_what_was_looked_for(
    preprocess: Preprocess, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(preprocess, "thing: empty\n---\n!thing.Job {}\n")
    assert "expected thing.py, thing/__init__.py or __init__.py" in message
