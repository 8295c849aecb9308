"""Certificates of one cluster: a certificate authority made anew for each, and what it signs. By openssl."""

from dataclasses import dataclass
from pathlib import Path

from lab.run import run

_DAYS = "365"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """A certificate authority whose files stand in a folder."""

    folder: Path

    @property
    def certificate(self) -> Path:
        """The certificate that everybody trusts."""
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        """The key that signs."""
        return self.folder / "ca.key"

    def create(self) -> None:
        """Make it, unless it is there."""
        if self.certificate.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _key(self.key)
        _key(self.token_key)
        partial = self.certificate.with_suffix(".partial")
        run(
            ["openssl", "req", "-x509", "-new", "-key", self.key, "-out", partial, "-days", _DAYS,
             "-subj", "/CN=trimtab-lab", "-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"]
        )  # fmt: skip
        partial.rename(self.certificate)

    def issue(self, name: str, subject: str, names: str = "") -> Pair:
        """Return a certificate and key, made unless they are there.

        Args:
            name: Stem of the files.
            subject: Such as `/O=system:masters/CN=admin`: the group and the user that the API server sees.
            names: For servers, such as `IP:127.0.0.1,DNS:localhost`.
        """
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        if pair.certificate.exists():
            return pair
        _key(pair.key)
        request = run(["openssl", "req", "-new", "-key", pair.key, "-subj", subject]).stdout
        extensions = self.folder / f"{name}.ext"
        usage = "serverAuth,clientAuth" if names else "clientAuth"
        extensions.write_text(f"extendedKeyUsage={usage}\n" + (f"subjectAltName={names}\n" if names else ""))
        partial = pair.certificate.with_suffix(".partial")
        run(
            ["openssl", "x509", "-req", "-CA", self.certificate, "-CAkey", self.key, "-CAcreateserial",
             "-days", _DAYS, "-extfile", extensions, "-out", partial],
            stdin=request,
        )  # fmt: skip
        partial.rename(pair.certificate)
        return pair

    @property
    def token_key(self) -> Path:
        """The key that signs ServiceAccount tokens."""
        return self.folder / "service-accounts.key"


def _key(path: Path) -> None:
    partial = path.with_suffix(".partial")
    run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", partial])
    partial.chmod(0o600)
    partial.rename(path)
