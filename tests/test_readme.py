"""The documents tell the truth: their code runs, their commands parse, their tables and versions match."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("tyro", reason="the command line needs tyro")

import vamoh
from vamoh import cli, commands
from vamoh.config import PRESETS, load_config, save_config
from vamoh.train import Trainer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """Fenced blocks of a language, with the line that their code starts on."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n") + 1, block[1]) for block in found]


def command_lines(text: str) -> list[str]:
    """Every `vamoh ...` of the shell blocks."""
    code = "".join(code for _, code in blocks(text, "bash")).replace("\\\n", " ")
    parts = [part.strip() for line in code.splitlines() for part in line.split("&&")]
    return [part for part in parts if part.split(" ")[0] == "vamoh"]


def tiny(name: str) -> Any:
    """A preset cut down to a model and a run that take a second."""
    config = PRESETS[name]
    encoder = {"encoder_centroids": (16, 4), "encoder_neighbors": (4, 4), "encoder_channels": (4, 4)}
    pooling = {"pool_centroids": (), "pool_neighbors": ()}
    sizes = {"latent_dim": 4, "frequencies": 8, "flow_layers": 2, "hypernet_widths": (8,), "inr_widths": (8,)}
    model = replace(config.model, **encoder, **pooling, **sizes)
    return replace(config, model=model, train=replace(config.train, steps=2, batch_size=4))


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=pytest.mark.slow) if path.name == "export.md" else path for path in DOCS],
    ids=lambda path: path.name,
)
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "digits", tiny("digits"))
    monkeypatch.setattr(Trainer, "evaluate", lambda trainer: {})
    names: dict[str, Any] = {}
    for line, code in blocks(document.read_text(encoding="utf-8"), "python"):
        # Blank lines in front make a traceback show the line of the document.
        exec(compile("\n" * (line - 1) + code, str(document), "exec"), names)
        for name, shape in re.findall(r"(\w+)\.mean \[([\d, ]+)\]", code):
            assert list(names[name].mean.shape) == [int(n) for n in shape.split(",")], f"{document.name}: {name}.mean"
    assert document.name != "README.md" or {"finer", "filled", "drawn", "anywhere", "terms"} <= set(names)


def parse(line: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a command line asks of `vamoh.commands`; nothing is run."""
    asked: dict[str, Any] = {}

    def record(name: str) -> Callable[..., str]:
        signature = inspect.signature(getattr(commands, name.replace("-", "_")))
        return lambda *given, **options: asked.update(signature.bind(*given, **options).arguments, command=name) or ""

    for name in cli.COMMANDS:
        monkeypatch.setattr(commands, name.replace("-", "_"), record(name))
    status = cli.main(shlex.split(line, comments=True)[1:])
    assert status == 0 and asked, f"`{line}` is not a command that vamoh understands"
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, the YAML file that the README shows, and files of the published code."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "runs" / "digits").mkdir(parents=True)
    save_config(load_config("digits"), folder / "runs" / "digits" / "config.yaml")
    [(_, text)] = blocks(README, "yaml")
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    theirs = folder / "run" / "configs" / "models"
    theirs.mkdir(parents=True)
    for name in ("polymnist", "shapes"):
        shutil.copy(ROOT / "tests" / "compat" / "theirs.yaml", theirs / f"{name}.yaml")
    return folder


@pytest.mark.parametrize("line", [line for path in DOCS for line in command_lines(path.read_text(encoding="utf-8"))])
def test_commands_parse(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert parse(line, monkeypatch)["command"] == line.split()[1]


@pytest.mark.parametrize(
    "line", ["vamoh train digits --train.step 4", "vamoh superres runs/digits --zoom 4", "vamoh draw"]
)
def test_wrong_commands_do_not_parse(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(AssertionError, match="not a command that vamoh understands"):
        parse(line, monkeypatch)


def test_yaml_of_the_readme_overrides_its_preset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert "`vamoh train mine.yaml`" in README
    config = parse("vamoh train mine.yaml", monkeypatch)["config"]
    assert (config.model.latent_dim, config.train.point_dropout, config.data.name) == (24, 0.5, "images")
    assert config.model.inr_widths == PRESETS["polymnist"].model.inr_widths


def test_table_of_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    rows = re.findall(r"^\| `(vamoh .*?)`(?: or `(vamoh .*?)`)? \|", README.split("## Commands")[1], re.MULTILINE)
    shown = [line for row in rows for line in row if line]
    assert {line.split()[1] for line in shown} == set(cli.COMMANDS)
    for line in shown:
        line = line.replace("RUN", "runs/digits").replace("PRESET", "digits").replace("config.yaml", "mine.yaml")
        parse(line, monkeypatch)


def test_table_of_presets() -> None:
    for name, config in PRESETS.items():
        model, train = config.model, config.train
        sizes = [model.components, model.latent_dim, " x ".join(map(str, model.inr_widths)), model.flow_layers]
        row = ["", f"`{name}`", config.data.name, *sizes, train.batch_size, f"{train.steps:,}".replace(",", " "), ""]
        text = " | ".join(map(str, row)).strip()
        assert text in README.splitlines(), f"the presets table of README.md must have the row\n{text}"


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == vamoh.__version__
    assert citation["authors"] == [{"name": "The vamoh authors"}]
    assert "2302.06223" in citation["references"][0]["url"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.*?)\]", changes, re.MULTILINE)[1] == vamoh.__version__


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 150
