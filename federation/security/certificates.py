"""Create and check certificates for TLS, and keys for the clients that may join."""

import hashlib
import ipaddress
import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from federation.app.run_folder import write_atomically

PRIVATE = serialization.PrivateFormat
LOCAL = ("localhost", "127.0.0.1", "::1")  # names in every server's certificate
DAYS = 365


# -------------------------------------------------------------------------------------------------------- creating


def make_authority(folder: Path, days: int = DAYS) -> None:
    """Create `ca.crt`, which is self-signed, and `ca.key`."""
    key, name = ec.generate_private_key(ec.SECP384R1()), _name("development certificate authority")
    certificate = (
        _certificate(name, key.public_key(), name, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_key(folder / "ca.key", key, PRIVATE.PKCS8)
    _write(folder / "clients" / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))
    _write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_server(folder: Path, names: list[str], days: int = DAYS) -> None:
    """Create `server.crt`, signed by the authority, and `server.key`, for a server with any of `names`."""
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    authority_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _certificate(_name(names[0]), key.public_key(), authority.subject, days)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    _write_key(folder / "server.key", key, PRIVATE.PKCS8)
    _write(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_client(folder: Path, name: str) -> None:
    """Create `NAME/client.key`, and its public key `clients/NAME.pub`, in OpenSSH's format, which Flower requires."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder / name / "ca.crt", (folder / "clients" / "ca.crt").read_bytes())
    _write(folder / "clients" / f"{name}.pub", public + f" {name}\n".encode())
    _write_key(folder / name / "client.key", key, PRIVATE.OpenSSH)  # last: a client with a key is complete


def _certificate(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))  # the clocks of machines differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    never = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        encipher_only=False, decipher_only=False, **never,
    )  # fmt: skip


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    def write(unfinished: Path) -> None:
        unfinished.touch(mode, exist_ok=False)  # before it contains a secret
        unfinished.write_bytes(content)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: PRIVATE) -> None:
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    _write(path, content, 0o600)


def make_missing(folder: Path, servers: list[str], clients: list[str], days: int = DAYS) -> Iterator[str]:
    """Create the missing files in `folder`; yield a line on how to use them for each server and client.

    Raises ValueError if a client's name or `days` is invalid, or if there is no certificate authority.
    """
    _check_possible(folder, servers, clients, days)
    if servers:
        if not (folder / "ca.crt").exists():
            make_authority(folder, days)
        make_server(folder, list(dict.fromkeys([*servers, *LOCAL])), days)
        yield f"server: --tls {folder}, until {expiry(folder / 'server.crt'):%Y-%m-%d}"
    for name in clients:
        if not (folder / name / "client.key").exists():
            make_client(folder, name)
        yield f"client: --tls {folder / name}, on its machine; to remove it: rm {folder / 'clients' / name}.pub"


def _check_possible(folder: Path, servers: list[str], clients: list[str], days: int) -> None:
    for name in clients:
        if not re.fullmatch(r"\w[\w.-]*", name) or name == "clients":
            raise ValueError(f"--client {name!r} is not a valid client name: use letters, digits, - and _")
    if days < 1:
        raise ValueError(f"--days {days}: 1 or more is needed")
    missing = [path for path in (folder / "ca.crt", folder / "ca.key") if not path.exists()]
    if servers and len(missing) == 1:
        raise ValueError(f"{missing[0]} is missing, but a server's certificate is signed with both ca.crt and ca.key")
    if not servers and not (folder / "clients" / "ca.crt").exists():
        raise ValueError(f"{folder} has no certificate authority yet: add --server HOST to create it")


# --------------------------------------------------------------------------------------------------------- checking


def server_folder(text: str) -> Path:
    """Return the folder given by the server's --tls. Raises ValueError if a server cannot use it."""
    folder = Path(text).expanduser().absolute()
    _check_authority(folder)
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            folder / "server.crt", folder / "server.key", password=""
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no server.crt with a matching server.key: {error}") from None
    if expiry(folder / "server.crt") < datetime.now(UTC):
        raise ValueError(f"{folder}/server.crt expired on {expiry(folder / 'server.crt'):%Y-%m-%d}")
    return folder


def client_folder(text: str) -> Path:
    """Return the folder given by a client's --tls. Raises ValueError if a client cannot use it."""
    folder = Path(text).expanduser().absolute()
    _check_authority(folder)
    if path := client_key(folder):
        try:
            key = serialization.load_ssh_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
            raise ValueError(f"{path} is not a private key in OpenSSH's format: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{path} is not an ECDSA key; create one with: ssh-keygen -t ecdsa -b 384")
    return folder


def _check_authority(folder: Path) -> None:
    try:
        ssl.create_default_context(cafile=folder / "ca.crt")
    except OSError as error:
        raise ValueError(f"{folder}/ca.crt is not the certificate of an authority: {error}") from None


def client_key(folder: Path | None) -> Path | None:
    """Return the key in the folder given by a client's --tls, if there is one."""
    return folder / "client.key" if folder and (folder / "client.key").exists() else None


def fingerprint(key: Path) -> str:
    """Return a digest of the public key, which identifies a private key without revealing it."""
    private = serialization.load_ssh_private_key(key.read_bytes(), None)
    raw = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return hashlib.sha256(raw).hexdigest()[:16]


def expiry(certificate: Path) -> datetime:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
