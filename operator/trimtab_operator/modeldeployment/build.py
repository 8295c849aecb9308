"""What a ModelDeployment becomes: pods behind a Service, and the two ConfigMaps through which agents are spoken with.

Same input, same bytes. Adapters stand in the desired ConfigMap alone, so that they come and go without touching the
pods; what only a restart can change (model, image, engine arguments, mounts) stands in the template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trimtab_api import names
from trimtab_api.contract import AGENT_PORT, METRICS_PORT, SERVE_KEY, WORK_ROOT, ModelInput, ServeConfig
from trimtab_api.v1alpha1 import ModelDeployment
from trimtab_api.v1alpha1.modeldeployment import ResolvedServing
from trimtab_operator import pods
from trimtab_operator.plan import Object

ROLE = "server"
AGENT = "agent"
ENGINE = "engine"
MODEL_ANNOTATION = f"{names.GROUP}/model"
"""The base that the pods serve. A pod decides for its base once, so another one must be another template."""

GRACE_SECONDS = 120
"""A pod's time to end: the agent drains for up to 90 s, then the engine stops."""
ROLLOUT_SECONDS = 3600
"""How long a rollout may take before the Deployment calls it stuck: large models take long to fetch."""
AGENT_RESOURCES = {"requests": {"cpu": "100m", "memory": "192Mi"}, "limits": {"memory": "1Gi"}}
SHARED_MEMORY = "1Gi"


@dataclass(frozen=True)
class Serving:
    """All that the objects follow from."""

    deployment: ModelDeployment
    resolved: ResolvedServing
    """What was pinned at the start."""
    config: ServeConfig
    """What the agents shall serve now."""
    pull_secrets: Sequence[str] = ()
    """Registry credentials of the installation."""

    @property
    def inputs(self) -> list[ModelInput]:
        """Everything that the pods read."""
        return [self.config.model.source, *(adapter.source for adapter in self.config.adapters)]

    @property
    def hash(self) -> str:
        """Identity of what the pods are made from. The template is written again when this changes and at no other
        time, so that a newer operator, which may write templates otherwise, rolls no engine."""
        spec = self.deployment.spec
        made_from = {
            "resolved": self.resolved.dump(),
            "engine": spec.engine.dump(),
            "pod": spec.pod.dump(),
            "mounts": pods.storage(self.inputs).mounts,
        }
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def name(self) -> str:
        """The name of the ModelDeployment."""
        return self.deployment.metadata.name


def objects(serving: Serving) -> list[Object]:
    """Every object but the Deployment that follows from the spec, in the order of creation."""
    made = [
        *([] if serving.deployment.spec.pod.service_account_name else [service_account(serving)]),
        role(serving),
        role_binding(serving),
        desired(serving),
        network_policy(serving),
        service(serving),
    ]
    return [*made, disruption_budget(serving)] if serving.deployment.spec.replicas > 1 else made


# ---------------------------------------------------------------- what the agents may do


def service_account(serving: Serving) -> Object:
    """The account of the pods; none is made when the user names one."""
    return _object(serving, "v1", "ServiceAccount", names.server(serving.name)) | {
        "automountServiceAccountToken": False
    }


def account_name(serving: Serving) -> str:
    """The account that the pods run as."""
    return serving.deployment.spec.pod.service_account_name or names.server(serving.name)


def role(serving: Serving) -> Object:
    """Read what to serve and write what is served: two ConfigMaps by name, nothing else."""
    return _object(serving, "rbac.authorization.k8s.io/v1", "Role", names.server(serving.name)) | {
        "rules": [
            _rule(names.serving_desired(serving.name), "get", "list", "watch"),
            _rule(names.serving_reports(serving.name), "get", "patch"),
        ]
    }


def _rule(config_map: str, *verbs: str) -> Object:
    return {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [config_map], "verbs": list(verbs)}


def role_binding(serving: Serving) -> Object:
    """Gives the role to the account of the pods."""
    name = names.server(serving.name)
    return _object(serving, "rbac.authorization.k8s.io/v1", "RoleBinding", name) | {
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [
            {
                "kind": "ServiceAccount",
                "name": account_name(serving),
                "namespace": serving.deployment.metadata.namespace,
            }
        ],
    }


# ---------------------------------------------------------------- what passes between operator and agents


def desired(serving: Serving) -> Object:
    """What the agents shall serve. Changing it restarts nothing."""
    text = json.dumps(serving.config.dump(), sort_keys=True, ensure_ascii=False)
    return _object(serving, "v1", "ConfigMap", names.serving_desired(serving.name)) | {"data": {SERVE_KEY: text}}


def reports(deployment: ModelDeployment) -> Object:
    """Where the agents answer. Made once and empty; what stands in it is theirs."""
    name = names.serving_reports(deployment.metadata.name)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": pods.metadata(deployment, name)}


# ---------------------------------------------------------------- how the pods are reached


def service(serving: Serving) -> Object:
    """The stable address; it reaches the agents, never the engines."""
    return _object(serving, "v1", "Service", names.server(serving.name)) | {
        "spec": {
            "type": "ClusterIP",
            "selector": selector(serving.deployment),
            # By number: older clusters do not find a port's name among the sidecars.
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": AGENT_PORT}],
        }
    }


def network_policy(serving: Serving) -> Object:
    """Nothing but the agent's door is open. A further policy of the user's may add what else is to come in."""
    return _object(serving, "networking.k8s.io/v1", "NetworkPolicy", names.server(serving.name)) | {
        "spec": {
            "podSelector": {"matchLabels": selector(serving.deployment)},
            "policyTypes": ["Ingress"],
            "ingress": [{"ports": [{"port": AGENT_PORT, "protocol": "TCP"}]}],
        }
    }


def disruption_budget(serving: Serving) -> Object:
    """Draining nodes takes one pod at a time; a pod that does not answer is nobody's loss."""
    return _object(serving, "policy/v1", "PodDisruptionBudget", names.server(serving.name)) | {
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": selector(serving.deployment)},
        }
    }


def selector(deployment: ModelDeployment) -> dict[str, str]:
    """The labels that tell this deployment's pods; by UID, so that a namesake's pods never answer for it."""
    return {names.OWNER_UID: deployment.metadata.uid, names.ROLE: ROLE}


# ---------------------------------------------------------------- the pods


def deployment(serving: Serving) -> Object:
    """The pods: the agent as a native sidecar, the engine behind it."""
    spec = serving.deployment.spec
    made = _object(serving, "apps/v1", "Deployment", names.server(serving.name))
    made["metadata"]["annotations"] = {names.SPEC_HASH: serving.hash}
    return made | {
        "spec": {
            "replicas": spec.replicas,
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": ROLLOUT_SECONDS,
            "selector": {"matchLabels": selector(serving.deployment)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": _surge(serving)},
            "template": _template(serving),
        }
    }


def _surge(serving: Serving) -> Object:
    """With accelerators a rollout gives before it takes: the only one of a node would be waited for without end."""
    limits = serving.deployment.spec.pod.resources.limits
    accelerated = any("/" in resource for resource in limits)
    return {"maxSurge": 0, "maxUnavailable": 1} if accelerated else {"maxSurge": 1, "maxUnavailable": 0}


def _template(serving: Serving) -> Object:
    shape = serving.deployment.spec.pod
    storage = pods.storage(serving.inputs)
    claims = pods.claims(shape.volumes)
    # The engine opens models on claims by their paths; keys and certificates are the agent's alone.
    sources = pods.storage(each for each in serving.inputs if each.path)
    return {
        "metadata": {
            "labels": pods.labels(serving.deployment, ROLE),
            "annotations": {
                "kubectl.kubernetes.io/default-container": ENGINE,
                MODEL_ANNOTATION: _model(serving.resolved),
            },
        },
        "spec": {
            "serviceAccountName": account_name(serving),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": pods.pod_security(),
            **pods.placement(shape),
            **pods.pull_secrets(serving.pull_secrets),
            "initContainers": [_agent(serving, storage.mounts)],
            "containers": [_engine(serving, [*sources.mounts, *claims.mounts])],
            "volumes": [
                {"name": "work", "emptyDir": {}},
                {"name": "agent-tmp", "emptyDir": {}},
                {"name": "engine-tmp", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}},
                pods.token_volume(),
                *storage.volumes,
                *claims.volumes,
            ],
        },
    }


def _model(resolved: ResolvedServing) -> str:
    return f"{resolved.model_name}={resolved.model_uri}" + (
        f"@{resolved.model_digest}" if resolved.model_digest else ""
    )


def _agent(serving: Serving, storage_mounts: Iterable[Object]) -> Object:
    return {
        "name": AGENT,
        "image": serving.resolved.image,
        "restartPolicy": "Always",
        "command": ["python", "-m", "trimtab_server.agent"],
        "args": [
            f"--desired-config-map={names.serving_desired(serving.name)}",
            f"--reports-config-map={names.serving_reports(serving.name)}",
        ],
        "env": [
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        ],
        "ports": [
            {"name": "http", "containerPort": AGENT_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "readinessProbe": _probe("/healthz/ready", period=2, timeout=2, failures=2),
        "livenessProbe": _probe("/healthz/live", period=10, timeout=5, failures=6),
        "resources": AGENT_RESOURCES,
        "securityContext": pods.container_security(),
        "volumeMounts": [
            {"name": "work", "mountPath": WORK_ROOT},
            {"name": "agent-tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of this container's own
            pods.token_mount(),
            *storage_mounts,
        ],
    }


def _engine(serving: Serving, claim_mounts: Iterable[Object]) -> Object:
    shape = serving.deployment.spec.pod
    return {
        "name": ENGINE,
        "image": serving.resolved.image,
        "command": ["python", "-m", "trimtab_server.engine"],
        "args": _engine_arguments(serving),
        "env": pods.environment(shape),
        # The agent answers for the engine: only "accepts and does not answer" counts as hung.
        "livenessProbe": _probe("/healthz/engine", period=10, timeout=5, failures=6),
        # A sidecar outlives the engine, so the streams must have ended before the engine is told to.
        "lifecycle": {"preStop": {"exec": {"command": ["python", "-m", "trimtab_server.drain"]}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": pods.resources(shape),
        "securityContext": pods.container_security(),
        "volumeMounts": [
            {"name": "work", "mountPath": WORK_ROOT, "readOnly": True},
            {"name": "engine-tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of this container's own
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - memory that the engine's processes share
            *claim_mounts,
        ],
    }


def _engine_arguments(serving: Serving) -> list[str]:
    engine, resolved = serving.deployment.spec.engine, serving.resolved
    length = [] if engine.max_model_length is None else [f"--max-model-len={engine.max_model_length}"]
    return [
        f"--max-lora-rank={resolved.max_lora_rank}",
        f"--max-loras={resolved.max_loras}",
        f"--max-cpu-loras={resolved.max_cpu_loras}",
        f"--dtype={engine.dtype}",
        *length,
        f"--tensor-parallel-size={engine.tensor_parallel}",
        f"--gpu-memory-utilization={engine.gpu_memory_utilization}",
        *engine.extra_args,
    ]


def _probe(path: str, *, period: int, timeout: int, failures: int) -> Object:
    return {
        "httpGet": {"path": path, "port": AGENT_PORT},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }


def _object(serving: Serving, api_version: str, kind: str, name: str) -> Object:
    return {"apiVersion": api_version, "kind": kind, "metadata": pods.metadata(serving.deployment, name)}
