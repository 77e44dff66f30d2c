"""A small file never unpacks into a large one: sizes are declared, bounded, and held to."""

from __future__ import annotations

import zipfile

import pytest

from quant_core.data.npz import MAX_BYTES, MAX_MEMBERS
from tests.hostile.archives import header, repeat_member, write_zip
from tests.hostile.refused import Cases, adder, check

CASES: Cases = {}
case = adder(CASES)


@case("zip bomb")
def zeros_that_unpack_a_thousandfold(path):
    write_zip(path, {"x.npy": (header((1, 300 << 20), "|i1"), 300 << 20)})


@case(f"At most {MAX_BYTES:,}")
def more_than_may_be_declared(path):
    write_zip(path, {"x.npy": (header((4,)), 16)})
    content = bytearray(path.read_bytes())
    for signature, offset in (
        (b"PK\x01\x02", 24),
        (b"PK\x03\x04", 22),
    ):  # the uncompressed size, both times it stands
        at = content.index(signature) + offset
        content[at : at + 4] = b"\xfe\xff\xff\xff"
    content = bytes(content)
    # four gigabytes are as much as 32 bits say: five such members
    path.write_bytes(content)
    repeat_member(path, 5)


@case("arrays")
def members_without_end(path):
    write_zip(path, {f"x{k}.npy": (b"", 0) for k in range(MAX_MEMBERS + 1)})


@case("two of one name")
def two_members_of_one_name(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header((4,)) + bytes(16))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", header((4,)) + bytes(16))


@case("cut short")
def a_shape_that_is_not_there(path):
    path.write_bytes(header((1 << 40,)) + bytes(16))


@pytest.mark.parametrize("name", CASES)
def test_a_bomb_is_refused_before_it_costs_anything(tmp_path, name):
    check(CASES, name, tmp_path)
