"""Who may import whom, held by the syntax tree."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vqvae"

# module -> what of ours it may import; a new module needs a row
ALLOWED = {
    "__init__": {"checkpoint"},
    "errors": set(),
    "latent": set(),
    "flows": {"errors"},
    "members": {"errors"},
    "schedules": {"errors"},
    "devices": {"errors"},
    "ranks": {"errors"},
    "config": {"errors", "members"},
    "pictures": {"errors"},
    "data": {"errors", "members", "pictures"},
    "nets": {"errors"},
    "likelihoods": {"errors"},
    "bottlenecks": {"bottlenecks", "errors", "flows", "latent", "ranks", "schedules"},
    "priors": {"priors", "errors", "flows", "latent"},
    "autoencoder": {"bottlenecks", "errors", "latent", "likelihoods", "members", "nets", "priors", "schedules"},
    "stage_two": {"autoencoder", "latent"},
    "evaluation": {"bottlenecks"},
    "checkpoint": {"autoencoder", "config", "errors"},
    "files": {"errors"},
    "tokens": {"autoencoder", "errors", "files", "pictures", "stage_two"},
    "export": {"autoencoder", "checkpoint", "errors", "files", "stage_two"},
    "__main__": {"checkpoint", "config", "data", "devices", "errors", "export", "files", "members", "tokens"},
    "runs": {"checkpoint", "errors"},
    "training": {"data", "devices", "errors", "ranks", "runs", "schedules"},
    "figures": set(),
}
HEAVY = {"matplotlib", "sklearn", "scipy", "tensorboard", "torchvision", "imageio", "PIL"}


def modules() -> dict[str, list[ast.Module]]:
    """Every module, a package's files under the package's name."""
    found: dict[str, list[ast.Module]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        found.setdefault(name, []).append(ast.parse(path.read_text()))
    return found


def imports(nodes) -> set[str]:
    """What the nodes import, `from . import x` as `..x`, which no table allows."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def run_on_import(node: ast.AST):
    """Every node below this one but those inside functions, which run later."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from run_on_import(child)


def ours(trees: list[ast.Module]) -> set[str]:
    names = imports(node for tree in trees for node in ast.walk(tree))
    return {name.split(".")[1] for name in names if name.startswith(("vqvae.", "."))}


def test_every_module_imports_only_what_it_may():
    for name, trees in modules().items():
        assert ours(trees) <= ALLOWED[name], name


def test_there_is_no_cycle():
    graph = {name: ours(trees) - {name} for name, trees in modules().items() if name != "__init__"}
    while graph:
        leaves = [name for name, uses in graph.items() if not uses & set(graph)]
        assert leaves, f"a cycle among {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


def test_heavy_libraries_are_imported_where_they_are_used():
    for name, trees in modules().items():
        top = imports(node for tree in trees for node in run_on_import(tree))
        assert not {n.split(".")[0] for n in top} & HEAVY, name


def test_triton_is_imported_where_a_gpu_asks_for_it():
    for path in PACKAGE.rglob("*.py"):
        top = imports(run_on_import(ast.parse(path.read_text())))
        assert path.stem == "nearest_triton" or not any("triton" in name for name in top), path


def test_these_checks_see_through_disguises():
    hidden = ast.parse("try:\n  from scipy import stats\nexcept ImportError:\n  pass\ndef f():\n  import sklearn")
    assert imports(run_on_import(hidden)) == {"scipy.stats"}
    assert not ours([ast.parse("from .training import Plan")]) <= set().union(*ALLOWED.values())
    assert ours([ast.parse("def f():\n  import vqvae.training")]) == {"training"}


def test_no_assert_guards_against_users():
    for path in [*PACKAGE.rglob("*.py"), ROOT / "train.py", ROOT / "visualize_codes.py"]:
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), path
