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
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tyro

from vamoh._files import check_name
from vamoh.arguments import (
    Complete,
    Convert,
    Evaluate,
    Export,
    FitPrior,
    Info,
    Reconstruct,
    Sample,
    Segment,
    Superres,
    Train,
)
from vamoh.compat.config import changes, is_reference_config, load_reference_config, table
from vamoh.config import PRESETS, DataConfig, ModelConfig, TrainConfig, load_config

DESCRIPTION = """VaMoH: learn distributions over functions from points.

  vamoh train digits            train on the bundled digits, into runs/digits
  vamoh sample runs/digits      draw new functions from the trained model

An error is one line; --debug, or VAMOH_DEBUG=1, adds the traceback."""

COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "reconstruct": Reconstruct,
    "sample": Sample,
    "fit-prior": FitPrior,
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

SWITCHES = {
    f"--{section}.{field.name}"
    for section, options in {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}.items()
    for field in fields(options)
    if field.type == "bool"
}
"""Options of `train` that are true or false."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (default: the process's own) and return the exit status.

    0: done. 1: training diverged. 2: bad input, reported as one line on stderr. 128 + n: stopped by signal n, of which
    SIGPIPE stands for a reader of the output that has gone, as in `vamoh info | head -1`.
    """
    try:
        status = _main(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        _forget_output()
        return 128 + 13
    except OSError as error:
        _forget_output()
        print(f"vamoh: error: cannot write the output ({error.strerror})", file=sys.stderr)
        return 2


def _main(args: Sequence[str] | None) -> int:
    _print_anything()
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given or os.environ.get("VAMOH_DEBUG", "") not in ("", "0")
    given = [token for token in given if token != "--debug"]
    name = given[0] if given else ""
    try:
        if name == "train":
            return _run(name, **_parse_train(given[1:]))
        with _explained(f"vamoh {name}" if name in COMMANDS else "vamoh"):
            options = tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="vamoh", description=DESCRIPTION, args=given, use_underscores=True
            )
        return _run(name, options)
    except SystemExit as stop:  # from tyro, after --help
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        raise
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


def _forget_output() -> None:
    """Let what is left in the buffer go nowhere when the process ends, where Python would complain of it again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _print_anything() -> None:
    """Let output hold any character: what the terminal cannot show becomes a question mark."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _run(name: str, *options: Any, **values: Any) -> int:
    # Before torch loads OpenMP: threads that spin at every barrier stall each other when another program wants a core
    # (measured on 2 cores with one taken: 940 ms a step against 65 ms).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Fresh gradients of a large hypernetwork in huge pages: filling them is bound by page faults otherwise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from vamoh import commands

    for option, value in [*values.items(), *(pair for each in options for pair in vars(each).items())]:
        if isinstance(value, Path | str):
            check_name("vamoh", option, str(value))
    with _messages():
        text = getattr(commands, name.replace("-", "_"))(*options, **values)
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
            args=_switches_as_in_yaml(rest),
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


def _switches_as_in_yaml(args: Sequence[str]) -> list[str]:
    """Capitalise `true` and `false`, as tyro wants them, where an option of the configuration is one of the two."""
    spelled: list[str] = []
    option = ""
    for token in args:
        name, equals, value = token.rpartition("=")
        named = (name or option).replace("-", "_").replace("__", "--", 1)
        if named in SWITCHES and value in ("true", "false"):
            token = name + equals + value.capitalize()
        option = token
        spelled.append(token)
    return spelled


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
