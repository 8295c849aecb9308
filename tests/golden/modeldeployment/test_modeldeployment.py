"""A ModelDeployment in, its objects and its status out, byte for byte. UPDATE_GOLDEN=1 writes the files anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.unit.operator.makers import NOW, SETTINGS
from tests.unit.operator.merge_makers import trained
from trimtab_api.v1alpha1 import ModelDeployment
from trimtab_operator.modeldeployment.plan import Seen, plan

HERE = Path(__file__).parent
EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "who-are-you"
WITH_ACCELERATORS = {
    "replicas": 2,
    "engine": {"tensorParallel": 2, "maxLoraRank": 64, "gpuMemoryUtilization": 0.8},
    "storage": {"caBundle": {"configMapName": "private-ca"}, "credentials": {"secretName": "other-keys"}},
    "pod": {
        "resources": {"limits": {"nvidia.com/gpu": 2}},
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "serviceAccountName": "mine",
        "volumes": [{"claimName": "cache", "mountPath": "/cache"}],
    },
    "adapters": [{"name": "swift", "from": {"volume": {"claimName": "adapters", "path": "swift"}}}],
}


@pytest.mark.parametrize(
    ("name", "changes"), [("chat", {}), ("accelerated", WITH_ACCELERATORS)], ids=["chat", "accelerated"]
)
def test_becomes_what_it_became(name: str, changes: dict[str, object]) -> None:
    document = yaml.safe_load((EXAMPLES / "chat.yaml").read_text(encoding="utf-8"))
    document["metadata"] |= {"namespace": "ns", "uid": "d1", "generation": 1}
    document["spec"] |= changes
    producers = dict([trained("base", kind="model"), trained("swift"), trained("harbour")])
    decided = plan(Seen(ModelDeployment.read(document), SETTINGS, producers), NOW)
    made = {"create": list(decided.create), "apply": list(decided.apply), "status": decided.status}
    text = yaml.safe_dump(yaml.safe_load(yaml.safe_dump(made)), sort_keys=True, width=120)
    golden = HERE / f"{name}.golden.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"differs from {golden.name}; UPDATE_GOLDEN=1 writes it anew"
