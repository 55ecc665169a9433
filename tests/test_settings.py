"""The settings: where they are read from, and how a wrong one is refused."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, SETTINGS

import incidents

Refusal = Callable[[], str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to start in, and no setting in the environment."""
    for name in [name for name in os.environ if name.upper() in SETTINGS]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Read the settings, which end the process with exit code 2, and give what they print."""

    def read() -> str:
        with pytest.raises(SystemExit) as end:
            incidents.read_settings()

        assert end.value.code == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        return printed.err

    return read


def started(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that imports the service in a folder and prints one of its settings."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUTF8="1", **environment)
    script = "import incidents; print(incidents.settings.api_port)"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_without_settings_the_service_is_local_and_keeps_its_own_database() -> None:
    settings = incidents.read_settings()

    assert settings.model_dump() == {
        "database_url": None,
        "data_dir": Path(".data"),
        "api_host": "127.0.0.1",
        "api_port": 8000,
        "debug": False,
        "access_log": False,
        "api_tokens": [],
        "cors_origins": "",
        "db_pool_size": 10,
    }


def test_every_setting_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://db/incidents")
    monkeypatch.setenv("DATA_DIR", "/var/lib/incidents")
    monkeypatch.setenv("API_HOST", "::1")
    monkeypatch.setenv("API_PORT", "65535")
    monkeypatch.setenv("DEBUG", "true")
    monkeypatch.setenv("ACCESS_LOG", "1")
    monkeypatch.setenv("API_TOKENS", "alice:0123456789abcdef,ci:fedcba9876543210:read")
    monkeypatch.setenv("CORS_ORIGINS", "https://ops.example.com,http://localhost:3000")
    monkeypatch.setenv("DB_POOL_SIZE", "1")

    assert incidents.read_settings().model_dump() == {
        "database_url": "postgresql://db/incidents",
        "data_dir": Path("/var/lib/incidents"),
        "api_host": "::1",
        "api_port": 65535,
        "debug": True,
        "access_log": True,
        "api_tokens": [
            ("alice", b"0123456789abcdef", False),
            ("ci", b"fedcba9876543210", True),
        ],
        "cors_origins": "https://ops.example.com,http://localhost:3000",
        "db_pool_size": 1,
    }


def test_the_environment_comes_before_the_env_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".env").write_text("API_PORT=9001\nAPI_HOST=0.0.0.0\n")
    monkeypatch.setenv("API_PORT", "9002")
    settings = incidents.read_settings()

    assert settings.api_port == 9002
    assert settings.api_host == "0.0.0.0"


def test_an_empty_setting_is_unset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".env").write_text("DATABASE_URL=\nAPI_PORT=9001\n")
    monkeypatch.setenv("API_PORT", "")
    settings = incidents.read_settings()

    assert settings.database_url is None
    assert settings.api_port == 9001


def test_other_lines_of_the_env_file_are_left_to_others(folder: Path) -> None:
    (folder / ".env").write_text("# Ours and Compose's\nPOSTGRES_DB=incidents\nAPI_PORT=9001\n")

    assert incidents.read_settings().api_port == 9001


def test_an_env_file_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    (folder / ".env").write_text("API_PORT=9001\nDATA_DIR=данные\n", "utf-8-sig")
    settings = incidents.read_settings()

    assert settings.api_port == 9001
    assert settings.data_dir == Path("данные")


def test_an_env_file_in_utf_16_is_refused_with_one_line(folder: Path, refusal: Refusal) -> None:
    (folder / ".env").write_text("API_PORT=9001\n", "utf-16")

    assert refusal() == ".env is refused: it is not UTF-8 text; save it as UTF-8\n"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("API_PORT", "0", "greater than or equal to 1"),
        ("API_PORT", "65536", "less than or equal to 65535"),
        ("API_PORT", "eighty", "valid integer"),
        ("DB_POOL_SIZE", "0", "greater than or equal to 1"),
        ("DB_POOL_SIZE", "1001", "less than or equal to 1000"),
        ("DEBUG", "maybe", "valid boolean"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name_its_value_and_what_is_allowed(
    name: str, value: str, allowed: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    line = refusal()

    assert line.startswith(f"{name}='{value}' is refused: ")
    assert allowed in line
    assert line.count("\n") == 1


def test_each_wrong_setting_has_a_line(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_PORT", "0")
    monkeypatch.setenv("DEBUG", "maybe")

    assert [line.split("=")[0] for line in refusal().splitlines()] == ["API_PORT", "DEBUG"]


@pytest.mark.parametrize(
    "url",
    [
        "mysql://incidents:Secret123@db/incidents",
        "incidents:Secret123@db",
        "postgresql:/incidents:Secret123@db",
        "postgresql://incidents:Secret123%@db/incidents",
        "postgresql://incidents:Secret123@db/incidents?no_such=1",
        "postgresql://incidents:Secret123@db:port/incidents",
        "postgresql://incidents:Begin@Secret123@db/incidents",
        "postgresql://incidents:Secret123/end@db/incidents",
        "postgresql://incidents:Secret123?end@db/incidents",
        "postgresql://incidents:Secret123#end@db/incidents",
    ],
)
def test_a_database_url_that_cannot_be_one_is_refused_without_its_password(
    url: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    line = refusal()

    assert line.startswith("DATABASE_URL=… is refused: a URL like postgresql://user:password@host")
    assert line.count("\n") == 1
    assert "Secret123" not in line


def test_a_wrong_setting_ends_a_start_with_exit_code_2_and_no_traceback(folder: Path) -> None:
    (folder / ".env").write_text("API_PORT=1\n")
    done = started(folder, API_PORT="eighty", DATABASE_URL="mysql://incidents:Secret123@db")

    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.split("=")[0] for line in lines] == ["DATABASE_URL", "API_PORT"]
    assert "Secret123" not in done.stderr


def test_a_start_reads_the_env_file_of_the_folder_it_is_in(folder: Path) -> None:
    (folder / ".env").write_text("API_PORT=9001\n", "utf-8-sig")
    done = started(folder)

    assert (done.returncode, done.stdout, done.stderr) == (0, "9001\n", "")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgresql://u:p@db:5433/incidents", "postgresql://u:p@db:5433/incidents"),
        ("postgres://u:p@db/incidents", "postgresql://u:p@db/incidents"),
        ("postgresql+asyncpg://u:p@db/incidents", "postgresql://u:p@db/incidents"),
        ("postgresql+psycopg://u:p@db/incidents", "postgresql://u:p@db/incidents"),
        ("postgresql+asyncpg://db/i?ssl=require", "postgresql://db/i?sslmode=require"),
        (
            "postgresql://db/i?connect_timeout=3&ssl=require",
            "postgresql://db/i?connect_timeout=3&sslmode=require",
        ),
        ("postgresql://db/i?sslmode=require", "postgresql://db/i?sslmode=require"),
        ("postgresql://one:5432,two:5433/i", "postgresql://one:5432,two:5433/i"),
        ("postgresql:///db?host=/run/x", "postgresql:///db?host=/run/x"),
        ("postgresql://u:%40%3A%2F%3F%23%25@db/i", "postgresql://u:%40%3A%2F%3F%23%25@db/i"),
    ],
)
def test_a_database_url_is_taken_in_the_forms_that_are_in_use(given: str, used: str) -> None:
    assert incidents.postgres_url(given) == used


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://incidents:Secret123@db:5433/incidents", "db:5433"),
        ("postgresql://incidents:Secret123@db/incidents", "db:5432"),
        ("postgresql://incidents:Secret123@one:5432,two:5433/i", "one,two:5432,5433"),
        ("postgresql:///i?host=/run/x&user=u&password=Secret123", "/run/x:5432"),
        ("postgresql:///i?password=Secret123", "localhost:5432"),
        ("postgresql://u:Secret123%40%2F@[::1]:5433/i", "::1:5433"),
    ],
)
def test_a_database_is_named_by_its_place_never_with_its_password(url: str, place: str) -> None:
    database = incidents.Database()
    database.url = incidents.postgres_url(url)

    assert str(database) == place
