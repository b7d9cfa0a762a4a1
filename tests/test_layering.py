"""The architecture as a test: who may include and import whom, and that the two languages agree on the activations."""

import ast
import re
from pathlib import Path

import pytest
from oracle import STOCK

from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.stock import ACTIVATIONS as STOCK_MODULES

ROOT = Path(__file__).parent.parent
CSRC, PACKAGE = ROOT / "csrc", ROOT / "dlkernels"

HOST = {
    "check.h",
    "check_losses.h",
    "host.h",
    "layer.h",
    "linear_act.h",
    "loss_calls.h",
    "losses.h",
    "losses_host.h",
    "mlp.h",
    "mlp_host.h",
}  # these speak of tensors: they stay at the door
KERNELS = [
    *sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh") and p.name not in HOST),
    *sorted((CSRC / "cpu").glob("ukernel_*.cpp")),
]


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_the_kernels_are_found():
    names = {p.name for p in KERNELS}
    assert {"activation.h", "params.h", "gemm.h", "epilogue.h", "vec.h", "ukernel_portable.cpp"} <= names


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(CSRC)))
def test_kernels_include_no_torch(path):
    """Directly or through another header of ours."""
    seen, queue = set(), [path]
    while queue:
        current = queue.pop()
        for name in includes(current):
            assert not re.match(r"(torch|ATen|c10|caffe2|pybind11|Python)[./]", name), f"{current.name}: {name}"
            if (header := (current.parent / name).resolve()).exists() and header not in seen:
                seen.add(header)
                queue.append(header)


def test_pybind11_is_kept_in_one_file():
    users = [p.name for p in CSRC.rglob("*.*") if p.is_file() and any("pybind11" in i for i in includes(p))]
    assert users == ["module.cpp"]
    heavy = [p.name for p in CSRC.rglob("*.*") if p.is_file() and "torch/extension.h" in includes(p)]
    assert heavy == []


# Lower may not import higher. A module's layer is that of the longest prefix here.
LAYERS = {
    "dlkernels._C": 0, "dlkernels._version": 0, "dlkernels._load": 0, "dlkernels.atomic": 0,
    "dlkernels.agreement": 0, "dlkernels.choices": 0, "dlkernels.extras": 0, "dlkernels._entry": 0,
    "dlkernels._ops": 1,
    "dlkernels.losses": 2,
    "dlkernels.functional": 3,
    "dlkernels.nn": 4,
    "dlkernels.fusion": 5, "dlkernels.stock": 5, "dlkernels.data": 5, "dlkernels.trainer": 5,
    "dlkernels.parallel": 5,
    "dlkernels.runs": 6, "dlkernels.serving": 6,
    "dlkernels.cli": 7,
    "dlkernels._public": 8, "dlkernels.__main__": 8,
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


def test_trainer_knows_no_layer_of_ours():
    """It trains any module with any loss."""
    for module, path in MODULES.items():
        if module.startswith("dlkernels.trainer"):
            for imported in imports(path):
                assert not re.match(r"dlkernels\.(_ops|_C|functional|nn|losses)", imported), f"{module}: {imported}"


def test_activation_lists_agree():
    """Names and codes: Python, the enum of the op schemas, the switch over functors, the oracle, the stock modules."""
    enum = re.search(r"enum class Act[^{]*\{([^}]*)\}", (CSRC / "params.h").read_text()).group(1)
    names = [name.strip() for name in enum.split(",")]
    assert list(ACTIVATIONS) == names
    assert [a.code for a in ACTIVATIONS.values()] == list(range(len(names)))
    header = (CSRC / "activation.h").read_text()
    assert set(re.findall(r"case Act::(\w+):", header)) == set(names)
    assert int(re.search(r"kActivations = (\d+)", header).group(1)) == len(names)
    assert set(STOCK) == set(names) == set(STOCK_MODULES)
    documented = re.search(r"activation: (.*?)Formulas", (PACKAGE / "functional.py").read_text(), re.DOTALL).group(1)
    assert re.findall(r'``"(\w+)"``', documented) == names


def test_saved_tensor_agrees():
    """Whether backward reads y or z, and whether a bit is enough: each functor's constants, and Python's."""
    header = (CSRC / "activation.h").read_text()
    functor = dict(re.findall(r"case Act::(\w+): return f\((\w+)\{\}\)", header)) | {"none": "Identity"}
    for name, activation in ACTIVATIONS.items():
        body = header[header.index(f"struct {functor[name]} {{") :]
        constants = re.search(r"saves_output = (\w+), gates = (\w+);", body).groups()
        assert constants == tuple(str(c).lower() for c in (activation.saves_output, activation.gates)), name
