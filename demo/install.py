"""Install the chart the way a platform engineer would, with the images and the storage of this cluster."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo.cluster import ROOT, Cluster, DemoError, connect, lab

RELEASE = "trimtab"
NAMESPACE = "trimtab-system"
SECRET = "trimtab-storage"  # noqa: S105 - the name of a Secret
CHART = ROOT / "helm" / "trimtab"


def images() -> dict[str, str]:
    """Build and push what is not there yet; the three references by name."""
    printed = lab("images", capture=True)
    return dict(line.split("=", 1) for line in printed.split() if "=" in line)


def values(cluster: Cluster, built: dict[str, str]) -> dict[str, Any]:
    """The chart's values for this cluster."""
    return {
        "images": {part: {"reference": built[part]} for part in ("operator", "trainer", "server")},
        "storage": {
            "endpoint": cluster.s3_endpoint,
            "region": "us-east-1",
            "pathStyle": True,
            "credentials": {"secretName": SECRET},
            "output": f"s3://{cluster.bucket}/runs",
        },
    }


def install(cluster: Cluster, built: dict[str, str], changes: Mapping[str, Any] | None = None) -> None:
    """`helm upgrade --install`, waiting until the operator is ready; `changes` replace whole values."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({**values(cluster, built), **(changes or {})}, file)
        file.flush()
        cluster.run(
            "helm", "upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--create-namespace",
            "--values", file.name, "--wait", "--timeout", "180s",
            timeout=200,
        )  # fmt: skip


def remove(cluster: Cluster) -> None:
    """`helm uninstall`; the kinds and the users' resources stay."""
    cluster.run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", timeout=200)


def namespace(cluster: Cluster, name: str) -> None:
    """A namespace that enforces the restricted Pod Security profile, with the storage's keys as a Secret."""
    enforce = "pod-security.kubernetes.io/enforce"
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {enforce: "restricted"}}}
    )
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": SECRET, "namespace": name},
            "stringData": {key: cluster.env[key] for key in keys},
        }
    )


def upload(cluster: Cluster, folder: Path, prefix: str) -> None:
    """Copy a folder's files into the bucket."""
    import boto3
    from botocore.config import Config

    s3 = boto3.client(
        "s3",
        endpoint_url=cluster.s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id=cluster.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cluster.env["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}),
    )
    for file in sorted(folder.iterdir()):
        s3.upload_file(str(file), cluster.bucket, f"{prefix}/{file.name}")


def main() -> int:
    """The command behind `make install` and `make uninstall`."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--remove", action="store_true", help="uninstall")
    wanted = arguments.parse_args()
    try:
        cluster = connect()
        if wanted.remove:
            remove(cluster)
        else:
            install(cluster, images())
    except DemoError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's last word
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
