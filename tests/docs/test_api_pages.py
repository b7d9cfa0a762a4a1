"""Every public name has a docstring, and the built site shows it on an API page."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import zlib
from importlib.util import find_spec

import pytest

import dlkernels
from tests.support.paths import ROOT

# The modules that declare public names.
MODULES = ["dlkernels"] + [
    f"dlkernels.{module.name}"
    for module in pkgutil.iter_modules(dlkernels.__path__)
    if not module.name.startswith("_") and hasattr(importlib.import_module(f"dlkernels.{module.name}"), "__all__")
]
NAMES = [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__]


def value(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def describes_itself(thing):
    return inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)


@pytest.fixture(scope="module")
def inventory(tmp_path_factory):
    """The names that the site documents: mkdocstrings lists them in objects.inv, as Sphinx does."""
    if find_spec("mkdocs") is None:
        pytest.skip("needs the extra docs, and so Python 3.11")
    site = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    _, _, compressed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    return {line.split()[0] for line in zlib.decompress(compressed).decode().splitlines()}


def test_the_public_modules_are_found():
    assert {"dlkernels.functional", "dlkernels.nn", "dlkernels.losses", "dlkernels.fusion"} <= set(MODULES)
    assert {"dlkernels.trainer", "dlkernels.data", "dlkernels.serving", "dlkernels.parallel"} <= set(MODULES)


@pytest.mark.parametrize("name", [name for name in NAMES if describes_itself(value(name))])
def test_every_public_name_has_a_docstring(name):
    assert value(name).__doc__, f"{name} needs a docstring"


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_on_an_api_page(name, inventory):
    thing = value(name)
    names = {name}
    if inspect.ismodule(thing):
        names.add(thing.__name__)
    elif describes_itself(thing):
        names.add(f"{thing.__module__}.{thing.__qualname__}")
    assert names & inventory, f"{name} is on no page: add it to docs/api/"
