"""Homes, a PostgreSQL and certificates for the tests of the local stack."""

import datetime
import ipaddress
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from stacks import Command, Postgres, accepts, eventually, exists, free_port, postgres_programs


@pytest.fixture(scope="module")
def module_home() -> Iterator[Path]:
    """With a short path, as a socket's has to be."""
    with tempfile.TemporaryDirectory(prefix="dz-") as folder:
        yield Path(folder) / "home"


@pytest.fixture
def deepzero(home: Path) -> Command:
    return Command(home, {})


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of this machine, in a temporary folder, as an unprivileged user where this is root."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("this machine has no PostgreSQL (initdb and postgres)")
    identity: dict[str, int | str | list[str]] = {}
    if os.getuid() == 0:
        user = next((name for name in ("postgres", "nobody") if exists(name)), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and this machine has no user postgres or nobody")
        entry = pwd.getpwnam(user)
        identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    password, port = "canary-of-the-database-7f3a", free_port()
    with tempfile.TemporaryDirectory(prefix="dz-pg-") as folder:
        data, secret = Path(folder) / "data", Path(folder) / "password"
        secret.write_text(password, encoding="utf-8")
        if identity:
            for path in (Path(folder), secret):
                shutil.chown(path, entry.pw_uid, entry.pw_gid)

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 60, "check": True, **identity}
            environment = {**os.environ, "PGPASSWORD": password, "HOME": folder}
            return subprocess.run([str(programs / command[0]), *command[1:]], env=environment, **options)  # type: ignore[call-overload,no-any-return]

        run("initdb", "-D", str(data), "-U", "deepzero", "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync")
        settings = [
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={folder}",
            "fsync=off",
            "max_connections=60",
        ]
        options = [part for setting in settings for part in ("-c", setting)]
        with (Path(folder) / "log").open("w") as log:
            server = subprocess.Popen(
                [str(programs / "postgres"), "-D", str(data), "-p", str(port), *options],
                cwd=folder,
                stdout=log,
                stderr=log,
                **identity,  # type: ignore[call-overload]
            )
        try:
            eventually(lambda: accepts(port), 30, "PostgreSQL listens")
            yield Postgres(port, password, run)
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def certificates() -> Iterator[dict[str, str]]:
    """DEEPZERO_TLS_…: an authority, and a certificate of it for this machine with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def certificate(
        subject: str, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey, authority: bool
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            builder = builder.add_extension(names, critical=False)
        return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    with tempfile.TemporaryDirectory(prefix="dz-tls-") as folder:
        files = {name: Path(folder) / f"{name.lower()}.pem" for name in ("CA", "CERT", "KEY")}
        files["CA"].write_bytes(certificate("authority", authority, authority, True))
        files["CERT"].write_bytes(certificate("stack", own, authority, False))
        files["KEY"].write_bytes(
            own.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        yield {f"DEEPZERO_TLS_{name}": str(file) for name, file in files.items()}
