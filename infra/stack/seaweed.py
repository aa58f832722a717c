"""SeaweedFS as the stack's S3 server, of which nothing but the S3 port answers anybody else.

S3 keys guard the S3 port alone. Behind it stand a master, a volume server and a filer, whose ports on loopback would take
reads, uploads and deletions from every user of the machine, and of pages in their browsers. They speak TLS only, and only
with who shows the certificate that the stack made for itself."""

from __future__ import annotations

import datetime
import ipaddress
import json
import sys
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from infra.stack.settings import BUCKETS, Ports, Secrets, Stack, write_private

_PARTS = ("master", "volume", "filer", "s3", "client")


def prepare(folder: Path, secrets: Secrets) -> None:
    """Who may do what on the S3 port, and the certificate that its parts know each other by; a certificate stays."""
    credentials = [{"accessKey": secrets.s3_access, "secretKey": secrets.s3_secret}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = {"identities": [{"name": "sae", "credentials": credentials, "actions": actions}]}
    write_private(folder / "s3.json", json.dumps(identities))
    (folder / "s3").mkdir(exist_ok=True)
    tls = folder / "s3-tls"
    tls.mkdir(exist_ok=True)
    if not (tls / "certificate.pem").exists():
        key, certificate = certify()
        write_private(tls / "key.pem", key)
        write_private(tls / "certificate.pem", certificate)
    pair = f'cert = "{tls}/certificate.pem"\nkey = "{tls}/key.pem"\n'
    ca = f'ca = "{tls}/certificate.pem"\n'
    # Pages of no origin may ask for anything; an empty value would mean all.
    sections = ['[cors.allowed_origins]\nvalues = "none"\n', f"[grpc]\n{ca}", f"[https.client]\nenabled = true\n{pair}{ca}"]
    sections += [f"[grpc.{part}]\n{pair}" for part in _PARTS]
    sections += [f"[https.{part}]\n{pair}{ca}" for part in ("master", "volume", "filer")]
    write_private(tls / "security.toml", "\n".join(sections))


def certify() -> tuple[str, str]:
    """A private key and a certificate for 127.0.0.1, signed by itself, as PEM: nobody else can make one that it accepts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sae-foundry")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=36_500))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.decode(), certificate.public_bytes(serialization.Encoding.PEM).decode()


def command(folder: Path, ports: Ports) -> list[str]:
    """What serves the data in `folder/s3` on loopback."""
    data = folder / "s3"
    return [
        str(Path(sys.executable).parent / "weed"), "-logtostderr", f"-config_dir={folder / 's3-tls'}", "server",
        f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.port={ports.s3}",
        f"-s3.config={folder / 's3.json'}", f"-master.port={ports.s3_master}", f"-volume.port={ports.s3_volume}",
        f"-filer.port={ports.s3_filer}", f"-filer.localSocket={data / 'filer.sock'}", "-master.telemetry=false",
        "-volume.max=0", "-master.volumeSizeLimitMB=1024", "-volume.preStopSeconds=1", "-s3.cacheCapacityMB=64",
        "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-disableHttp", "-filer.disableHttp",  # S3 does without
        "-s3.allowedOrigins=none", "-filer.allowedOrigins=none",
        "-s3.autoCreateBucket=false",  # a misspelled bucket is an error, as at AWS
    ]  # fmt: skip


def buckets_are_there(stack: Stack) -> bool:
    """Whether the server works; the buckets are made where they are not there."""
    client = boto3.client(
        "s3", endpoint_url=stack.s3_url, region_name="us-east-1", aws_access_key_id=stack.secrets.s3_access,
        aws_secret_access_key=stack.secrets.s3_secret,
        config=Config(connect_timeout=3, read_timeout=10, retries={"max_attempts": 0}),
    )  # fmt: skip
    try:
        present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for name in set(BUCKETS) - present:
            client.create_bucket(Bucket=name)
    except (BotoCoreError, ClientError):
        return False
    return True
