"""A ModelDeployment's way: what is served, what restarts engines and what must not, and what its status says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.unit.operator.makers import DIGEST, NOW, SETTINGS, at
from tests.unit.operator.merge_makers import OTHER_DIGEST, trained
from trimtab_api import names
from trimtab_api.conditions import Reason
from trimtab_api.contract import ServeConfig
from trimtab_api.v1alpha1 import ModelDeployment
from trimtab_operator.modeldeployment.plan import Seen, hindered, plan
from trimtab_operator.plan import Plan
from trimtab_operator.settings import Settings
from trimtab_operator.sources import Producer, Reference

NEWER = "sha256:" + "c" * 64


def everything() -> dict[Reference, Producer | None]:
    return dict([trained("base", kind="model", digest=OTHER_DIGEST), trained("swift"), trained("harbour")])


def ready(is_ready: bool) -> list[dict[str, str]]:
    return [{"type": "Ready", "status": "True" if is_ready else "False"}]


@dataclass
class Story:
    """A ModelDeployment and what happened to it."""

    spec: dict[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ("swift", "harbour")
    status: dict[str, Any] = field(default_factory=dict)
    producers: dict[Reference, Producer | None] = field(default_factory=everything)
    children: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    pods: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    settings: Settings = SETTINGS

    def deployment(self) -> ModelDeployment:
        adapters = [{"name": each, "from": {"fineTuneJob": {"name": each}}} for each in self.adapters]
        spec = {"model": {"name": "base", "from": {"fineTuneJob": {"name": "base"}}}, "adapters": adapters, **self.spec}
        metadata = {"name": "chat", "namespace": "ns", "uid": "d1", "generation": 2}
        document = {"metadata": metadata, "spec": spec}
        return ModelDeployment.read({**document, **({"status": self.status} if self.status else {})})

    def seen(self) -> Seen:
        return Seen(
            self.deployment(), self.settings, self.producers, self.children, tuple(self.pods), tuple(self.warnings)
        )

    def step(self) -> Plan:
        """Plan, and carry the plan out as the API server and its controllers would."""
        decided = plan(self.seen(), NOW)
        for made in [*decided.create, *decided.apply]:
            kept = self.children.get((made["kind"], made["metadata"]["name"]), {})
            made["metadata"] = {**made["metadata"], "uid": made["metadata"]["name"], "generation": 1}
            self.children[made["kind"], made["metadata"]["name"]] = {**kept, **made}
        for ref, patch in decided.patch:
            for part, change in patch.items():
                self.children[ref.kind, ref.name].setdefault(part, {}).update(change)
        for ref in decided.delete:
            del self.children[ref.kind, ref.name]
        self.status = dict(decided.status or {})
        replicas = self.workload["spec"]["replicas"] if self.workload else 0
        if self.workload:
            counted = {"replicas": replicas, "updatedReplicas": replicas, "observedGeneration": 1}
            self.workload.setdefault("status", {}).update(counted)
        return decided

    def running(self, *pods: bool) -> Story:
        """The deployment was made and has these pods, each ready or not."""
        self.step()
        for index, is_ready in enumerate(pods):
            meta = {"name": f"chat-{index}", "namespace": "ns", "uid": f"p{index}", "creationTimestamp": at(-50)}
            status = {"phase": "Running", "conditions": ready(is_ready), "containerStatuses": [], "podIP": "10.0.0.1"}
            status["containerStatuses"] = [{"name": "engine", "state": {"running": {"startedAt": at(-40)}}}]
            self.pods.append({"metadata": meta, "spec": {}, "status": status})
        return self

    def reports(self, pod: int = 0, uid: str | None = None, reason: str = "Serving", **adapters: Any) -> Story:
        """What the agent of a pod says: adapter=digest, or adapter=(reason, message)."""
        lines = [
            {"name": name, "digest": value, "reason": "Loaded"}
            if isinstance(value, str)
            else {"name": name, "reason": value[0], "message": value[1]}
            for name, value in adapters.items()
        ]
        said = {"podUid": uid or f"p{pod}", "modelReady": True, "reason": reason, "message": "m", "adapters": lines}
        data = self.children["ConfigMap", "chat-reports"].setdefault("data", {})
        data[f"chat-{pod}"] = json.dumps(said)
        return self

    def serving(self) -> Story:
        """One pod, everything loaded, and the status that tells of it."""
        story = self.running(True).reports(swift=DIGEST, harbour=DIGEST)
        story.step()
        return story

    @property
    def workload(self) -> dict[str, Any]:
        return self.children.get(("Deployment", "chat-server"), {})

    @property
    def desired(self) -> ServeConfig:
        return ServeConfig.read(json.loads(self.children["ConfigMap", "chat-desired"]["data"]["serve.json"]))


def condition(status: Any, kind: str = "Ready") -> tuple[str, str]:
    found = next(each for each in status["conditions"] if each["type"] == kind)
    return found["status"], found["reason"]


def message(status: Any, kind: str = "Ready") -> str:
    return str(next(each for each in status["conditions"] if each["type"] == kind).get("message", ""))


# ---------------------------------------------------------------- what the status says


@dataclass(frozen=True)
class Case:
    name: str
    there: Callable[[], Story]
    ready: tuple[str, str]
    progressing: tuple[str, str] | None = None
    degraded: tuple[str, str] | None = None
    says: str = ""


def scheduled_nowhere(story: Story) -> Story:
    story.pods[0]["status"]["conditions"].append(
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
    )
    return story


def refused(story: Story) -> Story:
    failure = {"type": "ReplicaFailure", "status": "True", "message": 'pods "x" is forbidden: exceeded quota'}
    story.workload["status"] = {"conditions": [failure]}
    return story


def crashing(story: Story) -> Story:
    story.pods[0]["status"]["containerStatuses"] = [
        {
            "name": "engine",
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1, "message": "ValueError: no such dtype"}},
        }
    ]
    return story


def unmounted(story: Story) -> Story:
    pod = story.pods[0]
    pod["status"]["containerStatuses"] = []
    pod["spec"] = {"volumes": [{"name": "credentials-1", "projected": {"sources": [{"secret": {"name": "keys"}}]}}]}
    text = 'MountVolume.SetUp failed for volume "credentials-1" : secret "keys" not found'
    story.warnings.append(
        {"reason": "FailedMount", "message": text, "lastTimestamp": at(-3), "involvedObject": {"name": "chat-0"}}
    )
    return story


def lost(story: Story) -> Story:
    story.pods[0]["status"]["conditions"] = ready(False)
    return story


CASES = [
    Case(
        "it waits for its base",
        lambda: Story(producers={**everything(), Reference("FineTuneJob", "base"): None}),
        ("Unknown", "Waiting"),
        ("True", "Waiting"),
        ("False", "Waiting"),
        says="FineTuneJob base, which does not exist",
    ),
    Case("it starts", lambda: Story().running(False), ("Unknown", "Starting"), ("True", "Starting")),
    Case(
        "all is served",
        lambda: Story().running(True).reports(swift=DIGEST, harbour=DIGEST),
        ("True", "Serving"),
        ("False", "Serving"),
        ("False", "Serving"),
    ),
    Case(
        "an adapter waits for its job, the others are served",
        lambda: (
            Story(producers={**everything(), **dict([trained("swift", digest=None)])})
            .running(True)
            .reports(harbour=DIGEST)
        ),
        ("Unknown", "Waiting"),
        ("True", "Waiting"),
        ("False", "Waiting"),
        says="swift (Waiting",
    ),
    Case(
        "an adapter is being loaded",
        lambda: Story().running(True).reports(swift=("Loading", "fetching"), harbour=DIGEST),
        ("Unknown", "Loading"),
    ),
    Case(
        "a broken adapter fails alone",
        lambda: Story().running(True).reports(swift=("UnsafeFormat", "is pickled"), harbour=DIGEST),
        ("False", "AdaptersFailed"),
        ("False", "Serving"),
        ("True", "AdaptersFailed"),
        says="swift (UnsafeFormat: is pickled)",
    ),
    Case(
        "a report of a namesake of the pod is not believed",
        lambda: Story().running(True).reports(uid="p-before", swift=DIGEST, harbour=DIGEST),
        ("Unknown", "Loading"),
    ),
    Case("a pod is lost", lambda: lost(Story().serving()), ("False", "ReplicasUnavailable"), ("True", "Starting")),
    Case(
        "one of two pods answers",
        lambda: Story(spec={"replicas": 2}).running(True, False).reports(swift=DIGEST, harbour=DIGEST),
        ("False", "ReplicasUnavailable"),
        ("True", "Starting"),
        ("True", "ReplicasUnavailable"),
        says="1 of 2",
    ),
    Case("no node has room", lambda: scheduled_nowhere(Story().running(False)), ("False", "Unschedulable")),
    Case("the API server refuses", lambda: refused(Story().running()), ("False", "PodsRefused"), says="exceeded quota"),
    Case(
        "the engine crashes",
        lambda: crashing(Story().running(False)),
        ("False", "EngineFailed"),
        says="ValueError: no such dtype",
    ),
    Case(
        "a Secret is missing",
        lambda: unmounted(Story().running(False)),
        ("False", "CredentialsMissing"),
        says="Secret keys is not in this namespace",
    ),
    Case(
        "the agent cannot fetch the base",
        lambda: Story().running(False).reports(reason="DigestMismatch"),
        ("False", "DigestMismatch"),
    ),
    Case("it is scaled to zero", lambda: Story(spec={"replicas": 0}).running(), ("False", "ScaledToZero")),
    Case(
        "an adapter is called as the resource is, which is the model's name too",
        lambda: Story(
            spec={"model": {"from": {"fineTuneJob": {"name": "base"}}}},
            adapters=("chat",),
            producers={**everything(), **dict([trained("chat")])},
        ),
        ("False", "SpecInvalid"),
        says="another name",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_status(case: Case) -> None:
    status = plan(case.there().seen(), NOW).status
    assert condition(status) == case.ready
    if case.progressing:
        assert condition(status, "Progressing") == case.progressing
    if case.degraded:
        assert condition(status, "Degraded") == case.degraded
    if case.says:
        assert case.says in message(status)


def test_the_status_tells_each_adapter_the_address_and_what_autoscalers_need() -> None:
    status = Story().serving().status
    assert status["url"] == "http://chat-server.ns.svc/v1"
    assert status["ready"] == "1/1"
    assert status["adaptersReady"] == "2/2"
    assert status["selector"] == "trimtab.dev/role=server,trimtab.dev/uid=d1"
    assert [(a["name"], a["digest"], a["readyReplicas"], a["reason"]) for a in status["adapters"]] == [
        ("swift", DIGEST, 1, "Loaded"),
        ("harbour", DIGEST, 1, "Loaded"),
    ]


def test_a_name_conflict_is_told() -> None:
    status = hindered(Story().seen(), NOW, "NameConflict", "Service chat-server exists")
    assert condition(status) == ("False", "NameConflict")
    assert message(status) == "Service chat-server exists"


# ---------------------------------------------------------------- what restarts engines, and what must not


def test_the_first_look_makes_everything_once() -> None:
    story = Story()
    first = story.step()
    assert [made["kind"] for made in first.create] == ["ConfigMap"], "the reports are the agents' and never applied"
    assert [made["kind"] for made in first.apply] == [
        "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "NetworkPolicy", "Service", "Deployment",
    ]  # fmt: skip
    again = story.step()
    assert (again.create, again.apply, again.patch, again.delete) == ((), (), (), ())


def kinds_applied(story: Story) -> list[str]:
    return [made["kind"] for made in story.step().apply]


def test_adapters_come_and_go_without_touching_the_pods() -> None:
    story = Story(adapters=("swift",)).serving()
    story.adapters = ("swift", "harbour")
    assert kinds_applied(story) == ["ConfigMap"]
    assert [each.name for each in story.desired.adapters] == ["swift", "harbour"]
    story.adapters = ("harbour",)
    assert kinds_applied(story) == ["ConfigMap"]
    assert [each.name for each in story.desired.adapters] == ["harbour"]


def test_a_new_version_of_an_adapter_is_followed() -> None:
    story = Story().serving()
    story.producers |= dict([trained("swift", digest=NEWER)])
    assert kinds_applied(story) == ["ConfigMap"]
    assert story.desired.adapters[0].source.s3 is not None
    assert story.desired.adapters[0].source.s3.digest == NEWER
    assert story.status["adapters"][0]["reason"] == "Loading"
    story.reports(swift=NEWER, harbour=DIGEST).step()
    assert story.status["adapters"][0]["reason"] == "Loaded"


@pytest.mark.parametrize("again", [None, trained("swift", digest=None)[1]], ids=["deleted", "running again"])
def test_an_adapter_whose_job_is_run_again_is_served_meanwhile(again: Producer | None) -> None:
    story = Story().serving()
    story.producers[Reference("FineTuneJob", "swift")] = again
    assert kinds_applied(story) == []
    assert condition(story.status) == ("True", "Serving")
    assert condition(story.status, "Progressing") == ("True", "Waiting")
    assert story.status["adapters"][0]["reason"] == "Waiting"
    assert story.status["adapters"][0]["digest"] == DIGEST


def test_a_base_whose_job_is_run_again_is_served_meanwhile() -> None:
    story = Story().serving()
    story.producers[Reference("FineTuneJob", "base")] = None
    assert kinds_applied(story) == []
    assert condition(story.status) == ("True", "Serving")
    assert condition(story.status, "Progressing") == ("True", "Waiting")


def test_a_new_base_rolls_the_pods() -> None:
    story = Story().serving()
    story.producers |= dict([trained("base", kind="model", digest=NEWER)])
    assert kinds_applied(story) == ["ConfigMap", "Deployment"]
    assert NEWER in story.workload["spec"]["template"]["metadata"]["annotations"]["trimtab.dev/model"]


@pytest.mark.parametrize(
    "spec",
    [
        {"engine": {"maxModelLength": 512}},
        {"engine": {"maxLoraRank": 64}},
        {"pod": {"env": [{"name": "A", "value": "b"}]}},
        {"model": {"name": "other", "from": {"fineTuneJob": {"name": "base"}}}},
    ],
    ids=str,
)
def test_what_only_a_restart_can_change_rolls_the_pods(spec: dict[str, Any]) -> None:
    story = Story().serving()
    story.spec = spec
    assert "Deployment" in kinds_applied(story)


def test_another_secret_rolls_the_pods() -> None:
    story = Story().serving()
    storage = {"credentials": {"secretName": "others"}}
    story.producers |= dict([trained("swift", output={"storage": storage})])
    assert kinds_applied(story) == ["ConfigMap", "Deployment"]


def test_an_upgrade_of_the_operator_rolls_nothing() -> None:
    story = Story().serving()
    images = SETTINGS.images.model_copy(update={"server": "registry/server@sha256:2"})
    story.settings = SETTINGS.model_copy(update={"images": images, "image_pull_secrets": ["registry"]})
    decided = story.step()
    assert (decided.apply, decided.patch) == ((), ())
    assert story.status["resolved"]["image"] == SETTINGS.images.server


def test_what_starts_from_zero_takes_the_image_of_now() -> None:
    story = Story().serving()
    story.settings = SETTINGS.model_copy(update={"images": SETTINGS.images.model_copy(update={"server": "newer"})})
    story.spec = {"replicas": 0}
    story.step()
    assert story.workload["spec"]["template"]["spec"]["containers"][0]["image"] == SETTINGS.images.server
    story.pods = []
    story.step()
    story.spec = {"replicas": 1}
    story.step()
    assert story.workload["spec"]["template"]["spec"]["containers"][0]["image"] == "newer"


def test_an_image_that_nobody_has_is_replaced_when_the_installation_names_another() -> None:
    story = Story().running(False)
    waiting = {"name": "engine", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no"}}}
    story.pods[0]["status"]["containerStatuses"] = [waiting]
    story.settings = SETTINGS.model_copy(update={"images": SETTINGS.images.model_copy(update={"server": "newer"})})
    story.step()
    assert condition(story.status) == ("False", "ImageUnavailable")
    assert kinds_applied(story) == ["Deployment"]
    assert story.workload["spec"]["template"]["spec"]["containers"][0]["image"] == "newer"


def test_another_number_of_pods_changes_that_number_alone() -> None:
    story = Story().serving()
    story.spec = {"replicas": 2}
    decided = story.step()
    assert [made["kind"] for made in decided.apply] == ["PodDisruptionBudget"]
    assert [(ref.kind, patch) for ref, patch in decided.patch] == [("Deployment", {"spec": {"replicas": 2}})]
    story.spec = {"replicas": 1}
    assert [ref.kind for ref in story.step().delete] == ["PodDisruptionBudget"]


def test_reports_of_pods_that_are_gone_are_taken_out() -> None:
    story = Story().serving()
    story.reports(pod=7)
    decided = story.step()
    assert [(ref.name, patch) for ref, patch in decided.patch] == [("chat-reports", {"data": {"chat-7": None}})]


def test_deleted_children_come_back() -> None:
    story = Story().serving()
    for child in [("Service", "chat-server"), ("Deployment", "chat-server"), ("ConfigMap", "chat-reports")]:
        del story.children[child]
    decided = plan(story.seen(), NOW)
    assert [made["kind"] for made in decided.create] == ["ConfigMap"]
    assert [made["kind"] for made in decided.apply] == ["Service", "Deployment"]


# ---------------------------------------------------------------- what is decided once


def resolved(story: Story) -> dict[str, Any]:
    story.step()
    return dict(story.status["resolved"])


def lora(rank: int) -> dict[str, Any]:
    return {"tuner": {"type": "lora", "lora": {"rank": rank}}}


@pytest.mark.parametrize(
    ("story", "rank", "loras", "host"),
    [
        (Story(adapters=()), 0, 0, 0),
        (Story(adapters=(), spec={"engine": {"maxLoraRank": 32}}), 32, 2, 8),
        (Story(), 16, 2, 10),
        (Story(adapters=("swift",), producers={**everything(), **dict([trained("swift", digest=None, **lora(48))])}),
         64, 2, 9),
        (Story(spec={"engine": {"maxLoras": 12}}), 16, 12, 24),
    ],
    ids=["no adapters", "room asked for", "two of rank 8", "one to come of rank 48", "maxLoras asked for"],
)  # fmt: skip
def test_room_for_adapters(story: Story, rank: int, loras: int, host: int) -> None:
    found = resolved(story)
    assert (found["maxLoraRank"], found["maxLoras"], found["maxCpuLoras"]) == (rank, loras, host)
    assert story.desired.max_lora_rank == rank


def test_an_adapter_where_no_room_was_made_says_what_to_do() -> None:
    story = Story(adapters=()).running(True).reports()
    story.step()
    story.adapters = ("swift",)
    assert kinds_applied(story) == ["ConfigMap"]
    assert story.status["adapters"][0]["reason"] == Reason.ADAPTER_RANK_TOO_LARGE
    assert "spec.engine.maxLoraRank" in story.status["adapters"][0]["message"]


def test_accelerators_are_given_before_they_are_taken() -> None:
    def surge(**limits: Any) -> Any:
        story = Story(spec={"pod": {"resources": {"limits": limits}}})
        story.step()
        return story.workload["spec"]["strategy"]["rollingUpdate"]

    assert surge(**{"nvidia.com/gpu": 1}) == {"maxSurge": 0, "maxUnavailable": 1}
    assert surge(memory="1Gi") == {"maxSurge": 1, "maxUnavailable": 0}


def test_keys_are_mounted_into_the_agent_alone_and_the_token_too() -> None:
    story = Story()
    story.step()
    pod = story.workload["spec"]["template"]["spec"]
    agent, engine = pod["initContainers"][0], pod["containers"][0]
    secret = [mount for mount in agent["volumeMounts"] if "/credentials/" in mount["mountPath"]]
    assert [mount["mountPath"] for mount in secret] == ["/var/run/trimtab/credentials/keys"]
    assert not [mount for mount in engine["volumeMounts"] if mount["mountPath"].startswith("/var/run")]
    assert pod["automountServiceAccountToken"] is False


def test_the_network_policy_opens_the_agents_door_alone() -> None:
    story = Story()
    story.step()
    policy = story.children["NetworkPolicy", "chat-server"]["spec"]
    assert (
        policy["podSelector"]["matchLabels"].items() <= story.workload["spec"]["template"]["metadata"]["labels"].items()
    )
    assert policy["ingress"] == [{"ports": [{"port": 8000, "protocol": "TCP"}]}]


def test_the_role_reaches_two_config_maps_by_name() -> None:
    story = Story()
    story.step()
    rules = story.children["Role", "chat-server"]["rules"]
    assert [(rule["resourceNames"], rule["verbs"]) for rule in rules] == [
        ([names.serving_desired("chat")], ["get", "list", "watch"]),
        ([names.serving_reports("chat")], ["get", "patch"]),
    ]
