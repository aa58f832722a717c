"""No secret is shown, whatever kind of address or message it stands in."""

from __future__ import annotations

import traceback

import pytest
from mlflow.exceptions import MlflowException

from components.redaction import errors_redacted, holds_password, public, redacted
from components.tracking.settings import TrackingSettings

SECRET = "pl4nted-s3cret"

WITH_SECRET = {
    f"http://user:{SECRET}@host:5000/a": "http://host:5000/a",
    f"https://{SECRET}@host/a?x=1": "https://host/a?x=1",
    f"http://us%40er:p%40{SECRET}@host": "http://host",
    f"http://user:p@{SECRET}@host/a": "http://host/a",
    f"http://user:p/{SECRET}@host/a": "http://host/a",
    f"https://host/api?access_token={SECRET}&x=1": "https://host/api?access_token=***&x=1",
    f"postgresql://u:{SECRET}@host/db": "postgresql://host/db",
    f"postgresql+psycopg2://host/db?user=u&password={SECRET}": "postgresql+psycopg2://host/db?user=u&password=***",
    f"postgresql://u@host/db?sslpassword={SECRET}&sslmode=require": "postgresql://host/db?sslpassword=***&sslmode=require",
    f"host=h dbname=d user=u password={SECRET} port=5": "host=h dbname=d user=u password=*** port=5",
    f"host=h password='with {SECRET}' port=5": "host=h password=*** port=5",
    f"mysql+pymysql://u:{SECRET}@host/db?charset=utf8": "mysql+pymysql://host/db?charset=utf8",
    f"mysql://host/db?passwd={SECRET}": "mysql://host/db?passwd=***",
    f"mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3D{SECRET}%3BX%3D1": "mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3D***%3BX%3D1",
    f"DRIVER=x;UID=u;PWD={{a;{SECRET}}};Y=1": "DRIVER=x;UID=u;PWD=***;Y=1",
    f"sqlite:///a.db?password={SECRET}": "sqlite:///a.db?password=***",
    f"http://AKIA1:{SECRET}@127.0.0.1:8333": "http://127.0.0.1:8333",
    f"s3://bucket/a?aws_secret_access_key={SECRET}": "s3://bucket/a?aws_secret_access_key=***",
    f"https://b.s3/k?X-Amz-Signature={SECRET}&X-Amz-Date=1": "https://b.s3/k?X-Amz-Signature=***&X-Amz-Date=1",
    f"{{'password': '{SECRET}', 'user': 'u'}}": "{'password': ***, 'user': 'u'}",
    f"Authorization: Bearer {SECRET}": "Authorization: Bearer ***",
}  # fmt: skip
ORDINARY = (
    "http://host:5000/a@b", "s3://bucket/a@b", "s3://bucket/key=1/x", "sqlite:////data/mlflow.db", "postgresql://host:5432/db",
    "tokens=100, d_sae=64", "user@example.org asked http://host/", "file:///a@b/c", "http://[::1]:5000/a@b",
)  # fmt: skip


@pytest.mark.parametrize("text", WITH_SECRET)
def test_the_secret_is_taken_out_and_the_rest_is_left(text: str):
    assert redacted(text) == WITH_SECRET[text]
    assert redacted(f"cannot open {text} now") == f"cannot open {WITH_SECRET[text]} now"
    assert public({"a": [text, 1, None]}) == {"a": [WITH_SECRET[text], 1, None]}


@pytest.mark.parametrize("text", ORDINARY)
def test_what_holds_no_secret_is_left_as_it_is(text: str):
    assert redacted(text) == text


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PREFECT_API_AUTH_STRING"])
def test_values_of_secret_variables_are_taken_out_however_they_are_written(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "a b/c+d")
    assert redacted("said a b/c+d, a%20b%2Fc%2Bd and a+b%2Fc%2Bd") == "said ***, *** and ***"


def test_the_password_of_an_address_in_the_environment_is_taken_out_where_it_stands_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:p%40ssword@h/db")
    assert redacted("the password p@ssword was refused") == "the password *** was refused"


@pytest.mark.parametrize("uri", [text for text in WITH_SECRET if "://" in text and not text.startswith("s3")])
def test_a_configured_tracking_address_with_a_secret_is_refused_without_showing_it(uri: str):
    assert holds_password(uri)
    with pytest.raises(ValueError, match=r"tracking\.uri holds a password") as refused:
        TrackingSettings(uri=uri)
    assert SECRET not in refused.value.errors()[0]["msg"]


@pytest.mark.parametrize("uri", ["postgresql://mlflow@host/db", "https://host/mlflow", "sqlite:////data/a@b.db"])
def test_a_configured_tracking_address_without_a_secret_is_taken(uri: str):
    assert TrackingSettings(uri=uri).uri == uri


def test_an_error_and_what_caused_it_lose_the_secret_and_keep_their_type():
    with pytest.raises(MlflowException) as raised, errors_redacted():
        try:
            raise OSError(f"no route to http://user:{SECRET}@host/")
        except OSError as cause:
            raise MlflowException(f"API request to http://user:{SECRET}@host/ failed") from cause
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    assert raised.value.message == "API request to http://host/ failed"
