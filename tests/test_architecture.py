"""The rules of docs/architecture.md, checked on the source text; every message says what to do."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import vamoh
from vamoh.ops import status

ROOT = Path(__file__).resolve().parents[1]
DOCS = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/*.md"))]

HELPERS = {"_version", "_checks", "_cache", "_files", "_initial", "_lock", "_options", "_progress", "_shown"}
ROOMS = (
    "grids", "points", "layout", "encoding", "geometry", "encoder", "latent", "hypernet", "gating", "likelihood",
    "generator", "elbo",
)  # fmt: skip

# What a part of the package may import of it, besides itself and the helpers.
KNOWS: dict[str, set[str]] = {
    **{
        part: set()
        for part in (*HELPERS, "__init__", "config", "metrics", "masks", "figures", "runlog", "kernels", "distributed")
    },
    **{room: {"ops", *ROOMS[:i]} for i, room in enumerate(ROOMS)},
    "layout": set(),
    "ops": {"layout"},
    "model": {"ops", *ROOMS},
    "data": {"points"},
    "checkpoint": {"config", "model"},
    "resume": {"config", "data"},
    "trainer": {
        "checkpoint",
        "config",
        "data",
        "distributed",
        "elbo",
        "masks",
        "metrics",
        "model",
        "points",
        "resume",
    },
    "interrupts": {"distributed"},
    "train": {"checkpoint", "config", "data", "distributed", "interrupts", "model", "resume", "runlog", "trainer"},
    "export": {"gating", "model", "ops", "points"},
    "evaluate": {"data", "masks", "metrics", "model", "points"},
    "prior": {"checkpoint", "data", "evaluate", "model"},
    "compat": {"checkpoint", "config", "encoder", "gating", "generator", "geometry", "latent", "model", "points"},
    "arguments": {"config"},
    "cli": {"arguments", "commands", "compat", "config"},
    "__main__": {"cli"},
}
KNOWS["commands"] = {*KNOWS} - {"cli", "__main__", "kernels"}

RANDOM = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "normal_", "uniform_",
    "bernoulli", "bernoulli_", "multinomial", "exponential_", "dropout", "manual_seed", "Generator", "default_rng",
}  # fmt: skip


@functools.cache
def nodes(text: str) -> tuple[ast.AST, ...]:
    """Every node of a file's syntax tree; each file is read by a dozen rules."""
    return tuple(ast.walk(ast.parse(text)))


class Source(NamedTuple):
    """A Python file: its module name, with __init__ where it is a package, and its text."""

    module: str
    text: str

    def walk(self) -> tuple[ast.AST, ...]:
        """Every node of the syntax tree."""
        return nodes(self.text)

    def within(self, package: str) -> bool:
        """Whether the module is `package` or lies in it."""
        return self.module == package or self.module.startswith(package + ".")


Found = Iterator[tuple[int, str]]
Rule = Callable[[Source], Found]


def part_of(name: str) -> str:
    """`vamoh.ops.knn` -> `ops`, `vamoh` -> `__init__`."""
    return [*name.split("."), "__init__"][1]


def last_name(node: ast.AST) -> str:
    """`rand` of `torch.rand` and of `rand`."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def imports(source: Source, *, for_types: bool = True) -> Found:
    """Line and full name of whatever a file imports anywhere; `for_types` False leaves TYPE_CHECKING blocks out."""
    skipped: set[ast.AST] = set()
    for node in source.walk():
        if isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING" and not for_types:
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = source.module.split(".")[: -node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and last_name(node.func) == "import_module":
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def names(source: Source) -> Found:
    """Line and last name of every name and attribute."""
    for node in source.walk():
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, last_name(node)


def imports_only_what_it_may_know(source: Source) -> Found:
    if not source.within("vamoh"):
        return
    part = part_of(source.module)
    if part not in KNOWS:
        yield 1, f"vamoh/{part} is new: give it a line in docs/architecture.md and in KNOWS of this test"
        return
    for line, name in imports(source, for_types=part != "__init__"):
        target = part_of(name) if part_of(name) in KNOWS else "__init__"
        if not name.startswith("vamoh") or part_of(name) in ("_native", "kernels"):
            continue
        if target == part or target in HELPERS | KNOWS[part]:
            continue
        if part == "__init__":
            advice = "import vamoh must load nothing; add the name to _HOMES"
        elif target == "config":
            advice = "take the plain values it needs as arguments"
        elif part == "ops":
            advice = "an op knows _checks, layout and the helper files of ops; take tensors and numbers"
        elif part in ROOMS:
            advice = f"a room knows ops and the rooms before it ({', '.join(ROOMS)}); let vamoh/model.py pass the value"
        else:
            allowed = ", ".join(sorted(KNOWS[part])) or "no other part"
            advice = f"{part} may import {allowed}; move the code, or change docs/architecture.md and KNOWS"
        yield line, f"imports {name}: {advice}"


def ops_do_not_know_each_other(source: Source) -> Found:
    if not source.within("vamoh.ops") or source.module == "vamoh.ops.__init__":
        return
    for line, name in imports(source):
        if name.startswith("vamoh.ops") and [*name.split("."), ""][2] not in HELPER_FILES:
            yield line, f"imports {name}: move what two ops share into a file of vamoh/ops that declares no op"


def compiled_code_stays_behind_the_backend(source: Source) -> Found:
    for line, name in imports(source):
        if name.split(".")[0] == "kernels":
            yield line, f"imports {name}: a second copy of the module; its name is vamoh.kernels"
        elif (
            source.within("vamoh")
            and part_of(name) in ("_native", "kernels")
            and name.startswith("vamoh.")
            and source.module != "vamoh.ops._native"
            and not source.within("vamoh.kernels")
        ):
            yield line, f"imports {name}: load it lazily in vamoh/ops/_native.py, so that vamoh works without it"


def nothing_is_unpickled(source: Source) -> Found:
    """Loading a pickle runs what its author wrote."""
    if not source.within("vamoh"):
        return
    for line, name in imports(source):
        unsafe = name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
        if unsafe and name != "pickle.UnpicklingError":  # which torch.load raises
            yield line, f"imports {name}: store plain values, which nobody has to trust"
    wanted = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    for node in source.walk():
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (*wanted, "numpy.load"):
            name, value = wanted["torch.load" if "torch" in ast.unparse(node.func) else "np.load"]
            if not any(
                k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in node.keywords
            ):
                yield node.lineno, f"loads without {name}={value}: say so, whatever the default"
        if isinstance(node, ast.Attribute | ast.Name):
            name = last_name(node)
            if name in (
                "broadcast_object_list",
                "all_gather_object",
                "gather_object",
                "scatter_object_list",
                "send_object_list",
                "recv_object_list",
                "read_pickle",
                "unsafe_load",
                "UnsafeLoader",
            ):
                yield node.lineno, f"uses {name}, which unpickles: send tensors"


def only_the_cli_knows_tyro(source: Source) -> Found:
    for line, name in imports(source):
        known = source.module in ("vamoh.cli", "vamoh.arguments") or not source.within("vamoh")
        if name.split(".")[0] == "tyro" and not known:
            yield line, "imports tyro: parse in vamoh/cli.py, so that the library works where tyro is missing"


def rooms_call_ops_by_function(source: Source) -> Found:
    for node in source.walk():
        if source.within("vamoh") and not source.within("vamoh.ops") and isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name == "torch.ops":
                yield node.lineno, "uses torch.ops: call the function of vamoh.ops, which checks the arguments"


def ops_hold_no_state(source: Source) -> Found:
    if not source.within("vamoh.ops"):
        return
    advice = "an op is a function of tensors and numbers; modules and parameters belong to a room"
    for line, name in imports(source):
        if name.startswith("torch.nn") and not name.startswith("torch.nn.functional"):
            yield line, f"imports {name}: {advice}"
    yield from ((line, f"uses {name}: {advice}") for line, name in names(source) if name in ("Module", "Parameter"))


def ops_draw_no_random_numbers(source: Source) -> Found:
    if not source.within("vamoh.ops"):
        return
    advice = "take the noise as an argument, so that every backend gets the same"
    for line, name in imports(source):
        if name.split(".")[0] == "random" or name.startswith("numpy.random"):
            yield line, f"imports {name}: {advice}"
    yield from ((line, f"uses {name}: {advice}") for line, name in names(source) if name in RANDOM)


def mistakes_are_not_asserted(source: Source) -> Found:
    for node in source.walk():
        if source.within("vamoh") and isinstance(node, ast.Assert):
            yield node.lineno, "uses assert: raise ValueError or TypeError with the argument's name (vamoh/_checks.py)"


def the_library_does_not_print(source: Source) -> Found:
    if not source.within("vamoh") or source.module in ("vamoh.cli", "vamoh.commands"):
        return
    for node in source.walk():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "prints: return the text, write to the run log, or use logging"


def comments_are_plain(source: Source) -> Found:
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    yield from plain([(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT])


def plain(comments: Iterable[tuple[int, str]]) -> Found:
    """What is wrong with comments, given by line and text."""
    for line, comment in comments:
        if re.search(r"([-=*#~_—─═/])\1{3}", comment.lstrip("/")):
            yield line, "banner comment: split the file, or say in words what follows"
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(.{3,}\):)", comment):
            yield line, "unfinished business without context: write TODO(what it waits for): what to do"


RULES: tuple[Rule, ...] = (
    imports_only_what_it_may_know,
    ops_do_not_know_each_other,
    compiled_code_stays_behind_the_backend,
    nothing_is_unpickled,
    only_the_cli_knows_tyro,
    rooms_call_ops_by_function,
    ops_hold_no_state,
    ops_draw_no_random_numbers,
    mistakes_are_not_asserted,
    the_library_does_not_print,
    comments_are_plain,
)


def read_sources() -> dict[Path, Source]:
    """Every Python file of the project."""
    found = {}
    for folder in ("vamoh", "kernels", "tests", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            name = ".".join(relative.with_suffix("").parts)
            found[relative] = Source(f"vamoh.{name}" if folder == "kernels" else name, path.read_text(encoding="utf-8"))
    found[Path("setup.py")] = Source("setup", (ROOT / "setup.py").read_text(encoding="utf-8"))
    return found


SOURCES = read_sources()


def is_op(source: Source) -> bool:
    """Whether a file declares an op."""
    return any(isinstance(node, ast.Call) and last_name(node.func) == "Op" for node in source.walk())


OPS = {p.stem for p, s in SOURCES.items() if p.parent == Path("vamoh/ops") and p.stem[0] != "_" and is_op(s)}
HELPER_FILES = {p.stem for p in SOURCES if p.parent == Path("vamoh/ops") and p.stem != "__init__"} - OPS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule: Rule) -> None:
    problems = [f"{path}:{line}: {what}" for path, source in SOURCES.items() for line, what in rule(source)]
    assert not problems, "\n" + "\n".join(problems)


BAD: list[tuple[Rule, str, str, str]] = [
    (imports_only_what_it_may_know, "vamoh.encoding", "from vamoh.model import VaMoH", "rooms before it"),
    (imports_only_what_it_may_know, "vamoh.encoding", "from .encoder import Encoder", "rooms before it"),
    (imports_only_what_it_may_know, "vamoh.latent", "def f():\n    from vamoh import elbo", "rooms before it"),
    (imports_only_what_it_may_know, "vamoh.model", "from vamoh.config import ModelConfig", "plain values"),
    (imports_only_what_it_may_know, "vamoh.data.images", "import vamoh.model", "data may import points"),
    (imports_only_what_it_may_know, "vamoh.metrics", "from vamoh import PointSet", "no other part"),
    (imports_only_what_it_may_know, "vamoh.ops.knn", "from vamoh.points import PointSet", "tensors and numbers"),
    (imports_only_what_it_may_know, "vamoh.train", "from vamoh.cli import main", "train may import"),
    (
        imports_only_what_it_may_know,
        "vamoh.cli",
        "from vamoh.model import VaMoH",
        "cli may import arguments, commands, compat",
    ),
    (imports_only_what_it_may_know, "vamoh.attic", "", "give it a line"),
    (imports_only_what_it_may_know, "vamoh.__init__", "from vamoh.model import VaMoH", "load nothing"),
    (ops_do_not_know_each_other, "vamoh.ops.point_conv", "from vamoh.ops.knn import knn", "two ops share"),
    (ops_do_not_know_each_other, "vamoh.ops.point_conv", "from vamoh.ops import knn", "two ops share"),
    (compiled_code_stays_behind_the_backend, "tests.ops.test_knn", "import kernels", "its name is vamoh.kernels"),
    (compiled_code_stays_behind_the_backend, "vamoh.ops.knn", "from vamoh import _native", "load it lazily"),
    (compiled_code_stays_behind_the_backend, "vamoh.model", "import vamoh.kernels.knn", "load it lazily"),
    (compiled_code_stays_behind_the_backend, "vamoh.model", "import_module('vamoh.kernels.knn')", "load it lazily"),
    (nothing_is_unpickled, "vamoh.checkpoint", "import pickle", "store plain values"),
    (nothing_is_unpickled, "vamoh.checkpoint", "torch.load(path)", "weights_only=True"),
    (nothing_is_unpickled, "vamoh.checkpoint", "torch.load(path, weights_only=False)", "weights_only=True"),
    (nothing_is_unpickled, "vamoh.data.files", "np.load(path, allow_pickle=True)", "allow_pickle=False"),
    (nothing_is_unpickled, "vamoh.distributed", "dist.all_gather_object(a, b)", "send tensors"),
    (only_the_cli_knows_tyro, "vamoh.commands", "import tyro", "parse in vamoh/cli.py"),
    (rooms_call_ops_by_function, "vamoh.encoder", "torch.ops.vamoh.knn(x)", "function of vamoh.ops"),
    (ops_hold_no_state, "vamoh.ops.knn", "from torch import nn\nclass Knn(nn.Module): ...", "function of tensors"),
    (ops_hold_no_state, "vamoh.ops.knn", "import torch.nn as nn", "function of tensors"),
    (ops_draw_no_random_numbers, "vamoh.ops.knn", "x = torch.randn(3)", "take the noise"),
    (ops_draw_no_random_numbers, "vamoh.ops.knn", "from random import choice", "take the noise"),
    (mistakes_are_not_asserted, "vamoh.model", "assert x > 0", "raise ValueError"),
    (the_library_does_not_print, "vamoh.train", "print(1)", "run log"),
    (comments_are_plain, "vamoh.model", "# ------ helpers", "banner"),
    (comments_are_plain, "vamoh.model", "# ———— helpers", "banner"),
    (comments_are_plain, "tests.test_model", "# TODO faster", "without context"),
]
GOOD: list[tuple[Rule, str, str]] = [
    (imports_only_what_it_may_know, "vamoh.elbo", "from vamoh import _checks\nfrom vamoh.ops.knn import knn"),
    (imports_only_what_it_may_know, "vamoh.generator", "from vamoh.likelihood import Likelihood"),
    (imports_only_what_it_may_know, "vamoh.__init__", "if TYPE_CHECKING:\n    from vamoh.model import VaMoH"),
    (imports_only_what_it_may_know, "vamoh.data.images", "from .dataset import Dataset\nfrom vamoh.points import a"),
    (ops_do_not_know_each_other, "vamoh.ops.knn", "from vamoh.ops._op import Op"),
    (compiled_code_stays_behind_the_backend, "vamoh.ops._native", "import_module('vamoh._native')"),
    (compiled_code_stays_behind_the_backend, "vamoh.kernels.knn", "from . import _common"),
    (nothing_is_unpickled, "vamoh.checkpoint", "torch.load(path, map_location='cpu', weights_only=True)"),
    (nothing_is_unpickled, "tests.test_checkpoint", "import pickle"),
    (only_the_cli_knows_tyro, "vamoh.cli", "import tyro"),
    (rooms_call_ops_by_function, "vamoh.ops.knn", "torch.ops.vamoh.knn(x)"),
    (ops_hold_no_state, "vamoh.ops.knn", "import torch.nn.functional as F"),
    (ops_draw_no_random_numbers, "vamoh.masks", "torch.rand(3)"),
    (mistakes_are_not_asserted, "tests.test_model", "assert x"),
    (the_library_does_not_print, "vamoh.cli", "print(1)"),
    (the_library_does_not_print, "vamoh.train", "self.print(1)"),
    (comments_are_plain, "vamoh.model", "x = '------'  # TODO(no GPU yet): measure - or not"),
]


@pytest.mark.parametrize("rule, module, text, words", BAD)
def test_rule_finds(rule: Rule, module: str, text: str, words: str) -> None:
    assert any(words in what for _, what in rule(Source(module, text)))


@pytest.mark.parametrize("rule, module, text", GOOD)
def test_rule_lets_pass(rule: Rule, module: str, text: str) -> None:
    assert list(rule(Source(module, text))) == []


def test_every_rule_is_proved() -> None:
    assert {rule for rule, *_ in BAD} == {rule for rule, *_ in GOOD} == set(RULES)


def native_problems(files: dict[str, str], ops: set[str]) -> list[str]:
    """What is wrong with csrc, given as paths below it and their text."""
    problems = []
    units = Counter(Path(name).stem for name in files if name.endswith((".cpp", ".cu")))
    problems += [
        f"{stem}: rename one of its {n} sources, or their object files collide" for stem, n in units.items() if n > 1
    ]
    for name, text in files.items():
        comments = [(text[: found.start()].count("\n") + 1, found[0]) for found in re.finditer(r"//.*", text)]
        problems += [f"{name}:{line}: {what}" for line, what in plain(comments)]
        if re.search(r"#include\s*[<\"](torch|ATen|c10)/", text):
            problems.append(f"{name}: includes torch; take addresses and sizes, Python owns the tensors")
        kernel = re.fullmatch(r"(cpu|cuda)/(\w+)_\1\.(cpp|cu)", name)
        if kernel and kernel[2] not in ops:
            problems.append(f"{name}: name it after its op; vamoh/ops/{kernel[2]}.py does not exist")
        if kernel and f"{kernel[2]}.h" not in files:
            problems.append(f"{name}: declare the op, with its contract, in csrc/{kernel[2]}.h")
    return problems


def test_native_sources_keep_the_rules() -> None:
    paths = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h", ".inl")]
    files = {p.relative_to(ROOT / "csrc").as_posix(): p.read_text(encoding="utf-8") for p in paths}
    assert "bindings/module.cpp" in files
    problems = native_problems(files, OPS)
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    "files, words",
    [
        ({"cpu/knn_cpu.cpp": "", "cuda/knn_cpu.cu": "", "knn.h": ""}, "object files collide"),
        ({"threads.h": "int a;\n// ==== pool\n"}, "threads.h:2: banner"),
        ({"bindings/knn.cpp": "#include <torch/extension.h>"}, "includes torch"),
        ({"cpu/nearest_cpu.cpp": "", "nearest.h": ""}, "name it after its op"),
        ({"cuda/knn_cuda.cu": ""}, "in csrc/knn.h"),
    ],
)
def test_native_rules_find(files: dict[str, str], words: str) -> None:
    assert any(words in problem for problem in native_problems(files, {"knn"}))


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_has_its_test_file(op: str) -> None:
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file(), f"write tests/ops/test_{op}.py"


def missing_paths(text: str, folder: Path) -> list[str]:
    """Paths that Markdown in `folder` names, in links or in backticks, and that do not exist; X stands for any op."""
    links = [folder / link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    below = r"(?:vamoh|csrc|kernels|tests|docs|bench|\.ci)/[\w./-]*"
    top = r"setup\.py|[\w.-]+\.(?:md|toml|txt|cff)"
    named = [ROOT / name for name in re.findall(rf"`({below}|{top})`", text)]
    patterns = [
        re.sub(r"(?<![A-Za-z])X(?![A-Za-z])", "*", path.resolve().relative_to(ROOT).as_posix())
        for path in [*links, *named]
    ]
    return [pattern for pattern in patterns if not any(ROOT.glob(pattern))]


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document: Path) -> None:
    missing = missing_paths(document.read_text(encoding="utf-8"), document.parent)
    assert not missing, f"{document.name} names {missing}: correct the text or add the file"


def test_missing_paths_are_found() -> None:
    text = "`vamoh/model.py` `vamoh/ops/X.py` [a](../README.md#b) `vamoh/attic.py` `csrc/X.rs` [b](gone.md) `GONE.md`"
    assert missing_paths(text, ROOT / "docs") == ["docs/gone.md", "vamoh/attic.py", "csrc/*.rs", "GONE.md"]


def test_architecture_document_names_every_part() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert " → ".join(ROOMS) in text, "docs/architecture.md must list the rooms in the order of ROOMS"
    absent = [part for part in KNOWS if f"`{part}`" not in text and f"`{part}.py`" not in text]
    assert not absent, f"docs/architecture.md does not say what {absent} are for"


def test_ops_document_lists_every_backend() -> None:
    text = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| ([\w, ]*reference) \|", text, re.MULTILINE))
    backends: dict[str, list[str]] = {}
    for row in status().rows:
        backends.setdefault(row.op, []).append(row.backend)
    assert listed == {op: ", ".join(names) for op, names in backends.items()}, "correct the table in docs/ops.md"


def test_environment_variables_are_documented() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS)
    package = [source.text for source in SOURCES.values() if not source.within("tests")]
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", "".join(package)))
    assert "VAMOH_BACKEND" in read
    absent = [name for name in sorted(read) if f"{name}`" not in text and f"{name}=" not in text]
    assert not absent, f"say in docs/ops.md what {absent} do"


def test_public_names_are_few_and_documented() -> None:
    assert len(vamoh.__all__) <= 15, "keep the surface small: import the rest from its module"
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS)
    absent = [name for name in vamoh.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not absent, f"show in README.md or docs/ what {absent} are for"


def test_one_place_says_that_no_gpu_ran_this() -> None:
    """So that one line changes once one did."""
    gap = '[^.|:"]{0,60}'
    pattern = re.compile(rf"\b(?:no|none|not|never|nothing)\b{gap}\b(?:run|ran|measured)\b{gap}\b(?:GPUs?|yet)\b", re.I)
    places = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
    texts = {path: path.read_text(encoding="utf-8") for path in places}
    texts |= {
        ROOT / path: source.text for path, source in SOURCES.items() if path.parts[0] in ("vamoh", "kernels", "bench")
    }
    said = [
        (path.name, found[0]) for path, text in texts.items() for found in pattern.finditer(text) if "GPU" in found[0]
    ]
    assert [name for name, _ in said] == ["gpu.md"], said
