"""The settings: where they are read from, and what is said when one is wrong."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from helpers import ROOT, SETTING_NAMES
from psycopg.conninfo import conninfo_to_dict
from schemas import fetch

import incidents
from incidents import get_settings, make_asyncpg_url, normalize_database_url

MODULE_FOLDER = incidents.HERE  # The fixture `folder` puts another one in its place.


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the empty folder in which `.env` is looked for. The environment has no setting."""
    for name in [name for name in os.environ if name.upper() in SETTING_NAMES]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(incidents, "HERE", tmp_path)
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()


def read_error() -> str:
    """Read the settings, of which some are wrong, and give what is said about them."""
    with pytest.raises(ValueError) as error:
        get_settings()
    return str(error.value)


# ── Where they come from ──────────────────────────────────────────────────────────────────────────


def test_without_settings_the_service_is_local_and_has_a_database_of_its_own() -> None:
    assert get_settings().model_dump() == {
        "database_url": None,
        "data_dir": Path(".data"),
        "api_host": "127.0.0.1",
        "api_port": 8000,
        "debug": False,
        "access_log": False,
        "api_tokens": [],
        "cors_origins": [],
        "db_pool_size": 10,
    }


TOKEN = "s3cr3t-of-16-chr"  # as short as it may be
THREE_TOKENS = [
    ("a", TOKEN.encode(), None),
    ("b-1@x.org", f"{TOKEN}x".encode(), "read"),
    ("c_", f"{TOKEN}y".encode(), "report"),
]


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("DATABASE_URL", "\t postgresql://db/incidents \r\n", "postgresql://db/incidents"),
        ("DATABASE_URL", '"postgresql://db/incidents"', "postgresql://db/incidents"),
        ("DATA_DIR", "~/incidents data", Path("/home/alice/incidents data")),
        ("API_HOST", "[::1]", "::1"),
        ("API_HOST", "0.0.0.0\n", "0.0.0.0"),
        ("API_PORT", "65535\n", 65535),
        ("DEBUG", "true", True),
        ("ACCESS_LOG", "1", True),
        ("API_TOKENS", f" a:{TOKEN} , b-1@x.org:{TOKEN}x:read,c_:{TOKEN}y:report,", THREE_TOKENS),
        ("DB_POOL_SIZE", "1", 1),
        # Origins are as a browser sends them.
        ("CORS_ORIGINS", " HTTPS://A.Org/ ,https://b.org", ["https://a.org", "https://b.org"]),
        ("CORS_ORIGINS", "https://ops.example.com:80", ["https://ops.example.com:80"]),
        ("CORS_ORIGINS", "http://127.0.0.1:443", ["http://127.0.0.1:443"]),
        ("CORS_ORIGINS", "http://[::1]:3000", ["http://[::1]:3000"]),
    ],
)
def test_a_setting_is_read_from_the_environment_as_people_and_tools_write_it(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str, read: Any
) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv(name, given)

    assert getattr(get_settings(), name.lower()) == read


@pytest.mark.parametrize(
    ("text", "value", "port"),
    [
        ("API_PORT=9001", "9002", 9002),
        ("\ufeffAPI_PORT=9001\r\nAPI_HOST=::1\r\n\r\n# the end\r\n", "", 9001),
        # Kubernetes sets this beside a Service that is named `api`.
        ("API_PORT=9001", "tcp://10.96.0.12:8000", 9001),
    ],
)
def test_the_environment_comes_before_the_env_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: str, port: int
) -> None:
    (folder / ".env").write_bytes(text.encode())
    monkeypatch.setenv("API_PORT", value)

    assert get_settings().api_port == port


def test_the_env_file_is_the_one_beside_the_module_and_not_one_of_the_current_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".env").write_text("DATA_DIR=данные\n", "utf-8")
    monkeypatch.chdir(tmp_path_factory.mktemp("current"))
    Path(".env").write_text("DATA_DIR=other\nDB_POOL_SIZE=2\n")
    settings = get_settings()

    assert MODULE_FOLDER == ROOT
    assert (settings.data_dir, settings.db_pool_size) == (Path("данные"), 10)


# ── Wrong settings ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("API_PORT=9001\r\nAPI_TOKENS alice:0123456789abcdef\r\nDEBUG=1\r\n", 2),
        ('# ours\nGREETING="two\nlines"\n\nAPI_TOKENS: alice:0123456789abcdef\n', 5),
        ("API_PORT=9001\nAPI_TOKENS\n", 2),
        ('API_PORT=9001\nAPI_TOKENS="alice:0123456789abcdef\nDEBUG=1\n', 2),
    ],
)
def test_a_wrong_line_of_the_env_file_is_numbered(folder: Path, text: str, number: int) -> None:
    (folder / ".env").write_bytes(text.encode())

    assert read_error() == f".env is refused: line {number} is not NAME=value"


def test_an_env_file_that_is_not_utf_8_text_is_refused(folder: Path) -> None:
    (folder / ".env").write_text("API_PORT=9001\n", "utf-16")

    assert read_error().startswith(".env is refused: it cannot be read as UTF-8 text: ")


WRONG_ORIGINS = [
    *("*", "https://*.example.com", ",", "https://", "localhost:3000", "https://a.org:443"),
    *("http://a.org:80", "https://a.org/app", "https://alice@a.org", "https://a.org http://b.org"),
]
# Neither ambiguous nor weak tokens are taken.
WRONG_TOKENS = [
    *(",", f"a:{TOKEN[:15]}", f"a:{TOKEN},a:{TOKEN}x", f"a:{TOKEN},b:{TOKEN}:read", TOKEN),
    *(f":{TOKEN}", f"a b:{TOKEN}", "a:s3cr3t of 16 chars", f"a:{TOKEN}:write", f"a:{TOKEN}é"),
    *(f"a:{TOKEN}:READ", f"a:{TOKEN}:read:read", f"a:{TOKEN};b:{TOKEN}x"),
    f"a:{TOKEN},b:s3cr3t",  # only the second one is wrong
]
URL_FORM = "a URL like postgresql://user:password@host:5432/database is needed"
WRONG_URLS = [
    *("mysql://i:Secret123@db/i", "i:Secret123@db", "postgresql://i:Secret123"),
    *("postgresql://i:Secret123%@db/i", "postgresql://i:Begin@Secret123@db/i"),
    *("postgresql://i:Secret123/end@db/i", "postgresql://i:Secret123?end=1@db/i"),
    *("postgresql://i:Secret123@db:0/i", "postgresql://i:Secret123@one:5432,two:99999/i"),
    "postgresql://i:Secret123@/i?host=one,two,three&port=1,2",
    *("postgresql://db/i?password=Begin&Secret123=end", "postgresql://i:Secret123@db?options=a=b"),
]
WRONG_OPTION = "postgresql://u:Secret123@db/i?pgbouncer=true"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("API_PORT", "0", "greater than or equal to 1"),
        ("API_PORT", "65536", "less than or equal to 65535"),
        ("DB_POOL_SIZE", "101", "less than or equal to 100"),
        ("DEBUG", "maybe", "valid boolean"),
        *(("CORS_ORIGINS", text, "like https://ops.example.com or") for text in WRONG_ORIGINS),
        *(("API_TOKENS", tokens, "") for tokens in WRONG_TOKENS),
        *(("DATABASE_URL", url, URL_FORM) for url in WRONG_URLS),
        ("DATABASE_URL", WRONG_OPTION, 'PostgreSQL has no option "pgbouncer"'),
    ],
)
def test_a_wrong_setting_is_refused_with_a_reason_and_no_secret(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    message = read_error()

    shown = "…" if name in ("API_TOKENS", "DATABASE_URL") else repr(value)
    assert message.startswith(f"{name}={shown} is refused: ")
    assert reason in message
    assert not re.search("\n|Secret123|s3cr3t", message)


# ── Database URLs ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "normalized"),
    [
        ("postgresql+asyncpg://u:p@db:5433/i", "postgresql://u:p@db:5433/i"),
        ("postgres://db/i?connect_timeout=3&ssl=require", "db/i?connect_timeout=3&sslmode=require"),
        ("postgresql://db/i?ssl=true", "db/i?ssl=true"),
        ("postgresql://one:1,two:65535/i?target_session_attrs=any", None),
        ("postgresql://db/i?sslnegotiation=direct&sslmode=require", None),
        ("postgresql:///db?host=/run/x", None),
        ("postgresql:///db?hostaddr=10.0.0.1", "postgresql:///db?host=10.0.0.1"),
        ("postgresql:///i?hostaddr=10.0.0.1,10.0.0.2&port=1,", "/i?host=10.0.0.1,10.0.0.2&port=1,"),
        ("postgresql://u:%40%3A%2F%3F%23%25@db/i", None),
    ],
)
def test_a_database_url_is_accepted_in_all_common_forms(given: str, normalized: str | None) -> None:
    expected = normalized or given
    scheme = "" if expected.startswith("postgresql://") else "postgresql://"

    assert normalize_database_url(given) == scheme + expected
    assert conninfo_to_dict(make_asyncpg_url(scheme + expected))


@pytest.mark.anyio
async def test_options_that_asyncpg_does_not_know_are_only_for_psycopg(database_url: str) -> None:
    options = (
        "load_balance_hosts=random&connect_timeout=3&gssencmode=disable&keepalives=1"
        "&client_encoding=LATIN1&options=-c%20search_path%3Dpg_temp&application_name=a%2Bb"
    )
    separator = "&" if "?" in database_url else "?"
    url = normalize_database_url(f"{database_url}{separator}{options}")
    parts = conninfo_to_dict(url)
    place = {name: parts.get(name) for name in ("host", "port")}
    show = "SELECT current_setting('search_path') || current_setting('application_name')"
    connection = await asyncpg.connect(make_asyncpg_url(url), **place)
    shown = await connection.fetchval(show)
    await connection.close()

    assert [(shown,)] == fetch(url, show) == [("pg_tempa+b",)]


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("postgresql://incidents:Secret123@one:5433,two/i", ["one:5433", "two:5432"]),
        ("postgresql:///i?host=/run/x&user=u&password=Secret123", ["/run/x:5432"]),
        ("postgresql:///i?password=Secret123", ["localhost:5432"]),
        ("postgresql://u:Secret123%40%2F@[::1]:5433/i", ["::1:5433"]),
    ],
)
def test_logs_name_a_database_by_host_and_port(url: str, names: list[str]) -> None:
    assert list(incidents.list_servers(normalize_database_url(url))) == names


WRONG = {
    "API_PORT": "eighty",
    "CORS_ORIGINS": "*.example.com",
    "DATABASE_URL": "postgresql://incidents:Secret123@db/incidents?pgbouncer=true",
}


@pytest.mark.parametrize(
    ("command", "exit_code"), [("incidents.py", 2), ("-m uvicorn incidents:app --port 0", 3)]
)
def test_a_start_with_wrong_settings_has_a_line_for_each(command: str, exit_code: int) -> None:
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONUTF8": "1"} | WRONG,
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout) == (exit_code, "")
    assert sorted(re.findall(r"(\w+)=\S+ is refused: ", done.stderr)) == sorted(WRONG)
    if exit_code == 2:
        assert len(done.stderr.splitlines()) == len(WRONG)
    assert not re.search('Secret123|  File "', done.stderr)
