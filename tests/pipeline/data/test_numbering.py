"""The order of section files."""

import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.errors import InputError
from agq.pipeline.data.numbering import in_order, listed


def ordered(*names: str) -> list[str | None]:
    files = [Path("/em", name) for name in names]
    random.Random(3).shuffle(files)
    found = in_order(files, "em")
    assert len(found.missing) == found.places.count(None)
    return [file and str(file.relative_to("/em")) for file in found.places]


@pytest.mark.parametrize(
    "names",
    [
        "s8 s9 s10 s11",
        "z098 z099 z100",
        "Slice1 slice2 Slice3",
        "z-2 z-1 z0 z1",
        "z-1 z+0 z+1",
        "z\u22121 z0 z1",
        "scan-1 scan-2 scan-3",
        "z0.5 z1.0 z1.5",
        "z1 z1.25 z1.5 z1.75",
        "z8.5nm z9nm z9.5nm",
        "s1.8 s1.9 s1.10",
        "v1.2.9 v1.2.10",
        "z000 z005 z010",
        "w1_s1 w1_s2 w2_s1 w2_s2",
        "w1/s1 w1/s2 w2/s1 w2/s2",
        "20200109_s1 20200110_s2 20200203_s3",
        "2020-01-01_12-00-05 2020-01-01_12-00-35 2020-01-02_11-01-15",
        "s001_ab1f s002_99e s003_x",
        "exp7_s1a exp7_s2b",
        "a b c",
        "s5",
    ],
)
def test_numbers_count_as_numbers(names: str) -> None:
    wanted = [f"{name}.tif" for name in names.split()]
    assert ordered(*wanted) == wanted


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ("z000 z001 z002 z005 z006 z009", "3 4 7 8"),
        ("z0 z9", ""),
        ("z0 z1 z9", "2 3 4 5 6 7 8"),
        ("z-2 z0 z1", "-1"),
        ("z0.0 z0.5 z1.5", "1.0"),
        ("z000 z005 z015", "10"),
        ("w1_s1 w1_s2 w1_s4 w2_s1 w2_s2", "3"),
        ("20200101_s1 20200102_s2 20200109_s3 20200110_s5", "4"),
    ],
)
def test_missing_numbers_are_named(names: str, missing: str) -> None:
    files = [Path(f"{name}.tif") for name in names.split()]
    assert in_order(files, "em").missing == tuple(missing.split())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("z1 z01 z2", "z01.tif and z1.tif have the same number"),
        ("Z1 z1 z2", "Z1.tif and z1.tif have the same number"),
        ("img_1 img_1+copy img_2", "have the same number"),
        ("img_1 img_1+(1) img_2", "have the same number"),
        ("em_1 em_2 labels_1", "are not named alike, .* by a glob"),
        ("a b1", "are not named alike"),
        ("t16094592 t17094593 t18094777", "do not count sections: 2000183 would"),
        ("s1_ch00 s1_ch01 s2_ch00 s2_ch01", "are several channels"),
    ],
)
def test_files_that_are_no_stack(names: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ordered(*(f"{name.replace('+', ' ')}.tif" for name in names.split()))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-30, 300), min_size=2, max_size=12, unique=True),
    st.integers(1, 4),
    st.sampled_from(["z{}", "em_{}_raw", "A{}b7", "{}"]),
)
def test_any_numbers(numbers: list[int], width: int, pattern: str) -> None:
    if all(number < 0 for number in numbers):  # then the dash only separates
        numbers = [-number for number in numbers]
    files = [Path(f"{pattern.format(f'{number:0{width}d}')}.tif") for number in numbers]
    found = in_order(files, "em")
    by_number = dict(zip(numbers, files, strict=True))
    assert [file for file in found.places if file] == [by_number[n] for n in sorted(numbers)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text("aZ019.-+_ /\u2212\u00b2\u0663", min_size=1, max_size=7).filter(
            lambda text: not text.startswith("/") and Path(text).name not in ("", ".", "..")
        ),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_any_names_give_an_order_or_one_line(names: list[str]) -> None:
    with suppress(InputError):
        found = in_order([Path(f"{name}.tif") for name in names], "em")
        assert len([file for file in found.places if file]) == len(names)


def test_a_long_list_is_cut() -> None:
    assert listed([str(n) for n in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
