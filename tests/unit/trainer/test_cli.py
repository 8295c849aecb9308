"""trimtab-train: the YAML that kubectl takes, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.unit.trainer.conftest import SCRATCH, chats
from trimtab_api.contract import Exit
from trimtab_trainer import cli, yamlfile
from trimtab_trainer.endings import Fault

JOB = """
apiVersion: trimtab.dev/v1alpha1
kind: FineTuneJob
metadata: {name: base}
spec:
  method: pretrain
  model: {scratch: %s}
  dataset:
    maxLength: 128
    train: [{from: {volume: {claimName: data, path: rows.jsonl}}}]
  training: {maxSteps: 4, perDeviceBatchSize: 4, gradientAccumulationSteps: 1, learningRate: 2e-3, loggingSteps: 1}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB % yaml.safe_dump(SCRATCH, default_flow_style=True, width=1000).strip())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text(chats())
    return path


@pytest.mark.timeout(200)
def test_a_run_and_its_repetition(job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [str(job), "--output", str(tmp_path / "out"), "--volume", f"data={tmp_path / 'data'}"]
    assert cli.main(command) == Exit.OK
    said = capfd.readouterr()
    assert "Succeeded: published model after 4 steps" in said.out
    assert "step 4/4" in said.err
    assert (tmp_path / "out/artifact/manifest.json").is_file()

    job.write_text(job.read_text().replace("2e-3", "1e-3"))
    assert cli.main(command) == Exit.SPEC_INVALID
    assert "--fresh" in capfd.readouterr().err


def test_broken_rows_are_told_before_anything_starts(
    job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data/rows.jsonl").write_text(chats() + "{")
    code = cli.main([str(job), "--output", str(tmp_path / "out"), "--volume", f"data={tmp_path / 'data'}"])
    assert code == Exit.DATA_INVALID
    assert "row 25: not JSON" in capfd.readouterr().err


def test_what_stands_for_the_cluster_is_asked_for(job: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(job), "--output", str(tmp_path / "out")]) == Exit.SPEC_INVALID
    assert "--volume data=FOLDER" in capfd.readouterr().err
    text = job.read_text()
    job.write_text(
        text.replace("method: pretrain", "method: sft").replace(
            "model: {scratch:", "model: {from: {fineTuneJob: {name: base}}} #"
        )
    )
    code = cli.main([str(job), "--output", str(tmp_path / "out"), "--volume", f"data={tmp_path / 'data'}"])
    assert code == Exit.SPEC_INVALID
    assert "--reference base=FOLDER" in capfd.readouterr().err


def test_a_config_map_is_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is there is looked at, and what is not is asked for."""
    example = str(Path(__file__).parents[3] / "examples/methods/grpo-python.yaml")
    command = [example, "--output", str(tmp_path / "out"), "--reference", f"base={tmp_path}"]
    assert cli.main(command) == Exit.SPEC_INVALID
    assert "Add --config-map rewards=FOLDER, where FOLDER holds rewards.py." in capfd.readouterr().err
    assert cli.main([*command, "--config-map", f"rewards={tmp_path}"]) == Exit.SPEC_INVALID
    said = capfd.readouterr().err
    assert "grpo.rewards[0].python configMap://rewards/rewards.py: No such file" in said
    (tmp_path / "rewards.py").write_text("def brief(completions): ...")
    assert cli.main([*command, "--config-map", f"rewards={tmp_path}"]) == Exit.SPEC_INVALID
    assert "no such function at the top of the file, which has brief" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("kind: FineTuneJob", "kind: Pod"), "has 0 objects of kind FineTuneJob"),
        (("maxSteps: 4", "maxStep: 4"), "spec.training.maxStep"),
        (("learningRate: 2e-3", "learningRate: 7"), "spec.training.learningRate"),
        (("hiddenSize: 32", "hiddenSize: 34"), "spec.model.scratch.hiddenSize: must be a multiple"),
        (("  training:", "  tuner: {type: lora}\n  training:"), "spec.tuner.type: must be full"),
        (("method: pretrain", "method: [pretrain"), "not YAML"),
    ],
)
def test_what_the_api_server_would_refuse_is_refused(job: Path, change: tuple[str, str], said: str) -> None:
    assert change[0] in job.read_text()
    job.write_text(job.read_text().replace(*change))
    with pytest.raises(Fault) as caught:
        yamlfile.read(job)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("2E5", 2e5), ("1.5e+3", 1500.0), ("0.1", 0.1), (".5e1", 5.0)]
)
def test_numbers_are_numbers(text: str, number: float) -> None:
    assert yaml.load(f"rate: {text}", Loader=yamlfile.Loader) == {"rate": number}


@pytest.mark.parametrize("text", ["e5", "1e", "v1e4x"])
def test_words_stay_words(text: str) -> None:
    assert yaml.load(f"name: {text}", Loader=yamlfile.Loader) == {"name": text}
