"""Which module may import which, read from the syntax trees."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vqvae"
SCRIPTS = [ROOT / "train.py", ROOT / "visualize_codes.py"]

# module or package -> those it may import; a new module needs a row
ALLOWED: dict[str, set[str]] = {
    # what everything else may know
    "errors": set(),
    "contracts": {"errors"},
    "metrics": {"features", "ssim"},
    "features": {"archives", "errors", "files"},
    "ssim": set(),
    "optimizer": set(),
    "flows": set(),
    "randomness": set(),
    "registry": {"errors"},
    "schedules": {"errors", "registry"},
    "files": {"errors"},
    "devices": {"errors"},
    "interrupts": set(),
    "distributed": {"errors", "interrupts"},
    "shares": {"distributed"},
    "batch_norm": {"distributed"},
    # the slots
    "data": {"archives", "decoding", "errors", "files", "progress", "randomness", "registry", "shares", "workers"},
    "nets": {"batch_norm", "contracts", "errors", "registry", "vqgan"},
    "vqgan": {"devices"},
    "bottlenecks": {"contracts", "devices", "distributed", "errors", "flows", "registry", "schedules", "shares"},
    "sampling": {"registry"},
    "priors": {"contracts", "devices", "errors", "flows", "registry", "sampling", "shares"},
    "likelihoods": {"contracts", "errors", "registry", "shares"},
    "objectives": {"contracts", "errors", "optimizer", "registry", "schedules", "shares"},
    "autoencoder": {"bottlenecks", "contracts", "devices", "errors", "likelihoods", "nets", "priors", "registry"},
    # training
    "evaluation": {
        "autoencoder", "contracts", "distributed", "errors", "features", "metrics", "randomness", "shares",
    },
    "probe": {"autoencoder", "data", "errors"},
    "assessment": {
        "__init__", "autoencoder", "checkpoint", "config", "data", "distributed", "errors", "evaluation", "features",
        "files", "metrics", "probe", "progress", "randomness", "runs", "schedules", "training",
    },
    "stage_one": {"autoencoder", "batch_norm", "contracts", "distributed", "evaluation", "metrics", "shares"},
    "stage_two": {
        "archives", "autoencoder", "checkpoint", "contracts", "data", "distributed", "evaluation", "files", "metrics",
        "optimizer", "progress",
    },
    "runs": {"checkpoint", "errors", "files", "metrics"},
    "progress": {"distributed", "metrics"},
    "averaging": set(),
    "training": {
        "averaging", "batch_norm", "contracts", "data", "devices", "distributed", "errors", "interrupts", "optimizer",
        "progress", "randomness", "runs", "schedules", "shares",
    },
    # settings and files
    "presets": set(),
    "config": {"errors", "presets", "registry", "schedules"},
    "archives": {"files"},
    "decoding": {"files", "registry"},
    "workers": {"decoding", "errors", "interrupts"},
    "entries": {"config", "errors", "evaluation", "registry"},
    "checkpoint": {
        "archives", "autoencoder", "config", "entries", "errors", "files", "foreign", "metrics", "objectives",
        "registry",
    },
    "foreign": {"autoencoder", "config", "contracts", "errors", "files", "likelihoods", "nets", "registry"},
    "tokens": {
        "archives", "autoencoder", "checkpoint", "contracts", "data", "decoding", "devices", "distributed", "errors",
        "files", "progress", "registry",
    },
    "programs": {"autoencoder", "errors", "files"},
    "card": {"autoencoder", "config", "errors", "metrics", "registry"},
    "export": {"autoencoder", "card", "checkpoint", "errors", "files", "foreign", "programs"},
    "fonts": {"errors"},
    "plots": {"errors", "files", "fonts", "metrics"},
    "page": {"errors"},
    "compare": {"checkpoint", "errors", "metrics", "runs"},
    # the program
    "cli": {"errors", "files", "interrupts", "registry"},
    "report": {
        "autoencoder", "checkpoint", "contracts", "devices", "errors", "files", "metrics", "page", "plots",
        "randomness", "registry", "runs", "sampling",
    },
    "summary": {"autoencoder", "cli", "config", "data", "distributed", "errors", "registry", "runs", "training"},
    "run_data": {"autoencoder", "config", "data", "distributed", "errors", "summary"},
    "two_stages": {"autoencoder", "cli", "config", "contracts", "data", "errors", "presets", "runs", "training"},
    "experiment": {
        "assessment", "autoencoder", "checkpoint", "cli", "config", "contracts", "data", "devices", "distributed",
        "errors", "evaluation", "features", "files", "interrupts", "metrics", "objectives", "plots", "presets",
        "priors", "randomness", "registry", "report", "run_data", "runs", "schedules", "stage_one", "stage_two",
        "summary", "training", "two_stages",
    },
    "commands": {
        "checkpoint", "cli", "compare", "config", "data", "devices", "distributed", "errors", "experiment",
        "export", "files", "metrics", "presets", "registry", "report", "sampling", "tokens",
    },
    "__main__": {"__init__", "cli", "errors", "interrupts"},
    "layers": {"bottlenecks", "contracts", "devices", "errors", "registry"},
    "__init__": {"checkpoint", "layers"},
}  # fmt: skip
HEAVY = {"matplotlib", "sklearn", "scipy", "tensorboard", "torchvision", "imageio", "PIL", "triton"}
HEAVY |= {"onnx", "onnxscript", "onnxruntime", "diffusers", "torch_fidelity", "lpips"}
# these print or parse flags; all other modules serve Python users too
COMMAND_LINE = {"cli", "commands", "config", "presets", "experiment", "report", "summary", "__main__"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def dotted(path: Path) -> str:
    """`bottlenecks.vq`, `data` for data/__init__.py, `__init__` for the package's own."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): parse(path) for path in sorted(PACKAGE.rglob("*.py"))}
EVERY_MODULE = pytest.mark.parametrize("name", MODULES)


def without(node: ast.AST, skip: type | tuple[type, ...]) -> Iterator[ast.AST]:
    """Every node below this one, except those inside nodes of the types in `skip` and blocks `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        only_types = isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        if not only_types and not isinstance(child, skip):
            yield child
            yield from without(child, skip)


def run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node except those inside functions, which do not run on import."""
    return without(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that are imported, with a leading dot if relative."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def ours(tree: ast.AST) -> set[str]:
    """Modules of this package that a module imports, also inside functions."""
    found = set()
    for name in imports(without(tree, ())):
        if name.startswith("."):
            found.add(name)  # no row allows a relative import
        elif name == "vqvae" or name.startswith("vqvae."):
            parts = name.split(".")[1:]
            prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            found.add(next((prefix for prefix in prefixes if prefix in MODULES), "__init__"))
    return found


def texts(tree: ast.AST) -> Iterator[str]:
    """String literals, without docstrings."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_every_module_imports_only_what_it_may():
    found: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        room = name.split(".")[0]
        found.setdefault(room, set()).update(used.split(".")[0] for used in ours(tree))
    found = {room: used - {room} for room, used in found.items()}
    assert found == ALLOWED, "a row must allow no more than is used"


def test_there_is_no_cycle():
    graph = {name: ours(tree) for name, tree in MODULES.items() if name != "__init__"}
    while graph:
        leaves = [name for name, used in graph.items() if not used & set(graph)]
        assert leaves, f"a cycle among {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


@EVERY_MODULE
def test_heavy_libraries_are_imported_where_they_are_used(name):
    heavy = HEAVY - ({"triton"} if name == "bottlenecks.nearest_triton" else set())
    assert not {used.split(".")[0] for used in imports(run_on_import(MODULES[name]))} & heavy


@EVERY_MODULE
def test_library_modules_know_no_command_line(name):
    if name.split(".")[0] not in COMMAND_LINE:
        assert [text for text in texts(MODULES[name]) if re.search("--[a-z]", text)] == []


@EVERY_MODULE
def test_no_module_asks_an_object_what_it_has(name):
    calls = (node.func for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call))
    assert "hasattr" not in {call.id for call in calls if isinstance(call, ast.Name)}


@pytest.mark.parametrize(
    "path", [*sorted(PACKAGE.rglob("*.py")), *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_assert_guards_against_users(path):
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(parse(path)))


def test_scripts_are_short_and_nothing_imports_them():
    assert all(len(path.read_text().splitlines()) < 130 for path in SCRIPTS)
    for path in (file for folder in ("vqvae", "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py")):
        used = {name.split(".")[0] for name in imports(ast.walk(parse(path)))}
        assert not used & {script.stem for script in SCRIPTS}, path


def test_these_checks_see_through_disguises():
    hidden = ast.parse("try:\n  from scipy import stats\nexcept ImportError:\n  pass\ndef f():\n  import sklearn")
    assert imports(run_on_import(hidden)) == {"scipy.stats"}
    assert ours(ast.parse("from .training import Plan")) == {".training.Plan"}
    assert ours(ast.parse("def f():\n  import vqvae.training")) == {"training"}
    assert ours(ast.parse("from vqvae import __version__, distributed")) == {"__init__", "distributed"}
    assert ours(ast.parse("from vqvae.data.base import scale")) == {"data.base"}
    assert ours(ast.parse("if TYPE_CHECKING:\n  from vqvae.autoencoder import Elbo")) == set()
    assert ours(ast.parse("if not TYPE_CHECKING:\n  from vqvae.autoencoder import Elbo")) == {"autoencoder"}
    assert list(texts(ast.parse('"""--help"""\nx = f"--{y} --seed"'))) == ["--", " --seed"]


@EVERY_MODULE
def test_docstrings_name_their_subject(name):
    """A docstring that begins with "What" makes its reader wait for the noun."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(MODULES[name]) if isinstance(node, documented)]
    assert not [text for text in found if text.startswith("What ")]
