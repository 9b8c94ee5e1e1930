"""Who may know what: read from the library's source, so that a shortcut is seen before it is relied on."""

from __future__ import annotations

import ast
import subprocess
import sys

from support import ROOT

import pytest

pytestmark = pytest.mark.core

LIBRARY = ROOT / "dist_ema"
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in LIBRARY.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

#: From the bottom up. A module imports what stands on its own floor or below, and no two each other in a circle.
FLOORS = {
    "foundation": "errors runtime",
    "time": "schedules",
    "options": "options",
    "where elements lie": "geometry",
    "arithmetic": "kernels",
    "what ranks send each other": "comm",
    "wrappers": "engines",
    "the averaged values": "shadow",
    "models that hold an average": "teacher",
    "bytes in files": "formats storage",
    "checkpoints": "checkpoints dcp",
    "one process": "importers offline planning",
    "what each call does": "core",
    "what users call": "ema functional",
    "commands and trainers": "cli integrations",
}
LAYERS = [{f"dist_ema.{name}" for name in names.split()} for names in FLOORS.values()]
WRAPPERS = ("torch.distributed.fsdp", "torch.nn.parallel", "torch.distributed.tensor", "deepspeed")
TRAINERS = ("composer", "lightning", "pytorch_lightning", "transformers", "accelerate")
#: Calls that touch the file system.
FILE_CALLS = {"open", "fdopen", "pwrite", "pread", "mkdir", "makedirs", "unlink", "rename", "rmtree"}
FILE_CALLS |= {"read_text", "write_text", "read_bytes", "write_bytes", "copyfile", "copytree", "fsync"}
FILE_CALLS |= {"save_file", "load_file", "safe_open", "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory"}
#: Of these modules only; other objects may have methods of such names.
SERIALIZERS = {"torch.save", "torch.load", "pickle.dump", "pickle.load", "np.save", "np.load", "os.replace"}
#: The files of checkpoints and exports; and ``compiler``, which keeps what it builds.
OPENS_FILES = {
    "dist_ema.storage",
    "dist_ema.kernels.compiler",
    "dist_ema.planning.architecture",
    "dist_ema.cli",
    "dist_ema.integrations",
}
OPENS_FILES |= {"dist_ema.formats.torch_save", "dist_ema.formats.dcp_directory", "dist_ema.importers.files"}


def imports(name: str) -> set[str]:
    """Every module that ``name`` imports, at any depth of its code, with the names taken from packages."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    return imported(TREES[name], package)


def imported(tree: ast.Module, package: str) -> set[str]:
    """Every module that code of ``package`` imports, with the names taken from packages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found.add(source)
            found.update(f"{source}.{alias.name}" for alias in node.names)
    return found


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def importers(*packages: str) -> dict[str, list[str]]:
    """Which modules of the library import one of ``packages``, and what."""
    found = {
        name: sorted({module for module in imports(name) if any(inside(module, package) for package in packages)})
        for name in MODULES
    }
    return {name: modules for name, modules in found.items() if modules}


def floor(name: str) -> int:
    """The number of the floor of a module, or of the package that it is in."""
    found = [(member, number) for number, members in enumerate(LAYERS) for member in members if inside(name, member)]
    return max(found, key=lambda one: len(one[0]))[1]  # the package that is nearest


def test_the_source_was_found() -> None:
    """A wrong path would make every test below pass."""
    assert {"dist_ema", "dist_ema.ema", "dist_ema.engines", "dist_ema.engines.deepspeed.zero"} <= MODULES.keys()


def test_time_schedules_and_geometry_do_not_know_torch() -> None:
    pure = [
        f"dist_ema.{name}"
        for name in ("errors", "geometry.runs", "geometry.positions", "schedules", "offline.synthesis")
    ]
    found = importers("torch")
    assert not [name for name in found if name == "dist_ema" or any(inside(name, module) for module in pure)]


def test_arithmetic_does_not_know_process_groups() -> None:
    found = importers("torch.distributed")
    below = [*(f"kernels.{path.stem}" for path in (LIBRARY / "kernels").glob("*.py")), "geometry.runs", "shadow.device"]
    below += ["shadow.host", "shadow.staging", "runtime"]
    assert not [name for name in found if any(inside(name, f"dist_ema.{module}") for module in below)]


def test_only_engines_know_wrappers() -> None:
    """And layouts, which predicts what each rank would hold from the placements that DTensor would give it."""
    outside = {name for name in importers(*WRAPPERS) if not inside(name, "dist_ema.engines")}
    assert outside == {"dist_ema.planning.layouts"}


def test_only_integrations_know_trainers() -> None:
    """And architecture, which has transformers build models without memory, for their shapes."""
    outside = {name: found for name, found in importers(*TRAINERS).items() if not inside(name, "dist_ema.integrations")}
    assert outside == {"dist_ema.planning.architecture": ["transformers"]}


def test_only_storage_touches_files() -> None:
    """A save that opens a file past the storage backends is neither synced nor removed when it fails."""
    found = {name: touched for name in MODULES if (touched := file_calls(name))}
    found = {name: touched for name, touched in found.items() if not any(inside(name, one) for one in OPENS_FILES)}
    assert not found
    seen = file_calls("dist_ema.storage.local") | file_calls("dist_ema.storage.staging")
    assert {"os.pwrite", "self.content.rename", "shutil.rmtree"} <= seen, "sees nothing"


def file_calls(name: str) -> set[str]:
    """Calls in ``name`` that touch the file system; the library's own functions of such a name do not count."""
    tree = TREES[name]
    own = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and inside(node.module or "", "dist_ema")
        for alias in node.names
    }
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)} - own
    return {call for call in calls if call.split(".")[-1] in FILE_CALLS or call in SERIALIZERS}


def test_imports_go_downwards_only() -> None:
    """Also inside functions and for types alone. Public names of the package itself are lazy and the exception."""
    upwards = [
        f"{name} imports {module}"
        for name in MODULES.keys() - {"dist_ema", "dist_ema.__main__"}
        for module in imports(name)
        if module in MODULES and module != "dist_ema" and floor(module) > floor(name)
    ]
    assert not upwards


def in_a_circle(needed_by: dict[str, set[str]]) -> set[str]:
    """The modules that are left when those that need no other one are taken away, again and again."""
    waiting = {name: needed - {name} for name, needed in needed_by.items()}
    while ready := [name for name, needed in waiting.items() if not needed]:
        for name in ready:
            del waiting[name]
        for needed in waiting.values():
            needed -= set(ready)
    return set(waiting)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    needed_by = {}
    for name in MODULES.keys() - {"dist_ema"}:
        needed = {module for module in imports(name) if module in MODULES and module != "dist_ema"}
        # A module of a package loads the package, which imports its modules: the package is left out of their lists.
        needed_by[name] = {module for module in needed if not name.startswith(f"{module}.")}
    assert not in_a_circle(needed_by)


def test_what_torchrun_starts_has_no_circle_either() -> None:
    """Also for types alone: two files that need each other are read as one."""
    folder = ROOT / "launch"
    files = {
        path.relative_to(folder).with_suffix("").as_posix().replace("/", "."): path for path in folder.rglob("*.py")
    }
    needed_by = {name: imported(ast.parse(path.read_text()), name.rpartition(".")[0]) for name, path in files.items()}
    assert "demo.options" in needed_by["demo.resume"], "sees nothing"
    assert not in_a_circle({name: needed & files.keys() for name, needed in needed_by.items()})


def test_nothing_reaches_for_the_package_itself() -> None:
    """``from dist_ema import ShardedEMA`` inside the library would go through the lazy names, in a circle."""
    taken = {
        f"{name} takes {module}"
        for name in MODULES.keys() - {"dist_ema"}
        for module in imports(name)
        if module.count(".") == 1 and inside(module, "dist_ema") and module not in MODULES
    }
    assert not {entry for entry in taken if "dist_ema.__version__" not in entry}


def test_no_assert_and_no_print() -> None:
    """``python -O`` drops an assert; a library's print cannot be turned off."""
    asserts = [name for name, tree in TREES.items() if any(isinstance(node, ast.Assert) for node in ast.walk(tree))]
    assert not asserts
    prints = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "exit")
    }
    assert prints <= {"dist_ema.cli"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import dist_ema", ["torch", "numpy"]),
        ("import dist_ema; dist_ema.schedules.HalfLife('10ba'); dist_ema.errors.EMAError", ["torch", "numpy"]),
        ("import dist_ema.geometry.runs, dist_ema.schedules.clock", ["torch", "numpy"]),
        ("import dist_ema.cli", ["torch", "numpy", "rich"]),
        ("import dist_ema.engines", ["deepspeed", *TRAINERS]),
        ("import dist_ema; dist_ema.ShardedEMA; dist_ema.compute_ema", ["deepspeed", "torch._dynamo", *TRAINERS]),
    ],
)
def test_imports_stay_light(statement: str, absent: list[str]) -> None:
    """``--help`` should not wait seconds for torch, nor a run without DeepSpeed for DeepSpeed."""
    code = f"{statement}; import sys; print(sorted(sys.modules.keys() & {set(absent)!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    code = "import dist_ema; assert 'ShardedEMA' in dir(dist_ema); dist_ema.Sharded"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AttributeError: module 'dist_ema' has no attribute 'Sharded'" in result.stderr
