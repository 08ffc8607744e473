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

# The floors of the house. A new module takes its place here.
FLOORS: dict[str, set[str]] = {
    "command line": {"cli"},
    "commands": {
        "pipeline.commands",
        "pipeline.commands.experiments",
        "pipeline.commands.inspect",
        "pipeline.commands.options",
        "pipeline.commands.reshape",
        "pipeline.commands.share",
        "pipeline.commands.stages",
        "pipeline.commands.store",
    },
    "report": {
        "pipeline.report",
        "pipeline.report.cost",
        "pipeline.report.curve_panels",
        "pipeline.report.findings",
        "pipeline.report.forest",
        "pipeline.report.gather",
        "pipeline.report.headline",
        "pipeline.report.number_format",
        "pipeline.report.page",
        "pipeline.report.run_folder",
        "pipeline.report.sweep_folder",
        "pipeline.report.throughput",
    },
    "sweep": {
        "pipeline.sweep",
        "pipeline.sweep.identity",
        "pipeline.sweep.jobs",
        "pipeline.sweep.lines",
        "pipeline.sweep.run",
        "pipeline.sweep.summary",
        "pipeline.sweep.variations",
    },
    "experiment": {
        "pipeline.experiment",
        "pipeline.demo_card",
        "pipeline.demo_teacher",
        "pipeline.emoji.__main__",
        "pipeline.emoji.alignment",
        "pipeline.emoji.card",
        "pipeline.emoji.looking",
        "pipeline.emoji.teacher",
    },
    "upkeep": {
        "pipeline.card",
        "pipeline.check",
        "pipeline.describe_check",
        "pipeline.describe_plan",
        "pipeline.plan",
        "pipeline.plan_costs",
        "pipeline.repair",
        "pipeline.slices",
    },
    "comparison": {"pipeline.compare", "pipeline.curves", "pipeline.scores"},
    "inspection": {
        "pipeline.inspection",
        "pipeline.inspection.attention_cells",
        "pipeline.inspection.attention_picture",
        "pipeline.inspection.heat_map",
        "pipeline.inspection.sample",
        "pipeline.inspection.sample_text",
        "pipeline.inspection.sheet",
        "pipeline.inspection.sources",
        "pipeline.inspection.token_text",
    },
    "stages": {"pipeline.packing", "pipeline.teacher", "pipeline.student", "pipeline.evaluate"},
    "stage parts": {
        "pipeline.adapters",
        "pipeline.capture",
        "pipeline.data_position",
        "pipeline.dataset",
        "pipeline.describe",
        "pipeline.inputs",
        "pipeline.interruption",
        "pipeline.longest_first",
        "pipeline.missing",
        "pipeline.model_weights",
        "pipeline.overlap",
        "pipeline.part_states",
        "pipeline.pairing",
        "pipeline.processes",
        "pipeline.progress",
        "pipeline.provenance",
        "pipeline.rank_batches",
        "pipeline.recompute",
        "pipeline.resuming",
        "pipeline.rows",
        "pipeline.run_identity",
        "pipeline.stores",
        "pipeline.term_log",
        "pipeline.trainer",
        "pipeline.training_folder",
        "pipeline.workers",
    },
    "config": {
        "pipeline.cache_settings",
        "pipeline.model_settings",
        "pipeline.config",
        "pipeline.training_arguments",
        "pipeline.yaml_text",
    },
    "distillation": {
        "pipeline.distiller",
        "pipeline.divergences",
        "pipeline.heads",
        "pipeline.losses",
        "pipeline.models.stub",
        "pipeline.tail_draws",
        "pipeline.targets",
        "pipeline.vocabulary",
    },
    "data": {
        "pipeline.annotations",
        "pipeline.conversation",
        "pipeline.decoding",
        "pipeline.demo",
        "pipeline.dotted_names",
        "pipeline.emoji",
        "pipeline.emoji.art",
        "pipeline.emoji.concepts",
        "pipeline.emoji.data",
        "pipeline.emoji.language",
        "pipeline.emoji.models",
        "pipeline.emoji.scenes",
        "pipeline.file_names",
        "pipeline.images",
        "pipeline.media",
        "pipeline.pack_again",
        "pipeline.pack_folder",
        "pipeline.pack_images",
        "pipeline.png_text",
        "pipeline.shard_writer",
        "pipeline.shared_prefix",
        "pipeline.shard_identity",
        "pipeline.shards",
        "pipeline.tars",
        "pipeline.templates",
        "pipeline.tokenizer",
    },
    "models": {
        "pipeline.models.broken_files",
        "pipeline.models.checkpoint",
        "pipeline.models.efficientnet",
        "pipeline.models.merge",
        "pipeline.models.configuration",
        "pipeline.models.mobilevlm",
        "pipeline.models.saved_files",
        "pipeline.models.tap",
        "pipeline.models.vision",
    },
    "ground": {
        "pipeline",
        "pipeline.errors",
        "pipeline.memory",
        "pipeline.models",
        "pipeline.positions",
        "pipeline.settings",
        "pipeline.shapes",
    },
    "store": {
        "cache",
        "cache.arrays",
        "cache.chunk_cache",
        "cache.chunks",
        "cache.codec",
        "cache.codecs",
        "cache.columns",
        "cache.differences",
        "cache.documents",
        "cache.durable",
        "cache.errors",
        "cache.index",
        "cache.keys",
        "cache.layout",
        "cache.leases",
        "cache.local_files",
        "cache.locks",
        "cache.mirror",
        "cache.part_folder",
        "cache.part_reader",
        "cache.part_writer",
        "cache.place",
        "cache.push",
        "cache.quantised",
        "cache.reader",
        "cache.records",
        "cache.remote",
        "cache.repair",
        "cache.schema",
        "cache.scratch",
        "cache.subset",
        "cache.summary",
        "cache.taken_keys",
        "cache.verify",
        "cache.verify_part",
        "cache.writer",
    },
}

# Floor -> floors that its modules may import. A floor that lists itself lets its modules import each other.
MAY_IMPORT: dict[str, set[str]] = {
    "command line": {"commands", "ground", "store"},
    "commands": {
        "commands",
        "report",
        "inspection",
        "sweep",
        "experiment",
        "comparison",
        "upkeep",
        "stages",
        "stage parts",
        "config",
        "store",
    },
    "report": {
        "report",
        "sweep",
        "experiment",
        "comparison",
        "stages",
        "stage parts",
        "distillation",
        "ground",
        "store",
    },
    "sweep": {"sweep", "comparison", "stages", "stage parts", "config", "models", "ground", "store"},
    "experiment": {"comparison", "stages", "stage parts", "config", "data", "models", "ground"},
    "upkeep": {
        "upkeep",
        "comparison",
        "stages",
        "stage parts",
        "config",
        "distillation",
        "data",
        "ground",
        "store",
    },
    "comparison": {"stages", "stage parts", "config", "data", "models", "ground", "store"},
    "inspection": {
        "inspection",
        "stage parts",
        "config",
        "distillation",
        "data",
        "models",
        "ground",
        "store",
    },
    "stages": {"stage parts", "config", "distillation", "data", "models", "ground", "store"},
    "stage parts": {"stage parts", "config", "distillation", "data", "models", "ground", "store"},
    "config": {"config", "distillation", "ground"},
    "distillation": {"distillation", "models", "ground", "store"},
    "data": {"data", "models", "ground", "store"},
    "models": {"models", "ground"},
    "ground": set(),
    "store": {"store"},
}

# The demo's teacher is itself an experiment: its card is measured with the other's function.
ALSO: set[tuple[str, str]] = {
    ("pipeline.demo_teacher", "pipeline.demo_card"),
    ("pipeline.emoji.__main__", "pipeline.emoji.card"),
    ("pipeline.emoji.__main__", "pipeline.emoji.looking"),
    ("pipeline.emoji.looking", "pipeline.emoji.alignment"),
    ("pipeline.emoji.__main__", "pipeline.emoji.teacher"),
    ("pipeline.emoji.alignment", "pipeline.demo_teacher"),
    ("pipeline.emoji.teacher", "pipeline.demo_teacher"),
    ("pipeline.emoji.teacher", "pipeline.emoji.alignment"),
}

STORE_LIBRARIES = {
    "blake3",
    "numcodecs",
    "numpy",
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


SHIPPED = _shipped()
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}


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


def _own_imports(module: str, *, when_run: bool = False) -> set[str]:
    return {name for name in _imports(SHIPPED[module], when_run=when_run) if name in SHIPPED} - {module}


def _is_allowed(module: str, imported: str) -> bool:
    return FLOOR_OF[imported] in MAY_IMPORT[FLOOR_OF[module]] or (module, imported) in ALSO


def test_every_module_has_one_floor_and_every_floor_only_modules_that_exist():
    assert sorted(FLOOR_OF) == sorted(SHIPPED)
    assert sum(map(len, FLOORS.values())) == len(FLOOR_OF)
    assert list(MAY_IMPORT) == list(FLOORS)


def test_imports_point_down():
    offenders = [
        f"{_file(module)} ({FLOOR_OF[module]}) imports {imported} ({FLOOR_OF[imported]})"
        for module in SHIPPED
        for imported in sorted(_own_imports(module))
        if not _is_allowed(module, imported)
    ]
    assert not offenders, "\n".join(offenders)


def test_the_table_allows_nothing_that_points_up_and_nothing_that_nobody_uses():
    order = list(FLOORS)
    for floor, allowed in MAY_IMPORT.items():
        assert all(order.index(below) >= order.index(floor) for below in allowed), floor
    used = {(FLOOR_OF[m], FLOOR_OF[i]) for m in SHIPPED for i in _own_imports(m)}
    unused = [(f, below) for f, allowed in MAY_IMPORT.items() for below in allowed if (f, below) not in used]
    assert sorted(unused) == []
    assert all(imported in _own_imports(module) for module, imported in ALSO)


def test_no_module_imports_itself_through_others():
    graph = {module: _own_imports(module, when_run=True) for module in SHIPPED}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")


def test_the_stages_do_not_know_each_other():
    stages = FLOORS["stages"]
    assert {stage: _own_imports(stage) & stages for stage in stages} == {stage: set() for stage in stages}


def test_the_store_knows_arrays_and_never_models():
    for module in FLOORS["store"]:
        others = {name.split(".")[0] for name in _imports(SHIPPED[module])} - {"cache"}
        foreign = {name for name in others if not _is_standard(name)} - STORE_LIBRARIES
        assert foreign == set(), f"{_file(module)} imports {foreign}"


def test_outsiders_import_the_store_by_its_front_door():
    outside = {m: tree for m, tree in SHIPPED.items() if FLOOR_OF[m] != "store"}
    offenders = [
        f"{_file(module)}: {name}"
        for module, tree in outside.items()
        for name in _imports(tree)
        if name.startswith("cache.")
    ]
    assert not offenders, "\n".join(offenders)


def test_the_command_line_imports_only_typer_until_a_command_runs():
    for module in ["cli", *FLOORS["commands"]]:
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
    # `_Loader` is pipeline.config's own, a SafeLoader.
    if name == "yaml.load" and arguments.get("Loader") not in ("_Loader", "yaml.SafeLoader"):
        return "yaml.load without a safe loader"
    flags = {"trust_remote_code", "allow_pickle", "shell"} & arguments.keys()
    return next((flag for flag in sorted(flags) if arguments[flag] != "False"), "")


def _is_standard(name: str) -> bool:
    return name in sys.stdlib_module_names
