"""The run log and the environment report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vamoh.runlog import RunLog, environment, read_log


def test_lines_are_there_at_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path) as log:
        log.write({"step": 1, "elbo": 0.1 + 0.2})
        assert read_log(path) == [{"step": 1, "elbo": 0.30000000000000004}]
        log.write({"step": 2})
        log.sync()
    assert path.read_text() == '{"step": 1, "elbo": 0.30000000000000004}\n{"step": 2}\n'


def test_resuming_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "split": split}) for step in (1, 2, 3) for split in ("train", "validation")]
    path.write_text("\n".join(lines) + '\n{"step": 4, "elb')
    assert [entry["step"] for entry in read_log(path)] == [1, 1, 2, 2, 3, 3]
    with RunLog(path, after_step=2) as log:
        log.write({"step": 3, "split": "new"})
    assert path.read_text().splitlines() == [*lines[:4], '{"step": 3, "split": "new"}']
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_goes_even_if_its_step_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    RunLog(path, after_step=5).close()
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"a": 1}',
        '{"step": "x"}',
        "\xff",
        '{"step": 1, "elbo": "x"}',
        '{"step": 1, "elbo": NaN}',
        '{"step": true}',
        "[" * 100_000,
    ],
)
def test_a_broken_line_in_the_middle_is_an_error(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'.encode("latin-1"))
    with pytest.raises(
        ValueError, match="line 2 of .*metrics.jsonl must be a JSON object with an int step and finite numbers, got"
    ):
        read_log(path)


def test_numbers_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="JSON compliant"):
        log.write({"step": 1, "elbo": float("nan")})
    assert read_log(tmp_path / "metrics.jsonl") == []


def test_no_log_is_an_empty_log(tmp_path: Path) -> None:
    assert read_log(tmp_path / "metrics.jsonl") == []


def test_environment() -> None:
    report = json.loads(json.dumps(environment("cpu")))
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"] == "cpu"
    assert report["device_name"]
    assert report["threads"] == torch.get_num_threads()


def test_the_version_of_torch_is_its_own_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which says the build as well; that of the package may not."""
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu999")
    assert environment("cpu")["versions"]["torch"] == "2.99.0+cu999"
