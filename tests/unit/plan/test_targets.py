"""Targets: what `auto` means, and which names are known."""

from __future__ import annotations

import pytest

from quant_core.errors import RequestError
from quant_core.plan import targets
from quant_core.plan.targets import find_target, host_kernels, host_target_name


@pytest.fixture
def host(monkeypatch):
    """Sets this host's machine and CPU flags."""

    def set_host(machine: str, *flags: str) -> None:
        monkeypatch.setattr(targets.platform, "machine", lambda: machine)
        monkeypatch.setattr(targets, "cpu_flags", lambda: frozenset(flags))
        host_target_name.cache_clear()

    yield set_host
    host_target_name.cache_clear()


@pytest.mark.parametrize("flags", [(), ("avx2",), ("avx2", "avx_vnni"), ("avx512_vnni",)])
def test_the_default_on_x86_is_safe_on_every_x86_cpu_whatever_this_one_has(host, flags):
    host("x86_64", *flags)

    assert find_target("auto").name == "x86"
    assert find_target("auto").saturates


def test_what_was_timed_depends_on_the_kernels_of_this_cpu(host):
    host("x86_64", "avx2")
    without = host_kernels()
    host("x86_64", "avx2", "avx512_vnni")

    assert (without, host_kernels()) == ("x86-avx2", "x86-vnni")


@pytest.mark.parametrize(("machine", "target"), [("aarch64", "arm64"), ("riscv64", "portable")])
def test_other_families_have_their_own_default(host, machine, target):
    host(machine)

    assert find_target("auto").name == host_kernels() == target


def test_the_earlier_name_of_x86_is_still_understood():
    assert find_target("x86-avx2").name == "x86"


def test_an_unknown_target_is_an_error_that_names_the_known_ones():
    with pytest.raises(
        RequestError, match=r"x86, x86-vnni, arm64, web, openvino, tensorrt, qnn, portable"
    ):
        find_target("sparc")
