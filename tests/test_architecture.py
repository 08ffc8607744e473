"""The house's plan, held to the code: who may import whom, and how long and how dangerous a file may be."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60

# Room (a folder, or cli.py) -> rooms that its files may import, from the roof to the ground. A room's own files, and
# the ground that a package stands on (cache/errors.py, pipeline/errors.py, ...), are free to all above.
ROOMS: dict[str, str] = {
    "cli": "pipeline/commands",
    "pipeline/commands": "twig/evaluation twig/training phone export export/executorch export/gguf export/llama_cpp "
    "init packing report sweep upkeep conformance inspection benchmarks evaluation teacher_cache distill/training "
    "config models",
    "pipeline/init": "packing upkeep data config models models/mobilevlm models/files",
    "pipeline/report": "twig/evaluation phone sweep evaluation distill/training losses",
    "pipeline/twig/evaluation": "twig/decoding twig inspection evaluation data config models models/files",
    "pipeline/phone": "export export/executorch export/gguf export/llama_cpp evaluation data config models "
    "models/mobilevlm",
    "pipeline/export/llama_cpp": "export/gguf export models/mobilevlm",
    "pipeline/export/gguf": "export config models models/mobilevlm models/files",
    "pipeline/export/executorch": "export config data models models/mobilevlm models/files",
    "pipeline/export": "config data models models/mobilevlm models/files",
    "pipeline/sweep": "evaluation distill distill/training distill/join data config models/files",
    "pipeline/upkeep": "teacher_cache distill distill/model distill/join data config losses models models/files "
    "targets",
    "pipeline/studies/scenes": "studies studies/emoji evaluation data config models/mobilevlm models/files",
    "pipeline/studies/emoji": "studies evaluation data config models models/mobilevlm models/files",
    "pipeline/studies": "evaluation data config models/mobilevlm",
    "pipeline/conformance": "data config models models/mobilevlm models/files targets",
    "pipeline/inspection": "distill/join data config losses models models/files targets",
    "pipeline/benchmarks": "distill/join data config models models/mobilevlm models/files",
    "pipeline/evaluation": "distill distill/training distill/join data config models models/files targets",
    "pipeline/teacher_cache": "data config models targets",
    "pipeline/twig/training": "twig twig/reinforcing distill distill/training distill/model distill/join config "
    "losses models models/files targets",
    "pipeline/distill": "distill/training distill/model distill/join data config models models/files targets",
    "pipeline/distill/training": "distill/model distill/join config losses models models/files",
    "pipeline/distill/model": "distill/join config losses models targets",
    "pipeline/distill/join": "data config losses models models/mobilevlm models/files targets",
    "pipeline/twig/decoding": "twig models",
    "pipeline/twig/reinforcing": "twig losses",
    "pipeline/twig": "config models models/files targets",
    "pipeline/packing": "data",
    "pipeline/data": "config losses models models/mobilevlm models/files targets",
    "pipeline/config": "losses targets",
    "pipeline/losses": "targets",
    "pipeline/models": "models/mobilevlm models/files targets",
    "pipeline/models/mobilevlm": "models/files",
    "pipeline/models/files": "",
    "pipeline/targets": "",
    "pipeline": "",
    "cache/care": "write read format files",
    "cache/write": "format files",
    "cache/read": "format files",
    "cache/format": "files",
    "cache/files": "",
    "cache": "",
}

STORE_LIBRARIES = {
    "blake3",
    "cachetools",
    "numcodecs",
    "numpy",
    "pydantic",
    "zarr",
    "fsspec",
    "google_crc32c",
    "huggingface_hub",
    "tenacity",
}


def _shipped() -> dict[str, ast.Module]:
    files = [ROOT / "cli.py", *(ROOT / "cache").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]
    return {_module_name(file): ast.parse(file.read_text(), str(file)) for file in sorted(files)}


def _module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _file(module: str) -> str:
    path = Path(*module.split("."))
    return str(path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py"))


def _room(module: str) -> str:
    return module if module == "cli" else Path(_file(module)).parent.as_posix()


def _allowed(room: str) -> set[str]:
    """The rooms that a room's files may import: those of its row, itself, and the ground below."""
    package = room.split("/")[0]
    grounds = {"cache", "pipeline"} if package != "cache" else {"cache"}
    rows = {name if name.startswith("pipeline/") else f"{package}/{name}" for name in ROOMS[room].split()}
    return {room} | grounds | rows


SHIPPED = _shipped()


def _imports(tree: ast.AST, *, when_run: bool = False) -> Iterator[str]:
    """Modules that a file imports, also inside functions; `when_run` leaves out what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield from (_imported_from(str(node.module), alias.name) for alias in node.names)
        elif not (when_run and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _imports(node, when_run=when_run)


def _imported_from(package: str, name: str) -> str:
    """The module behind `from package import name`: a submodule, unless the package itself binds the name."""
    submodule = f"{package}.{name}"
    if submodule not in SHIPPED:
        return package
    binds = (
        alias.asname or alias.name
        for node in SHIPPED[package].body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    )
    return package if name in binds else submodule


def _is_store(module: str) -> bool:
    return module.split(".")[0] == "cache"


def _is_front_door(module: str) -> bool:
    """Whether a file hands on the names of the rooms below its folder."""
    return module in ("cache", "pipeline")


def _own_imports(module: str, *, when_run: bool = False) -> set[str]:
    return {name for name in _imports(SHIPPED[module], when_run=when_run) if name in SHIPPED} - {module}


def test_the_table_has_a_row_for_every_folder_that_holds_code_and_no_other():
    assert sorted({_room(module) for module in SHIPPED}) == sorted(ROOMS)


def test_imports_point_down():
    offenders = [
        f"{_file(module)} imports {_file(imported)}"
        for module in SHIPPED
        if not _is_front_door(module)
        for imported in sorted(_own_imports(module))
        if _room(imported) not in _allowed(_room(module))
    ]
    assert not offenders, "\n".join(offenders)


def test_the_table_allows_nothing_that_points_up_and_nothing_that_nobody_uses():
    order = list(ROOMS)
    used = {(_room(m), _room(i)) for m in SHIPPED if not _is_front_door(m) for i in _own_imports(m)}
    for room in ROOMS:
        below = _allowed(room) - {room, "cache", "pipeline"}
        assert all(order.index(name) > order.index(room) for name in below), room
        assert {name for name in below if (room, name) not in used} == set(), room


def test_no_module_imports_itself_through_others():
    graph = {module: _own_imports(module, when_run=True) for module in SHIPPED}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")


def test_the_store_knows_arrays_and_never_models():
    for module in (module for module in SHIPPED if _is_store(module)):
        others = {name.split(".")[0] for name in _imports(SHIPPED[module])} - {"cache"}
        foreign = {name for name in others if not _is_standard(name)} - STORE_LIBRARIES
        assert foreign == set(), f"{_file(module)} imports {foreign}"


def test_outsiders_import_the_store_by_its_front_door():
    outside = {m: tree for m, tree in SHIPPED.items() if not _is_store(m)}
    offenders = [
        f"{_file(module)}: {name}"
        for module, tree in outside.items()
        for name in _imports(tree)
        if name.startswith("cache.")
    ]
    assert not offenders, "\n".join(offenders)


def test_the_command_line_imports_only_typer_until_a_command_runs():
    for module in (m for m in SHIPPED if m == "cli" or m.startswith("pipeline.commands")):
        body = [node for node in SHIPPED[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            name for name in _imports(ast.Module(list(body), [])) if not _is_standard(name.split(".")[0])
        }
        assert {name for name in names if not name.startswith("pipeline.commands")} <= {"typer", "typer.core"}


def test_nothing_unpickles_or_runs_code_that_came_with_data():
    offenders = [
        f"{_file(module)}:{getattr(node, 'lineno', '?')}: {danger}"
        for module, tree in SHIPPED.items()
        for node in ast.walk(tree)
        if (danger := _danger(node))
    ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as pickle",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_look_for_danger_sees(text: str):
    assert any(_danger(node) for node in ast.walk(ast.parse(text)))


def test_the_look_for_danger_lets_safe_loading_pass():
    text = """
from pickle import UnpicklingError
torch.load(file, mmap=True, weights_only=True)
yaml.load(text, Loader=_Loader)
"""
    assert not any(_danger(node) for node in ast.walk(ast.parse(text)))


def test_no_file_and_no_function_outgrew_the_house():
    long_files = [
        f"{_file(module)}: {lines} lines"
        for module in SHIPPED
        if (lines := len((ROOT / _file(module)).read_text().splitlines())) > MAX_FILE_LINES
    ]
    long_functions = [
        f"{_file(module)}:{node.lineno} {node.name}: {length} lines"
        for module, tree in SHIPPED.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long_files + long_functions, "\n".join(long_files + long_functions)


def test_every_module_and_public_function_and_class_says_what_it_is():
    offenders = [
        f"{_file(module)}: the module" for module, tree in SHIPPED.items() if not ast.get_docstring(tree)
    ]
    for module, tree in SHIPPED.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not _is_described(node, tree):
                offenders.append(f"{_file(module)}:{node.lineno} {node.name}")
    assert not offenders, "\n".join(offenders)


def _is_described(node: ast.FunctionDef | ast.ClassDef, tree: ast.Module) -> bool:
    if any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list):
        return True  # its implementation is described
    """Private, or with a docstring; an error may instead stand in the tree that its module's docstring draws."""
    if node.name.startswith("_") or ast.get_docstring(node):
        return True
    drawn = re.search(rf"── {node.name}\b", ast.get_docstring(tree) or "")
    return isinstance(node, ast.ClassDef) and drawn is not None


def _danger(node: ast.AST) -> str:
    """What is dangerous about a piece of code, '' if nothing."""
    if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
        return "trust_remote_code"
    if isinstance(node, ast.Import | ast.ImportFrom):
        unpicklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
        exception_only = [alias.name for alias in node.names] == ["UnpicklingError"]
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        return "unpickling" if unpicklers & set(modules) and not exception_only else ""
    return _dangerous_call(node) if isinstance(node, ast.Call) else ""


def _dangerous_call(call: ast.Call) -> str:
    name = ast.unparse(call.func)
    arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"):
        return name
    if name == "torch.load" and arguments.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    # `_Loader` is pipeline.config.config's own, a SafeLoader.
    if name == "yaml.load" and arguments.get("Loader") not in ("_Loader", "yaml.SafeLoader"):
        return "yaml.load without a safe loader"
    flags = {"trust_remote_code", "allow_pickle", "shell"} & arguments.keys()
    return next((flag for flag in sorted(flags) if arguments[flag] != "False"), "")


def _is_standard(name: str) -> bool:
    return name in sys.stdlib_module_names
