"""Arguments and options of every command, with the help that `vamoh COMMAND --help` shows; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagConversionOff, Positional, arg

from vamoh.config import DataConfig, ModelConfig, TrainConfig

Run = Annotated[Positional[Path], arg(metavar="RUN", help="run folder, as vamoh train writes it")]


@dataclass(frozen=True)
class Opening:
    """Options of every command that opens a run."""

    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    seed: int = 0
    """seed of random draws"""
    data: Annotated[str | None, arg(name="data.path")] = None
    """where the data of the run are now, if they moved; default: where they were"""


@dataclass(frozen=True)
class Common(Opening):
    """Options of the commands that write results."""

    out: Path | None = None
    """folder for the results; default: the run folder"""


@dataclass(frozen=True)
class Choice(Common):
    """Options of the commands that show functions of the data."""

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
class Reconstruct(Choice):
    """Encode functions of the data and decode them: reconstruct.png and .npz."""

    run: Run = field(kw_only=True)
    files: Files = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Sample(Common):
    """Draw new functions from the prior: sample.png and .npz."""

    run: Run = field(kw_only=True)
    count: int = 64
    """how many functions"""
    prior: Literal["first", "second"] | None = None
    """first: the model's own; second: that of vamoh fit-prior; default: the second one, where there is one"""


@dataclass(frozen=True)
class FitPrior(Opening):
    """Fit a second-stage prior to the latents of the training functions, for vamoh sample: RUN/prior.safetensors.

    The model stays as it is. The file holds for its parameters only: after more training, fit again.
    """

    run: Run = field(kw_only=True)
    kind: Literal["diffusion", "coupling"] = "diffusion"
    """diffusion: a small diffusion model of z; coupling: a flow of affine couplings"""
    steps: int = 2000
    """updates"""


@dataclass(frozen=True)
class Superres(Choice):
    """Decode functions of the data on a finer grid: superres.png and .npz."""

    run: Run = field(kw_only=True)
    files: Files = field(default=(), kw_only=True)
    scale: int = 4
    """refinement of the grid along every axis"""


@dataclass(frozen=True)
class Complete(Choice):
    """Fill in masked points of the data, in- or out-painting: complete.png and .npz."""

    run: Run = field(kw_only=True)
    files: Files = field(default=(), kw_only=True)
    mask: str | None = None
    """patch: a hole in the centre; half: only the left half is seen; outside: only the centre is seen;
    random:RATE: points are missing with that probability; posterior-matching-mnist, posterior-matching-celeba,
    vaeac-celeba: those papers' masks, drawn for each function; or a .npy or .png file, white or True where seen;
    default: patch, and for FILEs what is missing in them"""
    draws: int | None = None
    """also show so many completions, each by a draw of what was not seen, and their standard deviation"""


@dataclass(frozen=True)
class Segment(Choice):
    """Show which component explains each point, and how certainly: segment.png and .npz."""

    run: Run = field(kw_only=True)
    files: Files = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Evaluate(Common):
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
