"""The architecture as a test: who may include and import whom, and that the two languages agree on the activations."""

import ast
import re

import pytest

from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.stock import ACTIVATIONS as STOCK_MODULES
from dlkernels.testing import STOCK
from tests.support.paths import CSRC, ROOT

PACKAGE = ROOT / "dlkernels"

SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu", ".inc"))
TORCH = re.compile(r"(torch|ATen|c10|caffe2|pybind11|Python)[./]")
CUDA = re.compile(r"(cuda|cub|cute|cutlass|nv)\w*[./]")
ALLOCATION = re.compile(r"\b(new|malloc|calloc|aligned_alloc|posix_memalign|mmap|make_unique|make_shared)\b")


def room(path):
    return path.relative_to(CSRC).parts[0]


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def reached(path):
    """(file, include) of a file and of every header of ours that it includes, at any depth."""
    seen, queue = set(), [path]
    while queue:
        current = queue.pop()
        for name in includes(current):
            yield current, name
            header = next((p for p in (CSRC / name, current.parent / name) if p.exists()), None)
            if header and header not in seen:
                seen.add(header)
                queue.append(header)


def test_every_source_has_a_room():
    assert {room(p) for p in SOURCES} == {"ops", "planning", "kernels", "python"}
    names = {p.name for p in SOURCES if room(p) == "kernels"}
    assert {"activation.h", "params.h", "gemm.h", "epilogue.h", "vec.h", "ukernel_portable.cpp"} <= names


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if room(p) not in ("ops", "python")], ids=lambda p: str(p.relative_to(CSRC))
)
def test_only_ops_and_python_include_torch(path):
    for current, name in reached(path):
        assert not TORCH.match(name), f"{current.relative_to(CSRC)} includes {name}"


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) == "planning"], ids=lambda p: str(p.relative_to(CSRC)))
def test_planning_includes_no_cuda_and_allocates_nothing(path):
    for current, name in reached(path):
        assert not CUDA.match(name), f"{current.relative_to(CSRC)} includes {name}"
    code = re.sub(r"//.*|\"(?:[^\"\\]|\\.)*\"", "", path.read_text())
    assert not ALLOCATION.search(code)


def test_pybind11_is_kept_in_one_room():
    users = {room(p) for p in SOURCES if any("pybind11" in i for i in includes(p))}
    assert users == {"python"}
    heavy = [p.name for p in CSRC.rglob("*.*") if p.is_file() and "torch/extension.h" in includes(p)]
    assert heavy == []


# Each costs a compiler 450 to 830 MB and 3 to 10 s. The others reach what it declares through these files' headers.
LARGE = {
    "ATen/core/dispatch/Dispatcher.h": {"ops/dispatched.cpp"},
    "torch/csrc/autograd/custom_function.h": {"ops/autograd/function.cpp"},
    "torch/csrc/autograd/python_variable.h": {"python/tensors.cpp"},
    "torch/csrc/Exceptions.h": {"python/tensors.cpp"},
    "torch/library.h": {"ops/binding.cpp"},
    "ATen/core/List.h": set(),  # see ops/optional_tensors.h
}


def test_the_largest_headers_of_torch_are_included_once():
    found = {(name, str(p.relative_to(CSRC))) for p in SOURCES for name in includes(p)}
    assert {name: {path for other, path in found if other == name} for name in LARGE} == LARGE
    # <ATen/ops/mul_ops.h> is small. <ATen/ops/mul.h> includes half of ATen, and so do these two. Builds for CPU alone
    # leave the files of ops/cuda out.
    half = {"ATen/autocast_mode.h", "ATen/ExpandUtils.h"} | {
        n for n, _ in found if re.fullmatch(r"ATen/ops/\w+(?<!_ops)\.h", n)
    }
    assert not {path for name, path in found if name in half and not path.startswith("ops/cuda/")}


# Lower may not import higher. A module's layer is that of the longest prefix here.
LAYERS = {
    "dlkernels._C": 0, "dlkernels._version": 0, "dlkernels._load": 0, "dlkernels.atomic": 0,
    "dlkernels.testing": 0, "dlkernels.choices": 0, "dlkernels.extras": 0, "dlkernels._entry": 0,
    "dlkernels._errors": 0, "dlkernels._one_call": 0, "dlkernels._circumstances": 0, "dlkernels._gpus": 0,
    "dlkernels._processors": 0,
    "dlkernels.route_table": 0,
    "dlkernels._ops": 1, "dlkernels.routing": 1,
    "dlkernels.losses": 2,
    "dlkernels.explanation": 2, "dlkernels._decisions": 2,
    "dlkernels.functional": 3,
    "dlkernels.nn": 4,
    "dlkernels.fusion": 5, "dlkernels.stock": 5, "dlkernels.data": 5, "dlkernels.trainer": 5,
    "dlkernels.parallel": 5,
    "dlkernels.training": 6, "dlkernels.tuning": 6, "dlkernels.runs": 6, "dlkernels.serving": 6,
    "dlkernels.cli": 7,
    "dlkernels._core": 5, "dlkernels.__main__": 8,
    "dlkernels": 9,  # the public face: imports whatever it shows
}  # fmt: skip


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def layer(module):
    if module == "dlkernels":
        return LAYERS[module]
    known = [prefix for prefix in LAYERS if prefix != "dlkernels" and f"{module}.".startswith(f"{prefix}.")]
    assert known, f"{module} has no layer: give it one above"
    return LAYERS[max(known, key=len)]


def imports(path):
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "dlkernels")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if (node.module or "").split(".")[0] == "dlkernels":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES or inner in LAYERS else node.module


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upward(module):
    mine = layer(module)
    for imported in imports(MODULES[module]):
        package = ".".join(module.split(".")[:2])
        siblings = package != "dlkernels" and imported.startswith(f"{package}.")
        assert layer(imported) < mine or siblings, f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_only_ops_touches_the_operators(module):
    if module.startswith("dlkernels._ops"):
        return
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "ops":
            assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"line {node.lineno}"


@pytest.mark.parametrize(("package", "others"), [("trainer", ("data",)), ("data", ())])
def test_trainer_and_data_know_nothing_of_operators(package, others):
    """They work with any module and any loss: beside themselves they import modules that need no torch."""
    allowed = (package, *others, "_circumstances", "_errors", "_one_call", "atomic", "choices", "extras")
    for module, path in MODULES.items():
        if f"{module}.".startswith(f"dlkernels.{package}."):
            for imported in imports(path):
                assert f"{imported}.".split(".")[1] in allowed, f"{module} imports {imported}"


def test_activation_lists_agree():
    """Names and codes: Python, the enum of the op schemas, the switch over functors, the oracle, the stock modules."""
    enum = re.search(r"enum class Act[^{]*\{([^}]*)\}", (CSRC / "kernels/params.h").read_text()).group(1)
    names = [name.strip() for name in enum.split(",")]
    assert list(ACTIVATIONS) == names
    assert [a.code for a in ACTIVATIONS.values()] == list(range(len(names)))
    header = (CSRC / "kernels/activation.h").read_text()
    assert set(re.findall(r"case Act::(\w+):", header)) == set(names)
    assert int(re.search(r"kActivations = (\d+)", header).group(1)) == len(names)
    assert set(STOCK) == set(names) == set(STOCK_MODULES)
    documented = re.search(r"activation: (.*?)Formulas", (PACKAGE / "functional.py").read_text(), re.DOTALL).group(1)
    assert re.findall(r'``"(\w+)"``', documented) == names


def test_saved_tensor_agrees():
    """C++ and Python agree if backward reads y or z, and if the sign of y is enough."""
    header = (CSRC / "kernels/activation.h").read_text()
    functor = dict(re.findall(r"case Act::(\w+): return f\((\w+)\{\}\)", header)) | {"none": "Identity"}
    for name, activation in ACTIVATIONS.items():
        body = header[header.index(f"struct {functor[name]} {{") :]
        constants = re.search(r"saves_output = (\w+), needs_sign_only = (\w+);", body).groups()
        assert constants == tuple(str(c).lower() for c in (activation.saves_output, activation.needs_sign_only)), name
