"""python -m federation.certificates: what it makes, what it leaves as it is, and what it refuses."""

import ipaddress
import os
import shutil
import signal
import ssl
import stat
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from federation.certificates import certificates as command
from federation.launch.command_line import run_script
from federation.security import certificates

Failed = Callable[..., tuple[int, str]]
ALL = {
    "ca.crt", "ca.key", "server.crt", "server.key", "clients/ca.crt", "clients/berlin.pub", "clients/paris.pub",
    "berlin/ca.crt", "berlin/client.key", "paris/ca.crt", "paris/client.key",
}  # fmt: skip
NAMES = ["server.example", "10.0.0.1", "2001:db8::1"]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs the command in this process, where it must succeed."""

    def make(*line: object) -> int:
        monkeypatch.setattr("sys.argv", ["certificates.py", *map(str, line)])
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            run_script(command)
        signal.signal(signal.SIGTERM, handler)
        assert end.value.code == 0
        return 0

    return make


@pytest.fixture
def keys(make: Callable[..., int], tmp_path: Path) -> Path:
    make(tmp_path / "keys", "--server", *NAMES, "--client", "berlin", "paris")
    return tmp_path / "keys"


@pytest.fixture
def refused(failed: Failed) -> Callable[..., str]:
    """Return a function that runs the command, which must end with status 2, and returns the one line that it says."""

    def refused(*line: object) -> str:
        status, errors = failed(lambda: run_script(command), "certificates.py", *map(str, line))
        assert (status, errors.count("\n")) == (2, 1), errors
        assert errors.startswith("certificates.py: error: ")
        return errors

    return refused


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def loaded(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


# ---------------------------------------------------------------------------------------------------- what is made


def test_all_that_is_said_is_made(make: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    make(keys, "--server", *NAMES, "--client", "berlin", "paris")
    made = files(keys)
    assert made.keys() == ALL
    authority = made["ca.crt"]
    assert {content for name, content in made.items() if name.endswith("ca.crt")} == {authority}
    assert capsys.readouterr().out.splitlines() == [
        f"server: --tls {keys}, until {loaded(keys / 'server.crt').not_valid_after_utc:%Y-%m-%d}",
        f"client: --tls {keys}/berlin, on its machine; to remove it: rm {keys}/clients/berlin.pub",
        f"client: --tls {keys}/paris, on its machine; to remove it: rm {keys}/clients/paris.pub",
    ]


def test_each_certificate_goes_with_its_key_and_the_authority_has_signed(keys: Path) -> None:
    authority, server = loaded(keys / "ca.crt"), loaded(keys / "server.crt")
    for name, certificate in (("ca.key", authority), ("server.key", server)):
        assert load_pem_private_key((keys / name).read_bytes(), None).public_key() == certificate.public_key()
    authority.verify_directly_issued_by(authority)
    server.verify_directly_issued_by(authority)
    assert authority.public_key() != server.public_key()
    assert len({authority.serial_number, server.serial_number}) == 2


def test_a_servers_names_are_in_its_certificate_and_localhost_always_is(keys: Path) -> None:
    names = loaded(keys / "server.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example", "localhost"]
    addresses = ["10.0.0.1", "2001:db8::1", "127.0.0.1", "::1"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(text) for text in addresses]


def test_certificates_last_as_long_as_they_should_from_before_now_as_clocks_differ(
    make: Callable[..., int], tmp_path: Path
) -> None:
    make(tmp_path, "--server", "server.example", "--days", "30")
    now = datetime.now(UTC)
    for certificate in (loaded(tmp_path / "ca.crt"), loaded(tmp_path / "server.crt")):
        assert abs(certificate.not_valid_after_utc - now - timedelta(days=30)) < timedelta(minutes=5)
        assert certificate.not_valid_before_utc < now - timedelta(days=1)


def shake_hands(keys: Path, ca: Path, name: str) -> str | None:
    """Let a server and a strict client shake hands, without a network; return the reason if the client refuses."""
    for_server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    for_server.load_cert_chain(keys / "server.crt", keys / "server.key")
    for_client = ssl.create_default_context(cafile=ca)
    for_client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = for_client.wrap_bio(down, up, server_hostname=name)
    server = for_server.wrap_bio(up, down, server_side=True)
    for end in (client, server, client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
    assert client.version() == server.version() == "TLSv1.3"
    return None


@pytest.mark.parametrize("name", [*NAMES, "localhost", "127.0.0.1", "::1"])
def test_a_strict_client_trusts_a_server_by_each_of_its_names(keys: Path, name: str) -> None:
    assert shake_hands(keys, keys / "berlin" / "ca.crt", name) is None


@pytest.mark.parametrize("name", ["server.example.org", "example", "10.0.0.2", "2001:db8::2", "127.0.0.2"])
def test_a_client_trusts_a_server_by_no_other_name(keys: Path, name: str) -> None:
    assert "mismatch" in (shake_hands(keys, keys / "ca.crt", name) or "")


def test_a_client_of_another_authority_does_not_trust_a_server(keys: Path, tmp_path: Path) -> None:
    certificates.make_authority(tmp_path / "other")
    assert shake_hands(keys, tmp_path / "other" / "ca.crt", "localhost") == "unable to get local issuer certificate"


def test_a_servers_certificate_makes_no_others(keys: Path) -> None:
    for name, signs in (("ca.crt", True), ("server.crt", False)):
        extensions = loaded(keys / name).extensions
        assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is signs
        assert extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is signs


# ---------------------------------------------------------------------------------------------------- private keys


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set what is denied to the files that are made."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_private_key_is_its_owners_alone_from_its_first_byte_on(
    umask: int, make: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, int] = {}
    write_bytes = Path.write_bytes

    def spy(path: Path, content: bytes) -> int:
        if b"PRIVATE KEY" in content:
            assert path.stat().st_size == 0
            written[str(path)] = stat.S_IMODE(path.stat().st_mode)
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", spy)
    make(tmp_path, "--server", "localhost", "--client", "berlin")
    assert list(written.values()) == [0o600] * 3, "the authority's, the server's and the client's"
    modes = {path: stat.S_IMODE((tmp_path / path).stat().st_mode) for path in files(tmp_path)}
    private = {path for path, content in files(tmp_path).items() if b"PRIVATE KEY" in content}
    assert private == {"ca.key", "server.key", "berlin/client.key"}
    assert {modes.pop(path) for path in private} == {0o600}
    assert set(modes.values()) == {0o644 & ~umask}


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is to read the keys")
def test_a_clients_key_is_one_that_openssh_reads(keys: Path) -> None:
    for name in ("berlin", "paris"):
        command = ["ssh-keygen", "-y", "-f", str(keys / name / "client.key")]
        public = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registered = (keys / "clients" / f"{name}.pub").read_text()
        assert registered.split() == [*public.split()[:2], name]
        assert registered.split()[0] == "ecdsa-sha2-nistp384", "the kind that Flower takes"


def test_a_fingerprint_is_stable_and_tells_keys_apart(keys: Path, tmp_path: Path) -> None:
    berlin, paris = (certificates.fingerprint(keys / name / "client.key") for name in ("berlin", "paris"))
    copy = shutil.copy(keys / "berlin" / "client.key", tmp_path / "elsewhere.key")
    assert berlin == certificates.fingerprint(copy) != paris
    assert {len(berlin), len(paris)} == {16} and int(berlin, 16) >= 0


# ------------------------------------------------------------------------------------------------------ another time


def test_another_call_renews_the_servers_certificate_and_nothing_else(make: Callable[..., int], keys: Path) -> None:
    before = files(keys)
    make(keys, "--server", "new.example", "--client", "berlin", "paris")
    after = files(keys)
    assert {name for name in ALL if before[name] != after[name]} == {"server.crt", "server.key"}
    assert after.keys() == before.keys()
    assert shake_hands(keys, keys / "berlin" / "ca.crt", "new.example") is None, "who has the authority trusts it"
    assert "mismatch" in (shake_hands(keys, keys / "ca.crt", "server.example") or "")


def test_a_client_is_added_later_without_the_authoritys_key(make: Callable[..., int], keys: Path) -> None:
    (keys / "ca.key").unlink()
    before = files(keys)
    make(keys, "--client", "berlin", "rome")
    after = files(keys)
    assert after.keys() - before.keys() == {"clients/rome.pub", "rome/ca.crt", "rome/client.key"}
    assert before.items() <= after.items()


def test_a_client_that_was_removed_is_not_let_in_again_by_another_call(make: Callable[..., int], keys: Path) -> None:
    (keys / "clients" / "berlin.pub").unlink()
    make(keys, "--server", "localhost", "--client", "berlin")
    assert not (keys / "clients" / "berlin.pub").exists()


def test_a_client_whose_making_was_cut_short_is_made_by_the_next_call(
    make: Callable[..., int], keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = certificates._write, 0

    def full(path: Path, *content: object) -> None:
        nonlocal written
        written += 1
        if written > allowed:
            raise OSError("no space left")
        write(path, *content)  # type: ignore[arg-type]

    for allowed in range(3):
        written = 0
        with monkeypatch.context() as disk:
            disk.setattr(certificates, "_write", full)
            with pytest.raises(OSError, match="no space left"):
                list(certificates.make_missing(keys, [], [f"rome{allowed}"]))
        make(keys, "--client", f"rome{allowed}")
        key = load_ssh_private_key((keys / f"rome{allowed}" / "client.key").read_bytes(), None)
        registered = (keys / "clients" / f"rome{allowed}.pub").read_bytes()
        encoding, form = Encoding.OpenSSH, PublicFormat.OpenSSH
        assert registered == key.public_key().public_bytes(encoding, form) + f" rome{allowed}\n".encode()


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["ca.key", "ca.crt"])
def test_an_authority_of_which_a_part_is_elsewhere_is_not_replaced(
    refused: Callable[..., str], keys: Path, name: str
) -> None:
    (keys / name).unlink()
    before = files(keys)
    assert f"{keys / name} is missing" in refused(keys, "--server", "localhost")
    assert files(keys) == before


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "no folder"])
def test_a_client_without_an_authority_is_refused(refused: Callable[..., str], tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "keys"
    if there:
        folder.mkdir()
    assert "add --server HOST" in refused(folder, "--client", "berlin")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("name", ["../x", "clients", "", "-x", ".", "..", ".x", "a/b", "/x", "a b", "a\n", "x\0"])
@pytest.mark.parametrize("joined", [False, True], ids=["--client NAME", "--client=NAME"])
def test_what_is_no_name_for_a_client_is_refused(
    refused: Callable[..., str], tmp_path: Path, name: str, joined: bool
) -> None:
    line = [f"--client={name}"] if joined else ["--client", name]
    assert "--client" in refused(tmp_path / "keys", "--server", "localhost", *line)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("days", ["0", "-1", "many"])
def test_a_certificate_that_never_was_good_is_refused(refused: Callable[..., str], tmp_path: Path, days: str) -> None:
    assert "--days" in refused(tmp_path / "keys", "--server", "localhost", f"--days={days}")
    assert files(tmp_path) == {}


def test_a_folder_must_be_named(refused: Callable[..., str]) -> None:
    assert "FOLDER" in refused("--server", "localhost")
