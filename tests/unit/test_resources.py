"""Resource requests, their classes, and what is left of a worker."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_broker.errors import ResourceError
from flame_broker.resources import DEFAULT_CLASS, Capacity, ResourceRequirement

GIB = 2**30

cpus = st.one_of(st.integers(1, 2**16), st.floats(0.001, 2**16, exclude_min=True, allow_nan=False))
sizes = st.integers(0, 2**60)
gpus = st.one_of(st.integers(0, 2**10), st.floats(0, 1, exclude_max=True, allow_nan=False))
requests = st.builds(ResourceRequirement, cpu=cpus, mem_bytes=sizes, gpu=gpus)


def test_the_documented_request_is_read() -> None:
    read = ResourceRequirement.from_string("cpu=2,mem=4g,gpu=1")
    assert read == ResourceRequirement(cpu=2, mem_bytes=4 * GIB, gpu=1)
    assert str(read) == "cpu=2,mem=4g,gpu=1"


def test_parts_may_be_missing_in_any_order_and_case() -> None:
    assert ResourceRequirement.from_string(" GPU=0.5 , Mem = 512MiB") == ResourceRequirement(
        cpu=1, mem_bytes=512 * 2**20, gpu=0.5
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("10b", 10),
        ("1k", 1024),
        ("1ki", 1024),
        ("1kib", 1024),
        ("1kb", 1000),
        ("2m", 2 * 2**20),
        ("2mb", 2 * 10**6),
        ("1.5g", 3 * 2**29),
        ("4Gi", 4 * GIB),
        ("4GB", 4 * 10**9),
        ("1t", 2**40),
        ("1p", 2**50),
        ("1pb", 10**15),
        ("1e3", 1000),
        ("0.1k", 103),
    ],
)
def test_memory_units(text: str, size: int) -> None:
    assert ResourceRequirement.from_string(f"mem={text}").mem_bytes == size


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        (",", "''"),
        ("cpu=1,", "''"),
        ("cpu", "'cpu'"),
        ("cpu=", "'cpu='"),
        ("=1", "''"),
        ("cpus=1", "'cpus'"),
        ("disk=1g", "'disk'"),
        ("cpu=1,cpu=2", "twice"),
        ("cpu=0", "cpu=0"),
        ("cpu=-1", "cpu=-1"),
        ("cpu=nan", "cpu=nan"),
        ("cpu=inf", "cpu=inf"),
        ("cpu=1e99", "cpu="),
        ("cpu=1_0", "cpu=1_0"),
        ("cpu=٣", "cpu=٣"),
        ("cpu=two", "cpu=two"),
        ("cpu=1=2", "cpu=1=2"),
        ("mem=-4g", "mem=-4g"),
        ("mem=4x", "mem=4x"),
        ("mem=4bi", "mem=4bi"),
        ("mem=g", "mem=g"),
        ("mem=4 0g", "mem=4 0g"),
        ("mem=9999p", "mem=9999p"),
        ("mem=1e400p", "mem=1e400p"),
        ("gpu=-1", "gpu=-1"),
        ("gpu=1.5", "gpu=1.5"),
        ("gpu=4096", "gpu=4096"),
    ],
)
def test_what_makes_no_sense_is_refused_and_named(text: str, named: str) -> None:
    with pytest.raises(ResourceError, match=re.escape(named)):
        ResourceRequirement.from_string(text)


@pytest.mark.parametrize(
    "values",
    [{"cpu": 0}, {"cpu": float("nan")}, {"mem_bytes": -1}, {"gpu": -0.5}, {"gpu": float("inf")}],
)
def test_values_given_directly_are_checked_too(values: dict[str, float]) -> None:
    with pytest.raises(ResourceError):
        ResourceRequirement(**values)  # type: ignore[arg-type]


@given(requests)
def test_text_round_trips(request: ResourceRequirement) -> None:
    assert ResourceRequirement.from_string(str(request)) == request


@given(st.text(alphabet="cpumegb=,.0123456789-ik ", max_size=20))
def test_any_text_gives_a_request_or_a_resource_error(text: str) -> None:
    try:
        read = ResourceRequirement.from_string(text)
    except ResourceError:
        return
    assert ResourceRequirement.from_string(str(read)) == read


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cpu=1", "c1"),
        ("cpu=0.1", "c1"),
        ("cpu=2,mem=4g,gpu=1", "c2-m4-g1"),
        ("cpu=3", "c4"),
        ("mem=1", "c1-m1"),
        ("mem=1g", "c1-m1"),
        ("mem=5gb", "c1-m8"),
        (f"mem={2**59 + 1}", "c1-m1073741824"),
        ("gpu=0.1", "c1-g1of4"),
        ("gpu=0.25", "c1-g1of4"),
        ("gpu=0.3", "c1-g1of2"),
        ("gpu=0.7", "c1-g1"),
        ("cpu=8,gpu=3", "c8-g4"),
    ],
)
def test_classes_round_up(text: str, name: str) -> None:
    assert ResourceRequirement.from_string(text).class_name == name


def test_the_default_request_is_the_default_class() -> None:
    assert ResourceRequirement().class_name == DEFAULT_CLASS


@given(requests)
def test_a_class_covers_the_request_and_its_name_round_trips(request: ResourceRequirement) -> None:
    covered = request.quantised()
    assert request.fits(Capacity(covered.cpu, covered.mem_bytes, covered.gpu))
    assert covered.quantised() == covered
    assert covered.cpu < 2 * max(request.cpu, 1)
    assert ResourceRequirement.from_class_name(request.class_name) == covered
    # One segment of a dotted queue name, also for brokers that allow little else.
    assert re.fullmatch(r"[a-z0-9-]{2,40}", request.class_name)


@pytest.mark.parametrize(
    "name", ["", "c0", "c3", "c01", "m4", "c1-m3", "c1-m0", "c1-g0", "c1-g3", "c1-g1of3", "c1-m1-"]
)
def test_a_name_that_is_no_class_is_refused(name: str) -> None:
    with pytest.raises(ResourceError):
        ResourceRequirement.from_class_name(name)


def test_capacity_goes_down_and_up_again() -> None:
    whole = Capacity(cpu=4, mem_bytes=8 * GIB, gpu=1)
    request = ResourceRequirement.from_string("cpu=2,mem=4g,gpu=0.5")
    left = whole - request
    assert left == Capacity(cpu=2, mem_bytes=4 * GIB, gpu=0.5)
    assert request.fits(left)
    assert not request.fits(left - request)
    assert left + request == whole
    assert str(whole) == "cpu=4,mem=8g,gpu=1"


@pytest.mark.parametrize("short", ["cpu=5", "mem=9g", "gpu=2"])
def test_a_request_must_fit_in_every_part(short: str) -> None:
    assert not ResourceRequirement.from_string(short).fits(Capacity(4, 8 * GIB, 1))
