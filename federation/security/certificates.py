"""Certificates and keys, for TLS and so that only known clients join: making them, and checking what --tls names."""

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
LOCAL = ("localhost", "127.0.0.1", "::1")  # every server certificate is good for clients on the server's machine
DAYS = 365


# ---------------------------------------------------------------------------------------------------------- making


def make_authority(folder: Path, days: int = DAYS) -> None:
    """Make `ca.crt` and `ca.key`, self-signed."""
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
    """Make `server.crt` and `server.key`, for a server that is reached by any of `names`, signed by the authority."""
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
    """Make `NAME/client.key`, and register its public key as `clients/NAME.pub`. Flower wants OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder / name / "ca.crt", (folder / "clients" / "ca.crt").read_bytes())
    _write(folder / "clients" / f"{name}.pub", public + f" {name}\n".encode())
    _write_key(folder / name / "client.key", key, PRIVATE.OpenSSH)  # last: with it, the client counts as made


def _certificate(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))  # clocks differ
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
        unfinished.touch(mode, exist_ok=False)  # before anything is in it that others must not read
        unfinished.write_bytes(content)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: PRIVATE) -> None:
    content = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    _write(path, content, 0o600)


def make_missing(folder: Path, servers: list[str], clients: list[str], days: int = DAYS) -> Iterator[str]:
    """Make what is missing in `folder`; yield, for each server and client, what its folder is for.

    Raises ValueError where a client's name or `days` cannot be, or an authority is needed that is not there.
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
        yield f"client: --tls {folder / name}, on that machine; to remove it: rm {folder / 'clients' / name}.pub"


def _check_possible(folder: Path, servers: list[str], clients: list[str], days: int) -> None:
    for name in clients:
        if not re.fullmatch(r"\w[\w.-]*", name) or name == "clients":
            raise ValueError(f"--client {name!r} is not a valid client name: use letters, digits, - and _")
    if days < 1:
        raise ValueError(f"--days {days}: 1 or more is needed")
    missing = [path for path in (folder / "ca.crt", folder / "ca.key") if not path.exists()]
    if servers and len(missing) == 1:
        raise ValueError(f"a server's certificate is signed with ca.crt and ca.key, and {missing[0]} is not there")
    if not servers and not (folder / "clients" / "ca.crt").exists():
        raise ValueError(f"there is no certificate authority in {folder} yet: give --server HOST, too")


# --------------------------------------------------------------------------------------------------------- checking


def server_folder(text: str) -> Path:
    """Return the folder that the server's --tls names. Raises ValueError where it could not serve with it."""
    folder = Path(text).expanduser().absolute()
    _check_authority(folder)
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            folder / "server.crt", folder / "server.key", password=""
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no server.crt with its server.key: {error}") from None
    if expiry(folder / "server.crt") < datetime.now(UTC):
        raise ValueError(f"{folder}/server.crt expired on {expiry(folder / 'server.crt'):%Y-%m-%d}")
    return folder


def client_folder(text: str) -> Path:
    """Return the folder that a client's --tls names. Raises ValueError where nobody could join with it."""
    folder = Path(text).expanduser().absolute()
    _check_authority(folder)
    if path := client_key(folder):
        try:
            key = serialization.load_ssh_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
            raise ValueError(f"{path} is not a private key in OpenSSH's format: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{path} is of another kind: make one by ssh-keygen -t ecdsa -b 384")
    return folder


def _check_authority(folder: Path) -> None:
    try:
        ssl.create_default_context(cafile=folder / "ca.crt")
    except OSError as error:
        raise ValueError(f"{folder}/ca.crt is not the certificate of an authority: {error}") from None


def client_key(folder: Path | None) -> Path | None:
    """Return the key in the folder that a client's --tls names, if it has one."""
    return folder / "client.key" if folder and (folder / "client.key").exists() else None


def fingerprint(key: Path) -> str:
    """Return what tells this key from others, and says nothing about it."""
    private = serialization.load_ssh_private_key(key.read_bytes(), None)
    raw = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return hashlib.sha256(raw).hexdigest()[:16]


def expiry(certificate: Path) -> datetime:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
