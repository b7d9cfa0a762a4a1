"""DLKERNELS_HUGE_PAGES: large memory that the CPU ops allocate is asked for in huge pages, and nothing else changes."""

import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.subprocess_utils import python

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MODE = re.search(r"\[(\w+)\]", SETTING.read_text()) if SETTING.exists() else None
allowed = pytest.mark.skipif(
    MODE is None or MODE[1] != "madvise", reason="needs Linux that gives huge pages to those who ask, and to no others"
)


@cache
def run(size, wanted):
    """glibc then maps every large block by itself: none lies where an earlier one was asked for in huge pages."""
    return json.loads(
        python("-m", "tests.ops.large_outputs", size, DLKERNELS_HUGE_PAGES=wanted, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    )


@allowed
def test_large_outputs_are_asked_for():
    """All of a large output that lies in whole huge pages, and none of it with the switch off."""
    for wanted in ("", "1"):
        large = [output for output in run("large", wanted)["outputs"] if output["bytes"] >= 4 << 20]
        assert len(large) >= 26
        assert all(output["inside"] for output in large)
        assert [output for output in large if output["asked"] != output["inside"]] == []
    off = run("large", "0")
    assert [output for output in off["outputs"] if output["asked"] or output["huge"]] == []
    assert off["left"] == 0


@allowed
def test_large_outputs_are_backed():
    """The kernel may have run out of huge pages for one or the other."""
    large = [output for output in run("large", "1")["outputs"] if output["bytes"] >= 4 << 20]
    assert sum(output["huge"] for output in large) > len(large) / 2


@allowed
def test_small_outputs_are_not():
    outputs = run("small", "1")["outputs"]
    assert len(outputs) >= 26
    assert [output for output in outputs if output["asked"] or output["huge"]] == []


@pytest.mark.skipif(sys.platform == "win32", reason="large_outputs.py asks for the peak as POSIX has it")
@pytest.mark.parametrize("size", ["large", "small"])
def test_same_bits_with_and_without(size):
    assert run(size, "1")["hash"] == run(size, "0")["hash"]


@allowed
def test_no_more_memory():
    """Peak resident memory grows by the part of a huge page that is not written, in each thread's scratch and in the
    few blocks that a call holds at a time.
    """
    for size in ("small", "large"):
        on, off = run(size, "1"), run(size, "0")
        grown = on["peak_kib"] - off["peak_kib"]
        blocks = on["threads"] + 4
        assert grown < blocks << 11, f"{size}: {grown} KiB of {off['peak_kib']}"


def test_bad_value():
    """Said at the first call that allocates, and again at the next one."""
    script = """
import torch
from dlkernels import functional
for _ in range(2):
    try:
        functional.linear_relu(torch.ones(3, 4), torch.ones(5, 4))
    except RuntimeError as e:
        print(e)
"""
    said = python("-c", script, DLKERNELS_HUGE_PAGES="yes")
    assert len(re.findall("DLKERNELS_HUGE_PAGES must be 0 or 1, got 'yes'", said)) == 2, said
