"""trimtab-train: the same YAML without a cluster.

    trimtab-train finetune.yaml --output ./out

S3 sources take credentials from the environment (AWS_ACCESS_KEY_ID, ...). A claim is a folder given by --volume, a job
that is referred to is a folder or s3:// prefix given by --reference, a ConfigMap with Python is a folder given by
--config-map. Ctrl-C saves the step; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab_api import inputs
from trimtab_api.conditions import Reason
from trimtab_api.contract import (
    CodeInput,
    Connection,
    DataInput,
    Ending,
    Exit,
    JobIdentity,
    Layout,
    ModelInput,
    OutputTarget,
    RunConfig,
    S3Place,
)
from trimtab_api.resolve import resolve
from trimtab_api.v1alpha1.dataset import DataPart
from trimtab_api.v1alpha1.finetunejob import FineTuneJobSpec
from trimtab_api.v1alpha1.source import FolderSource, ModelSource, Storage, VolumeSource
from trimtab_trainer import preflight, workplace, yamlfile
from trimtab_trainer.endings import Fault, ending_of
from trimtab_trainer.launcher import Gang, launch

_LOCAL_FIELDS = {
    "pod",
    "suspend",
    "retries",
    "active_deadline_seconds",
    "ttl_seconds_after_finished",
    "checkpoint",
    "evaluation",
}
"""Fields that may change between two calls for one output folder."""


@dataclass(frozen=True)
class Elsewhere:
    """What stands for the cluster: folders for claims and ConfigMaps, places for jobs, the environment for Secrets."""

    volumes: Mapping[str, Path]
    references: Mapping[str, str]
    config_maps: Mapping[str, Path]
    environment: Mapping[str, str]

    def connection(self, *layers: Storage | None) -> Connection:
        """How to reach a storage: the first layer that says so, then the environment. Secrets are not looked for."""

        def first(name: str) -> Any:
            return next((value for each in layers if each and (value := getattr(each, name)) is not None), None)

        endpoint = first("endpoint") or self.environment.get("AWS_ENDPOINT_URL")
        path_style, verify = first("path_style"), first("verify_tls")
        return Connection(
            endpoint=endpoint,
            region=first("region") or self.environment.get("AWS_REGION"),
            path_style=bool(endpoint) if path_style is None else path_style,
            anonymous=bool(first("anonymous")),
            verify_tls=True if verify is None else verify,
            ca_file=self.environment.get("AWS_CA_BUNDLE"),
        )

    def volume(self, field: str, source: VolumeSource) -> str:
        """The folder of a claim."""
        if source.claim_name not in self.volumes:
            hint = f"Add --volume {source.claim_name}=FOLDER."
            raise Fault(Reason.SPEC_INVALID, f"{field}.volume: where is the claim {source.claim_name}?", hint)
        return str(self.volumes[source.claim_name] / source.path)

    def model(self, field: str, source: ModelSource, storage: Storage | None) -> ModelInput:
        """A model, in this process's terms."""
        if source.s3 is not None:
            place = S3Place(uri=source.s3.uri.rstrip("/"), connection=self.connection(source.s3.storage, storage))
            return ModelInput(field=field, reference=place.uri, s3=place)
        if source.hugging_face is not None:
            hub = source.hugging_face
            return ModelInput(field=field, reference=f"hf://{hub.repo}@{hub.revision}", hugging_face=hub)
        if source.volume is not None:
            reference = f"volume://{source.volume.claim_name}/{source.volume.path}".rstrip("/")
            return ModelInput(field=field, reference=reference, path=self.volume(field, source.volume))
        return self._job(field, source, storage)

    def _job(self, field: str, source: ModelSource, storage: Storage | None) -> ModelInput:
        kind = "fineTuneJob" if source.fine_tune_job is not None else "mergeJob"
        job = source.fine_tune_job or source.merge_job
        assert job is not None, "a source has exactly one member"
        where = self.references.get(job.name)
        if where is None:
            hint = f"Add --reference {job.name}=FOLDER or --reference {job.name}=s3://BUCKET/PREFIX."
            raise Fault(Reason.SPEC_INVALID, f"{field}.{kind}: where is the artifact of {job.name}?", hint)
        if where.startswith("s3://"):
            return ModelInput(field=field, reference=where, s3=S3Place(uri=where, connection=self.connection(storage)))
        return ModelInput(field=field, reference=f"{kind}/{job.name}", path=str(artifact_in(Path(where))))

    def data(self, field: str, part: DataPart, storage: Storage | None) -> DataInput:
        """One source of rows, in this process's terms."""
        source, media = part.from_, self.folder(f"{field}.mediaFrom", part.media_from, storage)
        if source.s3 is not None:
            place = S3Place(uri=source.s3.uri, connection=self.connection(source.s3.storage, storage))
            return DataInput(field=field, part=part, s3=place, media=media)
        if source.volume is not None:
            return DataInput(field=field, part=part, path=self.volume(field, source.volume), media=media)
        hub = source.hugging_face
        return DataInput(field=field, part=part, hugging_face=hub, inline=source.inline, media=media)

    def code(self, each: inputs.Code) -> CodeInput:
        """A file of Python, in this process's terms."""
        folder = self.config_maps.get(each.file.name)
        if folder is None:
            hint = f"Add --config-map {each.file.name}=FOLDER, where FOLDER holds {each.file.key}."
            raise Fault(Reason.SPEC_INVALID, f"{each.field}: where is the ConfigMap {each.file.name}?", hint)
        return CodeInput(field=each.field, reference=each.reference, path=str(folder / each.file.key))

    def folder(self, field: str, source: FolderSource | None, storage: Storage | None) -> ModelInput | None:
        """A folder of files that rows name, in this process's terms."""
        if source is None:
            return None
        return self.model(field, ModelSource(s3=source.s3, volume=source.volume), storage)


def artifact_in(folder: Path) -> Path:
    """The artifact of an output folder of ours, or the folder itself."""
    inner = Path(Layout(prefix=str(folder)).artifact)
    return inner if inner.is_dir() else folder


def run_config(name: str, spec: FineTuneJobSpec, output: Path, elsewhere: Elsewhere) -> RunConfig:
    """What the operator would write into run.json, for a folder on this computer.

    Raises Fault(SpecInvalid) when a claim, job or ConfigMap has no place.
    """
    models = {each.field: elsewhere.model(each.field, each.source, spec.storage) for each in inputs.named(spec)}
    return RunConfig(
        job=JobIdentity(namespace="local", name=name, uid="local"),
        attempt=1,
        spec=spec,
        resolved=resolve(spec, output_uri=str(output)),
        model=models.pop(inputs.MODEL, None),
        tokenizer=models.pop(inputs.TOKENIZER, None),
        further=list(models.values()),
        code=[elsewhere.code(each) for each in inputs.code(spec)],
        train=[elsewhere.data(f"dataset.train[{i}]", each, spec.storage) for i, each in enumerate(spec.dataset.train)],
        validation=[
            elsewhere.data(f"dataset.validation[{i}]", each, spec.storage)
            for i, each in enumerate(spec.dataset.validation)
        ],
        output=OutputTarget(path=str(output)),
    )


def _same_run(run_file: Path, config: RunConfig) -> None:
    """Raise Fault(SpecInvalid) when the folder's checkpoints belong to another spec."""
    if not run_file.is_file():
        return
    before = RunConfig.model_validate_json(run_file.read_text())
    if _essence(before) != _essence(config):
        raise Fault(
            Reason.SPEC_INVALID,
            f"{run_file.parent.parent} holds the checkpoints of another spec",
            "Add --fresh to delete them, or choose another --output.",
        )


def _essence(config: RunConfig) -> str:
    return json.dumps(config.spec.model_dump(mode="json", exclude=_LOCAL_FIELDS), sort_keys=True)


def train(options: argparse.Namespace) -> tuple[Exit, Ending]:
    """Check the inputs, then train on this computer."""
    meta, spec = yamlfile.read(options.job)
    output: Path = options.output.absolute()
    if options.fresh and output.is_dir():
        shutil.rmtree(output)
    work = output / ".work"
    elsewhere = Elsewhere(
        volumes=_folders(options.volume),
        references=dict(_pairs(options.reference)),
        config_maps=_folders(options.config_map),
        environment=os.environ,
    )
    config = run_config(meta.name, spec, output, elsewhere)
    run_file = work / "run.json"
    _same_run(run_file, config)
    work.mkdir(parents=True, exist_ok=True)
    config = _checked(config, work / "preflight")
    run_file.write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    environment = {
        **os.environ,
        workplace.RUN_FILE: str(run_file),
        workplace.WORK: str(work),
        workplace.BAR: "1",
    }
    os.environ.update(environment)
    gang = Gang(nodes=1, processes=config.resolved.world_size, node_rank=0, address="127.0.0.1", port=0)
    result = launch(config, gang, environment)
    shutil.rmtree(work / "run", ignore_errors=True)
    return result.exit, result.ending


def _checked(config: RunConfig, work: Path) -> RunConfig:
    """The preflight's verdict, and its pins."""
    try:
        found = preflight.check(config, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return config.model_copy(update={"pins": found.pins})


def _pairs(given: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [tuple(each.partition("=")[::2]) for each in given]
    for name, value in pairs:
        if not name or not value:
            raise Fault(Reason.SPEC_INVALID, f"{name or '?'}: write NAME=PATH", "See trimtab-train --help.")
    return [(name, value) for name, value in pairs]


def _folders(given: Sequence[str]) -> dict[str, Path]:
    return {name: Path(value).absolute() for name, value in _pairs(given)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="trimtab-train", description="Run a FineTuneJob on this computer, without a cluster."
    )
    made.add_argument("job", type=Path, help="YAML file with one FineTuneJob")
    made.add_argument("--output", type=Path, required=True, help="folder for checkpoints, artifact and report")
    made.add_argument("--volume", action="append", default=[], metavar="CLAIM=FOLDER", help="what a claim holds")
    made.add_argument("--reference", action="append", default=[], metavar="JOB=PLACE", help="folder or s3:// of a job")
    made.add_argument("--config-map", action="append", default=[], metavar="NAME=FOLDER", help="its keys as files")
    made.add_argument("--fresh", action="store_true", help="delete what the output folder holds and begin anew")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and say how it ended; returns the exit code that a pod would have had."""
    workplace.log_to_stderr(quiet=True)
    options = parser().parse_args(arguments)
    try:
        code, ending = train(options)
    except Exception as error:  # noqa: BLE001 - the last door: whatever it is, it is said in one form
        code, ending = ending_of(error)
    stream = sys.stdout if code is Exit.OK else sys.stderr
    stream.write(f"{ending.reason}: {ending.message}\n")
    if ending.hint:
        stream.write(f"  {ending.hint}\n")
    if ending.artifact is not None:
        stream.write(f"  {ending.artifact.uri}  {ending.artifact.digest}\n")
    if ending.predictions is not None:
        stream.write(f"  {ending.predictions.uri}  {ending.predictions.rows} rows answered\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
