"""The house rules that text alone can show: who may import or include whom, names.

Everything here is parsed, nothing is imported or built.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jax_flash_attn"
CSRC = ROOT / "csrc"
KERNELS = CSRC / "kernels"
CODE_FOLDERS = ("jax_flash_attn", "csrc", "tests", "benchmarks", "examples")

# A module may import from the layers below its own, never from its own or above.
PYTHON_LAYERS = (
    {"__init__", "__main__"},
    {"cli"},
    {"explain", "integrations", "testing"},
    {"attention"},
    {"_vjp"},
    {"_primitives"},
    {"_key_parts"},
    {"_batching", "_partitioning", "_support"},
    {"_ffi"},
    {"_native"},
    {"_arguments", "blockwise", "dense", "reference"},
    {"_shapes", "dropout"},
    {"_compat", "_spec", "_version"},
)
# Modules that only those named may import.
PYTHON_IMPORTERS = {"_native": {"_ffi"}, "reference": {"cli"}}
# JAX attributes that only one module may touch.
JAX_OWNERS = {"jax.ffi": "_ffi", "jax._src": "_compat", "jax.__version__": "_compat"}
PYTHON_DEPENDENCIES = {"jax", "numpy", "jax_flash_attn"}
# The framework that each integration, and nothing else, may import.
INTEGRATIONS = PACKAGE / "integrations"
FRAMEWORKS = {
    "linen": "flax",
    "nnx": "flax",
    "haiku": "haiku",
    "equinox": "equinox",
}

INCLUDABLE = {
    "ffi": {"ffi", "launchers", "runtime", "params"},
    "launchers": {"launchers", "runtime", "params"},
    "runtime": {"runtime"},
    "sm80": {"sm80", "attention", "tile", "ptx", "params"},
    "sm90": {"sm90", "attention", "tile", "ptx", "params"},
    "portable": {"portable", "attention", "tile", "ptx", "params"},
    "attention": {"attention", "tile", "ptx", "params"},
    "tile": {"tile", "ptx"},
    "ptx": {"ptx", "params"},
    "params": {"params"},
}
HOST_FOLDERS = ("ffi", "launchers", "runtime")
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]+(\S+)", re.MULTILINE)
SYSTEM_INCLUDE = re.compile(r"<[a-z0-9_]+(/[a-z0-9_]+)*(\.h)?>")

BANNED_FILE_WORDS = {"utils", "util", "helpers", "helper", "common", "misc", "new"}
BANNED_COMMENT = re.compile(
    r"\b(TODO|FIXME|XXX|HACK|no longer (?!than)|previously|anymore)\b"
)
COMMENTED_OUT_CPP = re.compile(
    r"^\s*//\s*("
    r"(return|using|auto|const|int|float|if|for|while)\b.*[;{]"
    r"|[\w.>-]+(\[.*\])? [-+*/|&]?= .*;"
    r"|[a-z][\w.:>-]*\(.*\);"
    r"|}"
    r")\s*$",
    re.MULTILINE,
)

ENVIRONMENT_CALL = re.compile(r"\b(getenv|environ)\b")
ENVIRONMENT_NAME = re.compile(
    r"""["']([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|HOME|TMPDIR)["']"""
)
ENVIRONMENT_VARIABLES = {
    "JAX_FLASH_ATTN_CACHE_DIR",
    "JAX_FLASH_ATTN_NVRTC_PATH",
    "JAX_FLASH_ATTN_DUMP_DIR",
    "JAX_FLASH_ATTN_REQUIRE_GPU",
}


def files_under(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes)


def python_files() -> list[Path]:
    return files_under(PACKAGE, ".py", ".pyi")


def cpp_files() -> list[Path]:
    return files_under(CSRC, ".h", ".cc", ".cuh")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """The node of the import graph: a module, or a subpackage as a whole."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".pyi").removesuffix(".py")


def full_names(path: Path) -> Iterator[str]:
    """Every dotted name that the file imports or reaches by attributes."""
    package = ["jax_flash_attn", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def imported_modules(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in full_names(path) if is_ours(name)}
    known = set().union(*PYTHON_LAYERS) | {module_of(file) for file in python_files()}
    return names & known


def is_ours(name: str) -> bool:
    return name.startswith("jax_flash_attn.")


def layer(module: str) -> int:
    for depth, modules in enumerate(PYTHON_LAYERS):
        if module in modules:
            return depth
    raise AssertionError(f"{module} has no place in PYTHON_LAYERS of {__file__}")


def test_python_modules_import_only_layers_below():
    wrong = [
        f"{relative(path)} imports {imported}"
        for path in python_files()
        for imported in sorted(imported_modules(path) - {module_of(path)})
        if layer(imported) <= layer(module_of(path))
    ]
    assert wrong == []


@pytest.mark.parametrize(("module", "importers"), PYTHON_IMPORTERS.items())
def test_python_module_is_imported_only_by(module: str, importers: set[str]):
    found = {module_of(path) for path in python_files() if uses(path, module)}
    assert found <= importers


def uses(path: Path, module: str) -> bool:
    return module in imported_modules(path) - {module_of(path)}


@pytest.mark.parametrize(("name", "owner"), JAX_OWNERS.items())
def test_jax_name_is_touched_only_by(name: str, owner: str):
    users = {
        module_of(path)
        for path in python_files()
        if any(used == name or used.startswith(f"{name}.") for used in full_names(path))
    }
    assert users <= {owner}


def test_package_imports_only_its_dependencies():
    wrong = [
        f"{relative(path)} imports {name}"
        for path in python_files()
        for name in external_imports(path)
        if name not in importable(path)
    ]
    assert wrong == []


def importable(path: Path) -> set[str]:
    names = PYTHON_DEPENDENCIES | set(sys.stdlib_module_names)
    if path.parent == INTEGRATIONS and path.stem in FRAMEWORKS:
        names.add(FRAMEWORKS[path.stem])
    return names


def test_integrations_are_one_file_each_and_know_no_other():
    files = files_under(INTEGRATIONS, ".py")
    assert {path.stem for path in files} == {*FRAMEWORKS, "__init__", "_options"}
    siblings = {f"jax_flash_attn.integrations.{name}" for name in FRAMEWORKS}
    wrong = [
        f"{relative(path)} imports {name}"
        for path in files
        for name in full_names(path)
        if name in siblings
    ]
    assert wrong == []


def test_nothing_else_imports_an_integration():
    assert {
        module_of(path) for path in python_files() if uses(path, "integrations")
    } == set()


def external_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def folder_of(path: Path) -> str:
    """The layer of a C++ or CUDA file: its folder in csrc, or in csrc/kernels."""
    root = KERNELS if path.is_relative_to(KERNELS) else CSRC
    return path.relative_to(root).parts[0]


def is_device(path: Path) -> bool:
    return path.is_relative_to(KERNELS)


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def our_includes(path: Path) -> list[str]:
    names = [name[1:-1] for name in includes(path)]
    return [name for name in names if name.split("/")[0] in INCLUDABLE]


def included_file(name: str) -> Path:
    root = CSRC if name.split("/")[0] in HOST_FOLDERS else KERNELS
    return root / name


def test_cpp_files_lie_in_known_folders():
    assert {folder_of(path) for path in cpp_files()} <= set(INCLUDABLE)


def test_cpp_includes_follow_the_layers():
    wrong = [
        f"{relative(path)} includes {name}"
        for path in cpp_files()
        for name in our_includes(path)
        if name.split("/")[0] not in INCLUDABLE[folder_of(path)]
    ]
    assert wrong == []


def test_cpp_includes_have_one_form():
    wrong = [
        f"{relative(path)}: {include}"
        for path in cpp_files()
        for include in includes(path)
        if not has_the_form(path, include)
    ]
    assert wrong == []


def has_the_form(path: Path, include: str) -> bool:
    name = include[1:-1]
    if name.split("/")[0] in INCLUDABLE:
        file = included_file(name)
        form = f"<{name}>" if is_device(file) else f'"{name}"'
        return include == form and name.count("/") == 1 and file.is_file()
    if is_device(path):
        return False
    if name.startswith("xla/"):
        return folder_of(path) == "ffi" and include.startswith('"')
    if name.startswith("nanobind/"):
        return path == CSRC / "ffi" / "module.cc" and include.startswith("<")
    return SYSTEM_INCLUDE.fullmatch(include) is not None


def test_cpp_includes_have_no_cycle():
    graph = {
        path: [included_file(n) for n in our_includes(path)] for path in cpp_files()
    }
    finished: set[Path] = set()

    def visit(path: Path, trail: list[Path]) -> None:
        assert path not in trail, [relative(p) for p in [*trail, path]]
        if path not in finished:
            for included in graph[path]:
                visit(included, [*trail, path])
            finished.add(path)

    for path in graph:
        visit(path, [])


def test_headers_are_included_once():
    headers = [path for path in cpp_files() if path.suffix in {".h", ".cuh"}]
    assert [
        relative(path) for path in headers if "#pragma once\n" not in path.read_text()
    ] == []


def test_file_names_say_what_is_inside():
    folders = [ROOT / folder for folder in (*CODE_FOLDERS, "docs")]
    paths = [path for folder in folders for path in folder.rglob("*")]
    assert [
        relative(path)
        for path in paths
        if BANNED_FILE_WORDS & set(re.split(r"[_.-]", path.name))
    ] == []


def code_files() -> list[Path]:
    suffixes = (".py", ".pyi", ".h", ".cc", ".cuh")
    files = [f for name in CODE_FOLDERS for f in files_under(ROOT / name, *suffixes)]
    return [path for path in files if path != Path(__file__).resolve()]


def test_comments_tell_no_history():
    assert found_in(code_files(), BANNED_COMMENT) == []


def test_cpp_has_no_commented_out_code():
    assert found_in(cpp_files(), COMMENTED_OUT_CPP) == []


def found_in(paths: Iterable[Path], pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{relative(path)}: {match.group().strip()}"
        for path in paths
        for match in pattern.finditer(path.read_text())
    ]


def table_rows(document: Path) -> list[str]:
    return [line for line in document.read_text().splitlines() if line.startswith("|")]


def environment_reads(paths: Iterable[Path]) -> set[str]:
    """Names spelled like variables in the files that read the environment."""
    texts = [path.read_text() for path in paths]
    readers = [text for text in texts if ENVIRONMENT_CALL.search(text)]
    return {name for text in readers for name in ENVIRONMENT_NAME.findall(text)}


def test_environment_variables_are_in_the_readme():
    product = [*python_files(), *cpp_files()]
    ours = {
        n for n in environment_reads(code_files()) if n.startswith("JAX_FLASH_ATTN")
    }
    rows = "\n".join(table_rows(ROOT / "README.md"))
    documented = set(re.findall(r"\b[A-Z][A-Z_0-9]{3,}\b", rows))
    assert ours == ENVIRONMENT_VARIABLES
    assert ours | environment_reads(product) <= documented


def spec_fields() -> list[str]:
    tree = ast.parse((PACKAGE / "_spec.py").read_text())
    (spec,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "AttentionSpec"
    )
    return [
        node.target.id
        for node in spec.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def native_spec_fields() -> list[str]:
    text = (CSRC / "launchers" / "attention_spec.h").read_text()
    match = re.search(r"struct AttentionSpec \{\n(.*?)\n\};", text, re.DOTALL)
    assert match is not None, "csrc/launchers/attention_spec.h has no AttentionSpec"
    member = re.compile(r"^  [\w:]+ (\w+)(?: = [^;]+|\{[^;]*\})?;", re.MULTILINE)
    return member.findall(match.group(1))


def test_native_spec_has_the_fields_of_the_spec():
    assert native_spec_fields() == spec_fields()


@pytest.mark.parametrize("name", ["attributes.cc", "module.cc"])
def test_ffi_decodes_the_fields_of_the_spec(name: str):
    text = (CSRC / "ffi" / name).read_text()
    assert [field for field in spec_fields() if f'"{field}"' not in text] == []


def test_glossary_explains_the_fields_of_the_spec():
    rows = table_rows(ROOT / "docs" / "glossary.md")
    explained = [
        match.group(1) for row in rows if (match := re.match(r"\| `(\w+)`", row))
    ]
    assert [name for name in spec_fields() if name not in explained] == []
