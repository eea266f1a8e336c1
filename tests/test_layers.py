"""The house rules that a reader relies on: imports run one way, packages are plain folders, files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from svam.code import digest_of, imported_names, module_file
from tests import ROOT

# Each layer may import itself and those before it; what stands in one set must not import one another.
LAYERS: list[set[str]] = [
    {
        "svam.sections", "svam.protocols", "svam.conversion", "svam.params", "svam.contract", "svam.actions",
        "svam.normalisation", "svam.files", "svam.films", "svam.npy", "svam.errors", "svam.console", "svam.processes",
        "svam.launch", "svam.shares", "svam.seeds",
        "svam.device", "svam.precision", "svam.checkpoint", "svam.resume", "svam.code",
    },
    {"svam.sources"}, {"svam.episodes"}, {"svam.models"}, {"svam.training"}, {"svam.simulation"}, {"svam.serving"},
    {"svam.evaluation"}, {"svam.agreement"}, {"svam.report"}, {"svam.publish"},
    {"svam.analysis"}, {"svam.presets"}, {"svam.experiments"}, {"svam.benchmark"}, {"stages"},
]  # fmt: skip
FORBIDDEN = [("svam.episodes", "svam.models"), ("svam.models", "svam.episodes")]
# Modules of `models` that others there may be built from; only these assemble.
ASSEMBLERS = {"generator", "foresight", "svam", "control"}
SHARED_IN_MODELS = {"attention", "depth_anything_3", "diffusion", "families", "layouts", "manifest", "published", "views"}
# A library that is heavy or may be absent -> the files that may import it, and only within functions or lazily loaded modules.
LAZY = {
    "metaworld": {"svam/simulation/metaworld.py", "svam/simulation/experts.py", "svam/simulation/collect.py"},
    "mujoco": {f"svam/simulation/{name}.py" for name in ("collect", "looks", "metaworld", "rendering")},
    "calvin_env": {"svam/simulation/calvin.py"},
    "hydra": {"svam/simulation/calvin.py"},
    "libero": {"svam/simulation/libero.py"},
    "omegaconf": {"svam/simulation/calvin.py"},
    "robosuite": {"svam/simulation/libero.py"},
    "websockets": {"svam/serving/server.py", "svam/serving/client.py"},
    "msgpack": {"svam/serving/protocol.py"},
}
SOURCES = sorted(p for folder in ("svam", "stages") for p in (ROOT / folder).rglob("*.py"))
NAMES = [p.relative_to(ROOT).as_posix() for p in SOURCES]


def module_of(file: Path) -> str:
    return ".".join(p for p in file.relative_to(ROOT).with_suffix("").parts if p != "__init__")


def layer_of(module: str) -> int | None:
    for number, layer in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in layer):
            return number
    return None


@cache
def direct_imports(file: Path) -> set[str]:
    return imported_names(file.read_text(encoding="utf-8"))


def own_imports(file: Path) -> set[str]:
    """Modules of ours that a file imports, as dotted names of real modules."""
    found = {module_file(name) for name in direct_imports(file)}
    return {module_of(path) for path in found if path is not None} - {"svam", "stages"}


def test_imports_run_one_way() -> None:
    for file in SOURCES:
        module, here = module_of(file), layer_of(module_of(file))
        if module in ("svam", "stages"):
            continue
        assert here is not None, f"{module} belongs to no layer"
        for imported in own_imports(file):
            there = layer_of(imported)
            assert there is not None, f"{module} imports {imported}, which belongs to no layer"
            assert there <= here, f"{module} imports {imported} of a later layer"
            for package, other in FORBIDDEN:
                assert not (module.startswith(package) and imported.startswith(other)), f"{module} imports {imported}"
            assert imported.split(".")[0] != "stages" or module.startswith("stages"), f"{module} imports the stage {imported}"


def test_models_are_assembled_in_four_places_only() -> None:
    for file in (ROOT / "svam/models").glob("[a-z]*.py"):
        siblings = {m.split(".")[2] for m in own_imports(file) if m.startswith("svam.models.")} - {file.stem} - SHARED_IN_MODELS
        assert file.stem in ASSEMBLERS or not siblings, f"{file.name} imports {sorted(siblings)}"


def test_the_foresight_half_knows_no_policy() -> None:
    reached, todo = set(), [ROOT / "svam/models/foresight.py"]
    while todo:
        for module in own_imports(todo.pop()):
            path = module_file(module)
            if module not in reached and path is not None:
                reached.add(module)
                todo.append(path)
    assert "svam.models.video" in reached
    assert not reached & {"svam.models.perceiver", "svam.models.policy", "svam.models.svam"}


def test_packages_hold_a_docstring_only() -> None:
    """But for one line in `svam`, which must run before anything imports torch."""
    for name in (name for name in NAMES if name.endswith("__init__.py")):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert (digest_of(text) == digest_of("") or name == "svam/__init__.py") and ast.get_docstring(ast.parse(text)), name


def test_simulators_and_server_libraries_are_imported_in_their_own_files() -> None:
    for name in NAMES:
        for imported in direct_imports(ROOT / name):
            allowed = LAZY.get(imported.split(".")[0])
            assert allowed is None or name in allowed, f"{name} imports {imported}"


def test_no_import_loads_a_simulator_or_gl() -> None:
    """Importing every stage leaves the simulator, OpenGL and the server's library alone: data from elsewhere needs none."""
    modules = [module_of(ROOT / n) for n in NAMES if n.startswith("stages/") and not n.endswith("__init__.py")]
    code = "\n".join([*(f"import {m}" for m in modules), "import sys", "print(*sorted(m.split('.')[0] for m in sys.modules))"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"mujoco", "metaworld", "OpenGL", "glfw", "pybullet", "hydra", "libero", "websockets"} & set(done.stdout.split())


def test_params_need_no_torch() -> None:
    code = "import sys, svam.params; print([m for m in ('torch', 'zarr', 'mujoco', 'diffusers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_check_of_params_needs_no_torch() -> None:
    """Which takes seconds, and it runs before everything."""
    code = "import sys, stages.check_params; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_are_short_and_stages_thin() -> None:
    python = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / ".ci").rglob("*.py"))]
    lengths = {p.relative_to(ROOT): len(p.read_text(encoding="utf-8").splitlines()) for p in python}
    assert not [p for p, lines in lengths.items() if lines > (60 if p.parts[0] == "stages" else 500)]


def test_nothing_is_unpickled() -> None:
    """But for CALVIN's annotations, by a reader that knows no names but its own."""
    names = [name for name in NAMES if name != "svam/sources/_restricted_pickle.py"]
    forbidden = re.compile(r"\bpickle\b|torch\.load\b|allow_pickle(?!=False)|torch\.save\b|\bjoblib\b|weights_only")
    found = [f"{n}: {m.group()}" for n in names for m in forbidden.finditer((ROOT / n).read_text(encoding="utf-8"))]
    assert not found
    unsafe = {"pickle", "dill", "joblib", "shelve", "marshal"}
    assert not [n for n in names if unsafe & {i.split(".")[0] for i in direct_imports(ROOT / n)}]
