"""Damaged inputs by the thousand: each is read, or refused by an error that names what is wrong, in few words.

More of them, of all kinds or of some: `python tests/test_mutations.py COUNT SEED [KIND ...]`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tyro", reason="the command line needs tyro")

from vamoh import _lock, checkpoint
from vamoh.cli import COMMANDS, main
from vamoh.compat.config import load_reference_config
from vamoh.compat.state import from_reference, read_checkpoint, to_reference
from vamoh.config import Config, ModelConfig, config_to_dict, config_to_yaml, load_config, save_config
from vamoh.data import fields_process
from vamoh.kernels import _plan
from vamoh.masks import completion_mask
from vamoh.resume import check_state, moments
from vamoh.runlog import read_log

sys.path.insert(0, str(Path(__file__).parent / "data"))
import mutations as data_files  # type: ignore[import-not-found]

sys.path.pop(0)

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
"""Seconds of computing that no input of some kilobytes may take."""
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
    """Name, whole inputs, and what reads one: every door through which content comes in that is not data.

    Models are built once for each of their sizes, as what is tried are the readers.
    """
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

    new_model = cache(checkpoint.new_model)

    def read_model(content: bytes) -> None:
        sealed("model.safetensors", content)
        with patch.multiple(checkpoint, new_model=new_model, load_run_config=lambda _: CONFIG):
            checkpoint.load(run)

    def read_sums(content: bytes) -> None:
        sealed("trainer.pt", whole["trainer.pt"])
        put(newest / "SHA256SUMS", content)
        checkpoint.load_training_state(run)

    def read_state(content: bytes) -> None:
        sealed("trainer.pt", content)
        found = checkpoint.load_training_state(run)
        check_state(run, found)
        restored = moments(run, found["optimizer"], parameters)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})
        optimizer.step()

    def read_theirs(content: bytes) -> None:
        from_reference(read_checkpoint(put(folder / "1.ckpt", content))["model_state"], model)

    def read_command(content: bytes) -> None:
        args = [word for word in content.decode("utf-8", "surrogateescape").split("\n") if "\0" not in word]
        said = io.StringIO()
        with patch("vamoh.cli._run", lambda *_, **__: 0), redirect_stderr(said), redirect_stdout(io.StringIO()):
            status = main(args)
        if status == 0:
            return
        assert status == 2 and re.fullmatch(r"vamoh: error: [^\n]+\n", said.getvalue()), (status, said.getvalue())
        raise ValueError(said.getvalue())

    def read_mask(suffix: str) -> Reader:
        return lambda content: completion_mask(str(put(folder / f"mask{suffix}", content)), (4, 5))

    def read_lock(content: bytes) -> None:
        put(folder / "lock", content)
        with (folder / "lock").open("rb") as file:
            raise FileExistsError(f"{folder} is in use by {_lock._holder(file.fileno())}")

    def read_plans(content: bytes) -> None:
        put(folder / "gpu.json", content)
        with patch("vamoh.kernels._plan.TUNED", folder):
            _plan._table.__wrapped__("GPU", 90)

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
    yield "SHA256SUMS", [whole["SHA256SUMS"]], read_sums
    observed = np.arange(20).reshape(4, 5) % 3 > 0
    for suffix in (".npy", ".png"):
        buffer = io.BytesIO()
        np.save(buffer, observed) if suffix == ".npy" else Image.fromarray(observed).save(buffer, "png")
        yield f"mask{suffix}", [buffer.getvalue()], read_mask(suffix)
    holder = {"pid": 1234, "host": "host", "since": "2026-01-01 00:00:00"}
    yield "lock", [json.dumps(holder).encode()], read_lock
    plans = [{"op": "inr_mixture", "sizes": [2, 8, 16], "variant": ["forward", True], "blocks": {"points": 64}}]
    yield "plans.json", [json.dumps({"capability": 90, "plans": plans}).encode()], read_plans
    words = ["train digits --out o --train.lr 0.1 --model.inr-widths 8 8 --seed 3", "sample r --count 3 --device cpu"]
    words += ["export r --part encoder --format onnx", "convert c --out o --config y", "evaluate r --split test"]
    yield "command line", ["\n".join(text.split()).encode() for text in words], read_command
    assert {text.split()[0] for text in words} <= COMMANDS.keys()


class Fork:
    """What `subprocess.Popen` is to the reader of NetCDF, but forked from this process: nothing is imported anew."""

    def __init__(self, command: list[str], **_: Any) -> None:
        (down, self_in), (self_out, up) = os.pipe(), os.pipe()
        self.pid = os.fork()
        self.status: int | None = None
        if self.pid == 0:
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                for old, new in ((down, 0), (up, 1), (null, 2)):
                    os.dup2(old, new)
                os.closerange(3, 64)
                sys.stdin = os.fdopen(0, "r", closefd=False)
                fields_process.serve(*command[-2:])
                os._exit(0)
            finally:
                os._exit(1)
        os.close(down)
        os.close(up)
        self.stdin, self.stdout = os.fdopen(self_in, "wb"), os.fdopen(self_out, "rb")

    def poll(self) -> int | None:
        if self.status is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(ended[1])
        return self.status

    def wait(self, timeout: float = 60) -> int:
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("reader", timeout)
            time.sleep(0.0005)
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def data_readers(folder: Path) -> Iterator[tuple[str, list[bytes], Reader]]:
    """The same of the files of data sets."""

    def read(kind: str) -> Reader:
        def damaged(content: bytes) -> None:
            with patch("subprocess.Popen", Fork):
                found = data_files.open_damaged(folder, kind, content)
            if found != "read":
                raise ValueError(found)

        return damaged

    for kind, (_, _, make) in data_files.kinds().items():
        yield kind, [make()], read(kind)


def run_mutations(
    count: int, seed: int, folder: Path, readers: Iterable[tuple[str, list[bytes], Reader]]
) -> Iterator[tuple[str, Counter[str], list[str]]]:
    """Feed `count` damaged inputs to every reader; how they ended, and what is wrong with those that ended badly."""
    for name, wholes, read in readers:
        ends: Counter[str] = Counter()
        wrong: list[str] = []
        for whole in wholes if name != "lock" else ():
            read(whole)
        for i in range(count):
            generator = random.Random(f"{seed} {name} {i}")
            content = generator.choice(wholes)
            if generator.random() < 0.5:
                content = mutate(content, generator)
            else:
                content = data_files.mutate(content, np.random.default_rng(generator.getrandbits(64)))
            started = time.process_time()
            try:
                read(content)
                end = "read"
            except (ValueError, TypeError, OSError) as error:
                end = "refused"
                message = str(error).replace(str(folder), "")
                # An unknown key is answered with all that there are.
                if len(message) >= (1000 if name.endswith(".yaml") else LONGEST):
                    end = f"a message of {len(message)} characters"
                elif "\n" in message.strip() or ("tensor(" in message and b"tensor(" not in content):
                    end = "a message of several lines or of tensors"
            except Exception as error:
                end = f"{type(error).__name__}: {error}"
            if (seconds := time.process_time() - started) > SLOWEST:
                end = f"took {seconds:.0f} s"
            ends[end if end in ("read", "refused") else "wrong"] += 1
            if end not in ("read", "refused"):
                wrong.append(f"{name}, input {i} of seed {seed}: {end[:500]}")
        yield name, ends, wrong


@pytest.mark.slow
def test_a_thousand_damaged_inputs(tmp_path: Path) -> None:
    names = []
    for name, ends, wrong in run_mutations(100, 0, tmp_path, readers(tmp_path)):
        assert not wrong
        assert ends.total() == 100 and ends["read"] < 100, name
        names.append(name)
    assert len(names) == 12


@pytest.mark.parametrize("seed", range(3))
def test_mutations_change_something(seed: int) -> None:
    whole, generator = bytes(range(256)), random.Random(seed)
    assert sum(mutate(whole, generator) != whole for _ in range(100)) > 70


if __name__ == "__main__":
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        all_readers = itertools.chain(readers(place), data_readers(place))
        chosen = (reader for reader in all_readers if reader[0] in sys.argv[3:] or not sys.argv[3:])
        for name, ends, wrong in run_mutations(int(sys.argv[1]), int(sys.argv[2]), place, chosen):
            print(name, ends.total(), dict(ends), flush=True)
            print(*wrong[:20], sep="\n", end="\n" * bool(wrong), flush=True)
            failed |= bool(wrong)
    sys.exit(failed)
