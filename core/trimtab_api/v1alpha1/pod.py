"""The narrow part of a pod that a user may shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from trimtab_api.schema import LIST_ATOMIC, Model, Rule, list_map, rules
from trimtab_api.v1alpha1.source import ObjectName

Quantity = Annotated[
    int | str,
    Field(
        json_schema_extra={
            "x-kubernetes-int-or-string": True,
            "pattern": r"^([0-9]+|[0-9]*\.[0-9]+)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
            "maxLength": 32,
            "minimum": 0,
        }
    ),
]
"""An amount as Kubernetes writes it: 2, 500m, 16Gi."""

CODE_LOADING = (
    "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONINSPECT", "PYTHONBREAKPOINT",
    "PYTHONWARNINGS", "PYTHONEXECUTABLE", "PYTHONPLATLIBDIR", "PYTHONPYCACHEPREFIX", "PATH", "BASH_ENV", "ENV",
    "GCONV_PATH", "OPENSSL_CONF", "OPENSSL_ENGINES", "OPENSSL_MODULES", "AWS_CONFIG_FILE", "VLLM_PLUGINS",
)  # fmt: skip
"""Names of environment variables that make a program load other code, beside all that begin with LD_; `pod.env` may
not set them."""

GANG = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Names that the training operator and torchrun set, beside all that begin with PET_."""

TAKEN_PATHS = (
    "/bin", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/run", "/sbin", "/sys", "/tmp", "/usr", "/var",  # noqa: S108
    "/work",
)  # fmt: skip
"""Folders of the image, and Trimtab's own mounts; no claim may lie on or below them."""


class ResourceAmounts(Model):
    """What a container asks for and may take."""

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(default_factory=dict)
    """Amounts kept free for the container, by resource name."""
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(default_factory=dict)
    """Amounts it may not exceed, by resource name, for example nvidia.com/gpu: 1."""


class Toleration(Model):
    """A taint that the pod accepts."""

    key: Annotated[str | None, Field(max_length=316)] = None
    """Key of the taint; empty with operator Exists accepts every key."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Whether the value is compared."""
    value: Annotated[str | None, Field(max_length=63)] = None
    """Value to compare."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect to accept; all when left out."""
    toleration_seconds: Annotated[int | None, Field(ge=0, le=31_536_000)] = None
    """How long a NoExecute taint is borne, in seconds."""


class EnvVar(Model):
    """A literal environment variable."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            max_length=128,
            pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
            json_schema_extra=rules(
                Rule(
                    f"!(self in {sorted(CODE_LOADING)!r}) && !self.startsWith('LD_')",
                    "may not be set: it makes the program load other code; build an image of your own instead",
                ),
                Rule(
                    f"!(self in {sorted(GANG)!r}) && !self.startsWith('PET_')",
                    "may not be set: it follows from spec.distributed",
                ),
            ),
        ),
    ]
    """Name of the variable. Names that load code (PYTHONPATH, LD_PRELOAD, ...) are refused."""
    value: Annotated[str, Field(max_length=4096)] = ""
    """Literal value; references to Secrets are not possible here."""


class ClaimMount(Model):
    """A PersistentVolumeClaim mounted into the pod."""

    claim_name: ObjectName
    """The claim, in the namespace of the resource."""
    mount_path: Annotated[
        str,
        Field(
            min_length=2,
            max_length=512,
            json_schema_extra=rules(
                Rule(
                    "self.matches('^(/[A-Za-z0-9._-]+)+/?$') && !self.split('/').exists(part, part == '..') && "
                    f"!{sorted(TAKEN_PATHS)!r}.exists(taken, self == taken || self.startsWith(taken + '/'))",
                    "must be an absolute path of letters, digits, '.', '_' and '-', such as /mnt/data, outside "
                    + ", ".join(sorted(TAKEN_PATHS)),
                )
            ),
        ),
    ]
    """Absolute path of the mount."""
    read_only: bool = True
    """Mount without the right to write."""


class Pod(Model):
    """How the pods run: resources, placement, environment. Everything else of a pod is Trimtab's."""

    resources: ResourceAmounts = Field(default_factory=ResourceAmounts)
    """Resources of the main container."""
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)] = Field(
        default_factory=dict
    )
    """Labels that a node must carry."""
    tolerations: Annotated[list[Toleration], Field(max_length=16, json_schema_extra=LIST_ATOMIC)] = Field(
        default_factory=list
    )
    """Taints that the pods accept."""
    affinity: Annotated[
        dict[str, Any] | None, Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
    ] = None
    """A Kubernetes Affinity, checked when the pods are made."""
    env: Annotated[list[EnvVar], Field(max_length=64, json_schema_extra=list_map("name"))] = Field(default_factory=list)
    """Literal environment variables of the main container."""
    service_account_name: ObjectName | None = None
    """ServiceAccount of the pods; by default one is made that may do nothing but report progress."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass of the pods."""
    volumes: Annotated[list[ClaimMount], Field(max_length=16, json_schema_extra=list_map("mountPath"))] = Field(
        default_factory=list
    )
    """PersistentVolumeClaims to mount."""
