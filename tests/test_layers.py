"""Imports run downward only, and Ray stays in the rooms that distribute."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# room -> rooms it may import; "pipeline." is left out, and a room may always import itself
ALLOWED = {
    "draw": set(),
    "storage": set(),
    "models": set(),
    "lease": {"storage"},
    "evaluation": {"storage"},
    "sources": {"storage", "draw"},
    "shards": {"sources", "storage", "lease", "draw"},
    "loading": {"shards.tar", "shards.index", "storage", "draw"},
    "registry": {"storage"},
    "training": {
        "loading",
        "models",
        "evaluation",
        "registry",
        "shards.index",
        "shards.pinned",
        "storage",
        "lease",
        "draw",
    },
    "nightly": {"training", "loading", "evaluation", "registry", "shards", "sources", "storage", "lease", "draw"},
}
RAY = {"pipeline.shards.build", "pipeline.predict"}
RAY |= {f"pipeline.training.{name}" for name in ("attempt", "room", "gloo")}


def modules():
    for folder in ("pipeline", "jobs", "cluster"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, ast.parse(file.read_text())


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out from the top"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_of_the_library_import_downward_only():
    wrong = []
    for name, tree in modules():
        if not name.startswith("pipeline.") or name == "pipeline":
            continue
        room = name.split(".")[1]
        for target in imports(tree):
            if target.startswith(("jobs", "cluster")):
                wrong.append(f"{name} imports {target}")
            elif target.startswith("pipeline."):
                inside = target.removeprefix("pipeline.")
                allowed = ALLOWED[room] | {room}
                if not any(inside == a or inside.startswith(f"{a}.") for a in allowed):
                    wrong.append(f"{name} imports {target}")
    assert not wrong


def test_ray_is_imported_only_where_work_is_distributed():
    for name, tree in modules():
        if any(target.split(".")[0] == "ray" for target in imports(tree)):
            assert name in RAY or name.startswith(("jobs.", "cluster.")), name


def test_the_cluster_knows_at_most_storage_of_the_library():
    for name, tree in modules():
        if name.startswith("cluster"):
            assert all(
                not t.startswith(("jobs", "pipeline")) or t.startswith("pipeline.storage") for t in imports(tree)
            )


def test_a_verb_never_imports_a_verb():
    shared = ("jobs.command", "jobs.presets", "jobs.report_page", "jobs.job_words", "jobs.dataset_", "jobs.bench.")
    shared += ("jobs.nights", "jobs.demo_nights")
    for name, tree in modules():
        for target in imports(tree):
            if target.startswith("jobs.") and not name.startswith("jobs.__"):
                assert target.startswith(shared), f"{name} imports {target}"
            if target == "jobs" or (target.startswith("jobs.bench") and not name.startswith("jobs.bench")):
                raise AssertionError(f"{name} imports {target}")


def test_nothing_is_named_after_nothing():
    empty = {"utils", "util", "common", "helpers", "base", "manager", "factory", "callbacks", "misc"}
    assert not [name for name, _ in modules() if empty & set(name.split("."))]
