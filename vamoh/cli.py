"""The command line: parses, then calls one function of `vamoh.commands` per command."""

from __future__ import annotations

import inspect
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagConversionOff, Positional, arg

from vamoh._files import check_name
from vamoh.compat.config import changes, is_reference_config, load_reference_config, table
from vamoh.config import PRESETS, DataConfig, ModelConfig, TrainConfig, load_config

DESCRIPTION = """VaMoH: learn distributions over functions from points.

  vamoh train digits            train on the bundled digits, into runs/digits
  vamoh sample runs/digits      draw new functions from the trained model

An error is one line; --debug, or VAMOH_DEBUG=1, adds the traceback."""

Run = Annotated[Positional[Path], arg(metavar="RUN", help="run folder, as vamoh train writes it")]


@dataclass(frozen=True)
class _Common:
    out: Path | None = None
    """folder for the results; default: the run folder"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    seed: int = 0
    """seed of random draws"""
    data: Annotated[str | None, arg(name="data.path")] = None
    """where the data of the run are now, if they moved; default: where they were"""


@dataclass(frozen=True)
class _Choice(_Common):
    split: str = "test"
    """train, validation or test"""
    index: tuple[int, ...] = ()
    """positions in the split; default: the first --count"""
    count: int = 8
    """how many functions, from the start of the split"""


Files = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="[FILE ...]", help="functions of your own, of any size, in place of the data's: docs/data.md"),
]


@dataclass(frozen=True)
class Train:
    """Train a preset or a config.yaml; draw and evaluate the result.

    Options with a dot override single values of the configuration; their defaults are those of the preset or file.
    Ctrl-C ends the run after the current step and saves it.
    """

    data: FlagConversionOff[DataConfig]
    model: FlagConversionOff[ModelConfig]
    train: FlagConversionOff[TrainConfig]
    out: Path | None = None
    """run folder; default: runs/PRESET, or with the first free number"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    seed: int = 0
    """seed of the initial values and of every random draw"""
    resume: Annotated[str | None, arg(metavar="[RUN]")] = None
    """continue RUN, default the folder of --out; then the preset may be left out"""


@dataclass(frozen=True)
class Reconstruct(_Choice):
    """Encode functions of the data and decode them: reconstruct.png and .npz."""

    run: Run = field(kw_only=True)
    files: Files = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Sample(_Common):
    """Draw new functions from the prior: sample.png and .npz."""

    run: Run = field(kw_only=True)
    count: int = 64
    """how many functions"""


@dataclass(frozen=True)
class Superres(_Choice):
    """Decode functions of the data on a finer grid: superres.png and .npz."""

    run: Run = field(kw_only=True)
    files: Files = field(default=(), kw_only=True)
    scale: int = 4
    """refinement of the grid along every axis"""


@dataclass(frozen=True)
class Complete(_Choice):
    """Fill in masked points of the data, in- or out-painting: complete.png and .npz."""

    run: Run = field(kw_only=True)
    files: Files = field(default=(), kw_only=True)
    mask: str | None = None
    """patch: a hole in the centre; half: only the left half is seen; outside: only the centre is seen;
    random:RATE: points are missing with that probability; or a .npy or .png file, white or True where seen;
    default: patch, and for FILEs what is missing in them"""
    draws: int | None = None
    """also show so many completions, each by a draw of what was not seen, and their standard deviation"""


@dataclass(frozen=True)
class Segment(_Choice):
    """Show which component explains each point, and how certainly: segment.png and .npz."""

    run: Run = field(kw_only=True)
    files: Files = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Evaluate(_Common):
    """Measure PSNR, bits per dimension, ELBO terms, completion (IoU for voxels): evaluation.json."""

    run: Run = field(kw_only=True)
    split: str = "test"
    """train, validation or test"""
    count: int | None = None
    """how many functions, from the start of the split; default: all"""
    samples: int = 64
    """importance samples of the bound behind bits per dimension"""
    mask: str = "patch"
    """mask of the completion, as in vamoh complete"""


@dataclass(frozen=True)
class Export:
    """Write the encoder or the decoder as a program of its own, for any number of functions and points.

    A decoder runs without vamoh, as an ONNX model without torch too (pip install vamoh[export]).
    """

    run: Run
    out: Path | None = None
    """file to write, which must not exist; default: RUN/decoder.pt2, after --part and --format"""
    part: Literal["encoder", "decoder"] = "decoder"
    """what to write"""
    format: Literal["torch", "onnx"] = "torch"
    """torch: for torch.export.load; onnx: an ONNX model, of the decoder only"""


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of the published code into a run folder, or with --to-reference the other way."""

    source: Annotated[Positional[Path], arg(metavar="CHECKPOINT|RUN", help="N.ckpt of theirs; a run folder of ours")]
    out: Path
    """run folder to write; with --to-reference the file"""
    config: Path | None = None
    """YAML file the checkpoint was trained with; default: the config.yaml of its results, which holds the overrides"""
    to_reference: bool = False
    """write a checkpoint that the published code loads"""


@dataclass(frozen=True)
class Info:
    """Print versions, devices, threads and the backends of every op."""


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "reconstruct": Reconstruct,
    "sample": Sample,
    "superres": Superres,
    "complete": Complete,
    "segment": Segment,
    "evaluate": Evaluate,
    "export": Export,
    "convert": Convert,
    "info": Info,
}


# Options of train that may come before its PRESET, each with a value.
COMMON = ("--out", "--device", "--seed", "--resume")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (default: the process's own) and return the exit status.

    0: done. 1: training diverged. 2: bad input, reported as one line on stderr. 128 + n: stopped by signal n.
    """
    _print_anything()
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given or os.environ.get("VAMOH_DEBUG", "") not in ("", "0")
    given = [token for token in given if token != "--debug"]
    name = given[0] if given else ""
    try:
        if name == "train":
            return _run(name, _parse_train(given[1:]))
        with _explained(f"vamoh {name}" if name in COMMANDS else "vamoh"):
            options = tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="vamoh", description=DESCRIPTION, args=given, use_underscores=True
            )
        return _run(name, vars(options))
    except SystemExit as stop:  # from tyro, after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("vamoh: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split()) or "not enough memory"
        stopped_by = getattr(error, "signal", None)
        if stopped_by is not None:
            print(f"vamoh: {reason}", file=sys.stderr)
            return 128 + int(stopped_by)
        print(f"vamoh: error: {reason}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError | MemoryError) else 2


@contextmanager
def _explained(command: str) -> Iterator[None]:
    """Turn what tyro says of a mistake, in boxes of several lines, into a ValueError."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        # A title, the reason, then a rule and a hint, then a rule and the option's help; with boxes where they can be.
        text = " ".join(line.strip("│ ") for line in said.getvalue().splitlines()[1:])
        reason, hint, *_ = [*filter(None, (" ".join(part.split()) for part in re.split("[─╰╯-]{8,}", text))), "", ""]
        reason = reason.removeprefix("Error parsing ")
        reason = reason if len(reason) <= 200 else f"{reason[:197]}..."
        if meant := re.match(r"Perhaps you meant: (\S+)", hint):
            reason += f"; did you mean {meant[1]}?"
        elif hint.startswith("Available subcommands"):
            reason += f"; {hint.lower()}"
        raise ValueError(f"{reason}; see {command} --help") from None


def _print_anything() -> None:
    """Let output hold any character: what the terminal cannot show becomes a question mark."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _run(name: str, options: dict[str, Any]) -> int:
    # Before torch loads OpenMP: threads that spin at every barrier stall each other when another program wants a core
    # (measured on 2 cores with one taken: 940 ms a step against 65 ms).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Fresh gradients of a large hypernetwork in huge pages: filling them is bound by page faults otherwise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from vamoh import commands

    for option, value in options.items():
        if isinstance(value, Path | str):
            check_name("vamoh", option, str(value))
    with _messages():
        text = getattr(commands, name)(**options)
    if text:
        print(text)
    return 0


@contextmanager
def _messages() -> Iterator[None]:
    """Show what the library logs, on stderr."""
    log, handler = logging.getLogger("vamoh"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _parse_train(args: list[str]) -> dict[str, Any]:
    """Options of `train`: the preset or file is found first, because it holds the defaults of all the others."""
    # Options that are read here may come as one word.
    args = _without_cfg(args)
    pairs = [token.split("=", 1) if token.split("=")[0] in COMMON else [token] for token in args]
    source, rest = _split_source([token for pair in pairs for token in pair])
    resumed = _value_of(rest, "--resume")
    if "--resume" in rest and resumed is None:
        rest.insert(rest.index("--resume") + 1, "")
    if source is None and "--resume" in rest:
        source = str(Path(resumed or _value_of(rest, "--out") or ".") / "config.yaml")
    if source is None and not {"-h", "--help"} & set(rest):
        raise ValueError(
            f"train: the first argument must be a preset ({', '.join(PRESETS)}) or a config.yaml, "
            f"got {args[0] if args else 'none'}"
        )
    source = source or "digits"
    device = "cpu"
    if is_reference_config(source):
        pairs_of_theirs, rest = _split_overrides(rest)
        theirs = load_reference_config(source, pairs_of_theirs)
        config, device = theirs.config, theirs.device
    else:
        theirs, config = None, load_config(source)
    with _explained("vamoh train"):
        options = tyro.cli(
            Train,
            prog="vamoh train PRESET|config.yaml",
            description=f"{inspect.getdoc(Train)}\n\nPresets: {', '.join(PRESETS)}. The defaults here are {source}'s.",
            args=rest,
            use_underscores=True,
            default=Train(config.data, config.model, config.train, device=device, seed=config.seed),
        )
    if options.resume and options.out is not None and options.out != Path(options.resume):
        raise ValueError(f"train: --out must be left out or name the resumed run {options.resume}, got {options.out}")
    chosen = replace(config, data=options.data, model=options.model, train=options.train, seed=options.seed)
    if theirs is not None:
        lines = [f"{source}, a configuration of the published code:", table(theirs.rows, changes(config, chosen))]
        if chosen.data != config.data and chosen.train.steps == config.train.steps:
            lines.append(f"epochs are counted for {config.data.name}: --train.steps sets the steps for other data")
        print("\n".join(lines), file=sys.stderr)
    return {
        "source": source,
        "config": chosen,
        "out": Path(options.resume) if options.resume else options.out,
        "device": options.device,
        "resume": options.resume is not None,
    }


def _without_cfg(args: list[str]) -> list[str]:
    """`--cfg FILE`, as the published code names its file, means FILE."""
    for i, token in enumerate(args):
        if token.startswith("--cfg="):
            return [token.removeprefix("--cfg="), *args[:i], *args[i + 1 :]]
        if token == "--cfg" and i + 1 < len(args):
            return [args[i + 1], *args[:i], *args[i + 2 :]]
    return args


def _split_source(args: list[str]) -> tuple[str | None, list[str]]:
    """Take the first argument that is neither an option nor the value of --out, --device, --seed or --resume."""
    position = 0
    while position < len(args) and args[position].startswith("-"):
        if args[position] not in COMMON and "=" not in args[position]:
            return None, list(args)
        position += 1 if _value_of(args[position:], args[position]) is None or "=" in args[position] else 2
    if position >= len(args):
        return None, list(args)
    return args[position], args[:position] + args[position + 1 :]


def _split_overrides(args: list[str]) -> tuple[list[str], list[str]]:
    """Separate keys and values as the published code takes them from options; common options may come first."""
    theirs: list[str] = []
    ours: list[str] = []
    position = 0
    while position < len(args) and (not args[position].startswith("-") or args[position] in COMMON):
        (ours if args[position] in COMMON else theirs).extend(args[position : position + 2])
        position += 2
    return theirs, ours + args[position:]


def _value_of(args: list[str], option: str) -> str | None:
    """What follows an option, unless that is another option."""
    after = args[args.index(option) + 1 :][:1] if option in args else []
    return None if not after or after[0].startswith("-") else after[0]
