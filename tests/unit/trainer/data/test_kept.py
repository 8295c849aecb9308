"""Tokenised rows that are kept: made by one pod, taken by others and by later attempts, never when they are broken."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.unit.trainer.conftest import SCRATCH, conversation, run_config, spec, training
from tests.unit.trainer.strategies.cells import Cell, log, run_all
from trimtab_api.conditions import Reason
from trimtab_api.contract import DataInput, Layout, OutputTarget, RunConfig, S3Place
from trimtab_trainer.data import kept
from trimtab_trainer.distributed import Group, Place
from trimtab_trainer.output import FolderOutput

ALONE = Group(Place(rank=0, local_rank=0, world=1, local_world=1), 1, 60)


class Maker:
    """Makes rows of a size, and counts."""

    def __init__(self, size: int = kept.WORTH_KEEPING, digest: str = "d"):
        self.size, self.digest, self.made = size, digest, 0

    def __call__(self, into: Path) -> str:
        self.made += 1
        (into / kept.TRAIN).write_bytes(b"x" * self.size)
        return self.digest


def obtain(root: Path, make: Maker, attempt: int) -> bytes:
    output = FolderOutput(root / "out")
    prefix = output.layout.sequences("key", shared=False)
    folder, digest = kept.obtain(ALONE, output, prefix, make, root / f"attempt-{attempt}", {})
    assert digest == make.digest
    return (folder / kept.TRAIN).read_bytes()


def test_what_was_kept_is_taken(tmp_path: Path) -> None:
    make = Maker()
    assert obtain(tmp_path, make, 1) == obtain(tmp_path, make, 2)
    assert make.made == 1


def test_few_rows_are_not_kept(tmp_path: Path) -> None:
    make = Maker(size=kept.WORTH_KEEPING - 1)
    obtain(tmp_path, make, 1)
    obtain(tmp_path, make, 2)
    assert make.made == 2
    assert not (tmp_path / "out").exists()


def test_what_is_broken_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make = Maker()
    wanted = obtain(tmp_path, make, 1)
    file = tmp_path / "out/sequences/key" / kept.TRAIN
    file.write_bytes(b"y" * len(wanted))
    with caplog.at_level(logging.WARNING):
        assert obtain(tmp_path, make, 2) == wanted
    assert "cannot be used, the rows are tokenised again" in caplog.text


def test_rows_that_come_out_otherwise_end_the_run(tmp_path: Path) -> None:
    obtain(tmp_path, Maker(), 1)
    (tmp_path / "out/sequences/key" / kept.TRAIN).write_bytes(b"y")
    with pytest.raises(Exception, match="not what the manifest says"):
        kept.obtain(
            ALONE,
            FolderOutput(tmp_path / "out"),
            f"{tmp_path}/out/sequences/key",
            Maker(digest="e"),
            tmp_path / "b",
            {},
        )


def key(folder: Path, config: RunConfig, rows: str = "r", template: str | None = "t", version: str = "1") -> str:
    return kept.Ingredients(rows, folder, template, {"tokenizers": version}).key(config)


def test_the_name_follows_from_what_matters(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    config = run_config(spec("sft"), tmp_path)
    usual = key(tmp_path, config)
    longer = spec("sft", dataset={**spec("sft").dataset.dump(), "maxLength": 64})
    faster = spec("sft", training=training(learningRate=1e-5, maxSteps=99), distributed={"nodes": 2})
    assert key(tmp_path, run_config(faster, tmp_path)) == usual
    # The preflight fetches no weights and must come to the name that the run comes to.
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert key(tmp_path, config) == usual
    others = [
        key(tmp_path, config, rows="s"),
        key(tmp_path, config, template=None),
        key(tmp_path, config, version="2"),
        key(tmp_path, run_config(longer, tmp_path)),
        key(tmp_path, run_config(spec("orpo"), tmp_path)),
    ]
    (tmp_path / "tokenizer.json").write_text("{ }")
    others.append(key(tmp_path, config))
    assert len({usual, *others}) == 7


@pytest.mark.parametrize(
    ("cache", "expected"),
    [("job", "s3://b/p/ns/job/uid/sequences/k"), ("namespace", "s3://b/p/ns/sequences/k")],
)
def test_where_it_is_kept(tmp_path: Path, cache: str, expected: str) -> None:
    wanted = spec("sft", dataset={**spec("sft").dataset.dump(), "cache": cache})
    place = S3Place(uri="s3://b/p/ns/job/uid")
    config = run_config(wanted, tmp_path, target=OutputTarget(s3=place))
    assert kept.place(Layout(prefix=place.uri), config, "k") == expected


@pytest.mark.timeout(240)
def test_one_pod_tokenises_for_two_and_for_the_next_attempt(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(conversation(f"say {n}", f"{n} " * 16)) + "\n" for n in range(3000)))
    wanted = spec(
        model={"scratch": SCRATCH},
        training=training(maxSteps=2, perDeviceBatchSize=2),
        distributed={"processesPerNode": 1, "nodes": 2},
    )
    data = DataInput(field="dataset.train[0]", part=wanted.dataset.train[0], path=str(rows))
    config = run_config(wanted, tmp_path / "out", train=[data])
    small = run_config(spec(model={"scratch": SCRATCH}), tmp_path / "small", name="small")
    cells = [Cell(config, key="first"), Cell(config.model_copy(update={"attempt": 2}), key="second")]
    endings = run_all(Cell(small), [], cells, tmp_path / "work", 200)
    story = log(tmp_path / "work")
    assert [endings[name].reason for name in ("first", "second")] == [Reason.SUCCEEDED] * 2, story
    whole = "\n".join((tmp_path / "work" / f"log-{rank}").read_text() for rank in (0, 1))
    assert whole.count("kept the tokenised rows: ") == 1
    for cell, pod, made in (("first", 0, True), ("first", 1, False), ("second", 0, False), ("second", 1, False)):
        assert (tmp_path / f"work/pod-{pod}/{cell}/run/sequences" / kept.TRAIN).is_file() is made, (cell, pod)
    assert len(list((tmp_path / "out/sequences").iterdir())) == 1
    assert not (tmp_path / "small/sequences").exists()
