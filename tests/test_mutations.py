"""Damaged inputs by the thousand: each is read, or refused by an error that names what is wrong, in few words.

More of them, of all kinds or of some: `python tests/test_mutations.py COUNT SEED [KIND ...]`.
"""

from __future__ import annotations

import io
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("tyro", reason="the command line needs tyro")

from vamoh import checkpoint
from vamoh.cli import COMMANDS, main
from vamoh.compat.config import load_reference_config
from vamoh.compat.state import from_reference, read_checkpoint, to_reference
from vamoh.config import Config, ModelConfig, config_to_dict, config_to_yaml, load_config, save_config
from vamoh.runlog import read_log
from vamoh.train import _check_state, _moments

MODEL = ModelConfig(
    latent_dim=2,
    components=2,
    frequencies=3,
    centroids="points",
    encoder_centroids=(4,),
    encoder_neighbors=(3,),
    encoder_channels=(3,),
    weight_net=(3,),
    weight_net_slope=None,
    flow_layers=2,
    hypernet_widths=(3,),
    inr_widths=(3,),
    gating_widths=(3,),
    gating_bound="tanh",
    max_scale=0.1,
    kl_samples=1,
)
CONFIG = Config(model=MODEL)
SLOWEST = 10.0
"""Seconds that no input of some kilobytes may take."""
LONGEST = 360
"""Characters of a message, without the folder: 300, and some words of the command line."""
WORDS = (
    b"-1 0 1e400 .inf .nan 99999999999999999999999 null true [ ] { } : , - & * &a *a << ! !!int !!python/name:os \x00 "
    b"\xff \xed\xa0 PK step format tensor dtype shape F32 BF16 data_offsets __metadata__ torch OrderedDict"
).split()


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Some bytes changed, taken out, put in, repeated, or the end cut off."""
    data = bytearray(content)
    for _ in range(generator.choice([1, 1, 1, 2, 3, 8])):
        at = generator.randrange(len(data) + 1)
        end = min(len(data), at + generator.choice([1, 1, 2, 4, 8, 64]))
        kind = generator.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[at:end] = generator.randbytes(end - at)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = generator.choice(WORDS)
        elif kind == 4:
            data[at:end] = generator.choice(WORDS)
        elif kind == 5:
            data[at:at] = data[at:end] * generator.choice([1, 2, 20])
        elif generator.random() < 0.3:
            del data[at:]
    return bytes(data)


Reader = Callable[[bytes], Any]


def readers(folder: Path) -> Iterator[tuple[str, list[bytes], Reader]]:
    """Name, whole inputs, and what reads one: every door through which content comes in that is not data."""
    run = folder / "run"
    run.mkdir()
    save_config(CONFIG, run / "config.yaml")
    model = checkpoint.new_model(CONFIG, 2, 1)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    noise = torch.Generator().get_state()
    state = {
        "seconds": 1.0,
        "config": config_to_dict(CONFIG),
        "data": {"functions": 9},
        "optimizer": optimizer.state_dict(),
        "points": noise,
        "noise": noise,
    }
    newest = checkpoint.save(run, model, CONFIG, 1, state)
    whole = {file.name: file.read_bytes() for file in newest.iterdir()}

    def put(path: Path, content: bytes) -> Path:
        path.write_bytes(content)
        return path

    def sealed(name: str, content: bytes) -> None:
        files = {**whole, name: content}
        lines = [f"{sha256(files[file]).hexdigest()}  {file}\n" for file in ("model.safetensors", "trainer.pt")]
        for file, data in (*files.items(), ("SHA256SUMS", "".join(lines).encode())):
            (newest / file).write_bytes(data)

    def read_model(content: bytes) -> None:
        sealed("model.safetensors", content)
        checkpoint.load(run)

    def read_state(content: bytes) -> None:
        sealed("trainer.pt", content)
        found = checkpoint.load_training_state(run)
        _check_state(run, found)
        moments = _moments(run, found["optimizer"], parameters)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        optimizer.step()

    def read_theirs(content: bytes) -> None:
        from_reference(read_checkpoint(put(folder / "1.ckpt", content))["model_state"], model)

    def read_command(content: bytes) -> None:
        args = [word for word in content.decode("utf-8", "surrogateescape").split("\n") if "\0" not in word]
        said = io.StringIO()
        with patch("vamoh.cli._run", lambda *_: 0), redirect_stderr(said), redirect_stdout(io.StringIO()):
            status = main(args)
        if status == 0:
            return
        assert status == 2 and re.fullmatch(r"vamoh: error: [^\n]+\n", said.getvalue()), (status, said.getvalue())
        raise ValueError(said.getvalue())

    foreign = io.BytesIO()
    torch.save({"epoch": 3, "model_state": {k: v for k, v in to_reference(model).items() if not v.is_meta}}, foreign)
    yield "config.yaml", [config_to_yaml(CONFIG).encode()], lambda c: load_config(put(folder / "c.yaml", c))
    theirs = (Path(__file__).parent / "compat" / "theirs.yaml").read_bytes()
    yield "theirs.yaml", [theirs], lambda c: load_reference_config(put(folder / "t.yaml", c))
    lines = [{"split": "train", "step": i, "elbo": -1.5, "lr": 1e-3, "seconds": 0.25} for i in range(4)]
    log = "".join(json.dumps(line) + "\n" for line in lines).encode()
    yield "metrics.jsonl", [log], lambda c: read_log(put(folder / "metrics.jsonl", c))
    yield "model.safetensors", [whole["model.safetensors"]], read_model
    yield "trainer.pt", [whole["trainer.pt"]], read_state
    yield "N.ckpt", [foreign.getvalue()], read_theirs
    words = ["train digits --out o --train.lr 0.1 --model.inr-widths 8 8 --seed 3", "sample r --count 3 --device cpu"]
    words += ["export r --part encoder --format onnx", "convert c --out o --config y", "evaluate r --split test"]
    yield "command line", ["\n".join(text.split()).encode() for text in words], read_command
    assert {text.split()[0] for text in words} <= COMMANDS.keys()


def run_mutations(count: int, seed: int, folder: Path, kinds: list[str] | None = None) -> dict[str, Counter[str]]:
    """Feed `count` damaged inputs to every reader; return how they ended."""
    torch.set_num_threads(1)
    generator, found = random.Random(seed), {}
    for name, wholes, read in readers(folder):
        if kinds and name not in kinds:
            continue
        ends: Counter[str] = Counter()
        for whole in wholes:
            read(whole)
        for i in range(count):
            content = mutate(generator.choice(wholes), generator)
            started = time.monotonic()
            try:
                read(content)
                end = "read"
            except (ValueError, TypeError, OSError) as error:
                end = type(error).__name__
                message = str(error).replace(str(folder), "")
                # An unknown key is answered with all that there are.
                assert len(message) < (1000 if name.endswith(".yaml") else LONGEST), message
                assert "\n" not in message.strip() and "tensor(" not in message, message
            except Exception as error:
                (folder.parent / f"found-{seed}-{i}").write_bytes(content)
                raise AssertionError(f"{name}, input {i} of seed {seed}: {type(error).__name__}: {error}") from error
            assert time.monotonic() - started < SLOWEST, (name, i, seed)
            ends[end] += 1
        found[name] = ends
    return found


def test_a_thousand_damaged_inputs(tmp_path: Path) -> None:
    found = run_mutations(150, 0, tmp_path)
    assert len(found) == 7
    for name, ends in found.items():
        assert ends.total() == 150 and ends["read"] < 150, name


@pytest.mark.parametrize("seed", range(3))
def test_mutations_change_something(seed: int) -> None:
    whole, generator = bytes(range(256)), random.Random(seed)
    assert sum(mutate(whole, generator) != whole for _ in range(100)) > 70


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "work"
        place.mkdir()
        for name, ends in run_mutations(int(sys.argv[1]), int(sys.argv[2]), place, sys.argv[3:]).items():
            print(name, ends.total(), dict(ends), flush=True)
