"""What a worker may use: affinity, quotas and limits of control groups, old and new."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flame_broker.errors import ResourceError
from flame_broker.resources import Capacity
from flame_worker.capacity import detect_capacity, memory_share, parse_bytes
from flame_worker.limits import available_bytes, private_bytes, process_tree, tree_bytes


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def detect(root: Path, own: str) -> tuple[float, int]:
    (root / "own").write_text(own)
    found = detect_capacity(0, cgroups=root, own=root / "own")
    return found.cpu, found.mem_bytes


def test_without_limits_it_is_the_machine(tmp_path: Path) -> None:
    cpu, mem_bytes = detect(tmp_path, "0::/\n")
    assert 1 <= cpu <= (os.cpu_count() or 1)
    assert mem_bytes > 2**28


def test_the_tightest_group_above_us_counts(tmp_path: Path) -> None:
    group(tmp_path, "slice", cpu__max="100000 100000", memory__max="536870912")
    group(tmp_path, "slice/unit", cpu__max="max 100000", memory__max="max")
    assert detect(tmp_path, "0::/slice/unit\n") == (1.0, 2**29)


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    group(tmp_path, ".", memory__max="268435456")
    assert detect(tmp_path, "0::/some/where/else\n")[1] == 2**28


def test_version_one_groups_are_read(tmp_path: Path) -> None:
    quota = {"cpu__cfs_quota_us": "150000", "cpu__cfs_period_us": "100000"}
    group(tmp_path, "cpu/box", **quota)
    group(tmp_path, "memory/box", memory__limit_in_bytes="268435456")
    cpu, mem_bytes = detect(tmp_path, "4:cpu:/box\n5:memory:/box\n")
    assert cpu <= 1.5
    assert mem_bytes == 2**28


def test_less_than_one_processor_still_runs_a_call(tmp_path: Path) -> None:
    group(tmp_path, "small", cpu__max="20000 100000")
    assert detect(tmp_path, "0::/small\n")[0] == 1.0


def test_sizes_have_the_units_of_requests() -> None:
    assert parse_bytes("16g") == 16 * 2**30
    with pytest.raises(ResourceError):
        parse_bytes("much")


def test_memory_of_processes_is_measured() -> None:
    me = os.getpid()
    assert me in process_tree(me)
    assert 2**20 < private_bytes(me) <= tree_bytes(me) < available_bytes() + tree_bytes(me)
    assert private_bytes(2**22 + 1) == 0


@pytest.mark.parametrize(
    ("mem_gib", "slots", "share_gib"), [(64, 8, 8), (64, 1, 64), (8, 8, 2), (0, 0, 2)]
)
def test_the_shares_of_all_children_are_the_memory_but_none_is_tiny(
    mem_gib: int, slots: int, share_gib: int
) -> None:
    assert memory_share(Capacity(8, mem_gib * 2**30), slots) == share_gib * 2**30
