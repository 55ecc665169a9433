"""The settings: where they are read from, and what is said when one is wrong."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT, SETTING_NAMES, free_port

import incidents
from incidents import get_settings

ReadError = Callable[[], str]

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


@pytest.fixture
def read_error() -> ReadError:
    """Read the settings, of which some are wrong, and give what is said about them."""

    def read() -> str:
        with pytest.raises(ValueError) as error:
            get_settings()
        return str(error.value)

    return read


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python until it ends, and give its exit code and what it printed."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUTF8": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ── Where they come from ──────────────────────────────────────────────────────────────────────────


def test_without_settings_the_service_is_local_and_has_a_database_of_its_own() -> None:
    settings = get_settings()

    assert settings.model_dump() == {
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

    assert get_settings().model_dump() == {
        "database_url": "postgresql://db/incidents",
        "data_dir": Path("/var/lib/incidents"),
        "api_host": "::1",
        "api_port": 65535,
        "debug": True,
        "access_log": True,
        "api_tokens": [
            ("alice", b"0123456789abcdef", None),
            ("ci", b"fedcba9876543210", "read"),
        ],
        "cors_origins": ["https://ops.example.com", "http://localhost:3000"],
        "db_pool_size": 1,
    }


def test_the_environment_comes_before_the_env_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".env").write_text("API_PORT=9001\nAPI_HOST=0.0.0.0\n")
    monkeypatch.setenv("API_PORT", "9002")
    settings = get_settings()

    assert settings.api_port == 9002
    assert settings.api_host == "0.0.0.0"


def test_an_empty_setting_counts_as_not_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".env").write_text("DATABASE_URL=\nAPI_PORT=9001\n")
    monkeypatch.setenv("API_PORT", "")
    settings = get_settings()

    assert settings.database_url is None
    assert settings.api_port == 9001


def test_the_env_file_is_the_one_beside_the_module_and_not_one_of_the_current_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".env").write_text("API_PORT=9001\n")
    current_folder = tmp_path_factory.mktemp("current")
    (current_folder / ".env").write_text("API_PORT=9002\nDB_POOL_SIZE=2\n")
    monkeypatch.chdir(current_folder)
    settings = get_settings()

    assert MODULE_FOLDER == ROOT
    assert (settings.api_port, settings.db_pool_size) == (9001, 10)


def test_other_lines_of_the_env_file_are_ignored(folder: Path) -> None:
    (folder / ".env").write_text(
        "# For us and for Docker Compose\nPOSTGRES_DB=incidents\nAPI_PORT=9001\n"
    )

    assert get_settings().api_port == 9001


def test_an_env_file_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    (folder / ".env").write_text("API_PORT=9001\nDATA_DIR=данные\n", "utf-8-sig")
    settings = get_settings()

    assert settings.api_port == 9001
    assert settings.data_dir == Path("данные")


def test_an_env_file_in_utf_16_is_refused_with_one_line(
    folder: Path, read_error: ReadError
) -> None:
    (folder / ".env").write_text("API_PORT=9001\n", "utf-16")

    assert read_error() == ".env is refused: it is not UTF-8 text; save it as UTF-8"


@pytest.mark.parametrize(
    "text",
    [
        "export API_PORT=9001\n",
        "# For us\n\n   # and for Docker Compose\nAPI_PORT=9001 # the port\n\n",
        "API_PORT='9001'\n",
        'API_PORT="9001"\n',
        "API_PORT = 9001",
        "API_HOST=::1\r\nAPI_PORT=9001\r\n",
        "\ufeffAPI_PORT=9001\r\n\r\n# the end\r\n",
        'GREETING="two\nlines"\nAPI_PORT=9001\n',
    ],
    ids=["export", "comments", "quotes", "double", "blanks", "CRLF", "mark", "two lines"],
)
def test_an_env_file_may_have_the_usual_forms(folder: Path, text: str) -> None:
    (folder / ".env").write_bytes(text.encode())

    assert get_settings().api_port == 9001


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("API_TOKENS: alice:0123456789abcdef\n", 1),
        ("API_PORT=9001\nAPI_TOKENS alice:0123456789abcdef\nDEBUG=1\n", 2),
        ("API_PORT=9001\r\nAPI_TOKENS: alice:0123456789abcdef\r\n", 2),
        ("# ours\n\n\nAPI_TOKENS: alice:0123456789abcdef\n", 4),
        ('GREETING="two\nlines"\nAPI_TOKENS: alice:0123456789abcdef\n', 3),
        ("API_PORT=9001\nAPI_TOKENS\n", 2),
        ("export API_TOKENS\n", 1),
        ('API_PORT=9001\nAPI_TOKENS="alice:0123456789abcdef\nDEBUG=1\n', 2),
        ("API_TOKENS='alice:0123456789abcdef\n", 1),
        ('API_TOKENS="alice:0123456789abcdef" bob\n', 1),
        ("alice:0123456789abcdef\n", 1),
    ],
)
def test_a_line_of_the_env_file_that_means_nothing_is_refused_by_its_number_only(
    folder: Path, read_error: ReadError, text: str, number: int
) -> None:
    (folder / ".env").write_bytes(text.encode())
    message = read_error()

    assert message.startswith(".env is refused: ")
    assert re.findall(r"\bline (\d+)", message) == [str(number)]
    assert "\n" not in message
    assert "alice" not in message
    assert "0123456789abcdef" not in message


def test_an_env_file_that_is_a_folder_is_refused_with_one_line(
    folder: Path, read_error: ReadError
) -> None:
    (folder / ".env").mkdir()
    message = read_error()

    assert message.startswith(".env is refused: ")
    assert "\n" not in message


def test_a_data_dir_may_begin_with_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_DIR", "~/incidents data")

    assert get_settings().data_dir == tmp_path / "incidents data"


# ── Wrong settings ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("API_PORT", "0", "greater than or equal to 1"),
        ("API_PORT", "65536", "less than or equal to 65535"),
        ("API_PORT", "eighty", "valid integer"),
        ("DB_POOL_SIZE", "0", "greater than or equal to 1"),
        ("DB_POOL_SIZE", "101", "less than or equal to 100"),
        ("DEBUG", "maybe", "valid boolean"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name_its_value_and_what_is_allowed(
    name: str, value: str, allowed: str, read_error: ReadError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    message = read_error()

    assert message.startswith(f"{name}='{value}' is refused: ")
    assert allowed in message
    assert "\n" not in message


def test_each_wrong_setting_has_a_line(
    read_error: ReadError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_PORT", "0")
    monkeypatch.setenv("DEBUG", "maybe")

    assert [line.split("=")[0] for line in read_error().splitlines()] == ["API_PORT", "DEBUG"]


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
def test_a_wrong_database_url_is_refused_without_showing_its_password(
    url: str, read_error: ReadError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    message = read_error()

    assert message.startswith(
        "DATABASE_URL=… is refused: a URL like postgresql://user:password@host"
    )
    assert "\n" not in message
    assert "Secret123" not in message


@pytest.mark.parametrize(
    "rest",
    [
        "db:99999/incidents",
        "db:65536/incidents",
        "db:0/incidents",
        "one:5432,two:99999/incidents",
        "db/incidents?port=99999",
        "db/incidents?sslmode=bogus",
        "db/incidents?ssl=bogus",
        "one:5432,two:5433/incidents?target_session_attrs=bogus",
    ],
)
def test_a_database_url_with_a_wrong_port_or_option_is_refused_without_showing_its_password(
    rest: str, read_error: ReadError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://incidents:Secret123@{rest}")
    message = read_error()

    assert message.startswith("DATABASE_URL=… is refused: ")
    assert "\n" not in message
    assert "Secret123" not in message


# ── When the service starts ───────────────────────────────────────────────────────────────────────

WRONG = {"DATABASE_URL": "mysql://incidents:Secret123@db", "API_PORT": "eighty"}


def test_the_module_can_be_imported_when_settings_are_wrong() -> None:
    done = run_python("-c", "import incidents", **WRONG)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_start_with_wrong_settings_ends_with_exit_code_2_and_a_line_for_each() -> None:
    done = run_python("incidents.py", **WRONG)

    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.split("=")[0] for line in lines] == ["DATABASE_URL", "API_PORT"]
    assert all(" is refused: " in line for line in lines)
    assert "Secret123" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_TOKENS", ","),
        ("CORS_ORIGINS", "*.example.com"),
        ("DATABASE_URL", "postgresql://incidents:Secret123@db:99999/incidents"),
    ],
)
def test_a_start_with_a_setting_that_means_nothing_ends_with_exit_code_2_and_one_line(
    name: str, value: str
) -> None:
    done = run_python("incidents.py", **{name: value})

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{name}=\S+ is refused: .+\n", done.stderr)
    assert "Secret123" not in done.stderr


def test_a_start_with_a_wrong_env_file_ends_with_exit_code_2_and_one_line(folder: Path) -> None:
    (folder / ".env").write_text("API_TOKENS: alice:0123456789abcdef\n")
    start = "incidents.HERE = pathlib.Path(sys.argv[1]); incidents.main()"
    done = run_python("-c", f"import incidents, pathlib, sys; {start}", str(folder))

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"\.env is refused: .*\bline 1\b.*\n", done.stderr)
    assert "0123456789abcdef" not in done.stderr


@pytest.mark.parametrize("value", ["~no-such-user/data", "tmp/file", "tmp/file/data"])
def test_a_start_with_a_data_dir_that_is_no_folder_ends_with_exit_code_2_and_one_line(
    tmp_path: Path, value: str
) -> None:
    (tmp_path / "file").touch()
    done = run_python("incidents.py", DATA_DIR=value.replace("tmp", str(tmp_path)))

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"DATA_DIR=.+ is refused: .+\n", done.stderr)
    assert value.removeprefix("tmp") in done.stderr


def test_a_start_by_uvicorn_with_wrong_settings_ends_with_exit_code_3_and_the_lines() -> None:
    done = run_python("-m", "uvicorn", "incidents:app", "--port", str(free_port()), **WRONG)

    assert done.returncode == 3
    assert done.stdout == ""
    assert re.findall(r"(\w+)=\S+ is refused: ", done.stderr) == ["DATABASE_URL", "API_PORT"]
    assert 'File "' not in done.stderr
    assert "Secret123" not in done.stderr


# ── Database URLs ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "normalized"),
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
def test_a_database_url_is_accepted_in_all_common_forms(given: str, normalized: str) -> None:
    assert incidents.normalize_database_url(given) == normalized


@pytest.mark.parametrize(
    "option",
    [
        *(
            f"sslmode={mode}"
            for mode in ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
        ),
        *(
            f"target_session_attrs={attribute}"
            for attribute in ("any", "primary", "standby", "read-write", "read-only")
        ),
    ],
)
def test_a_database_url_may_have_every_value_of_an_option_that_postgresql_has(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://u:p@one:1,two:65535/incidents?{option}"
    monkeypatch.setenv("DATABASE_URL", url)

    assert get_settings().database_url == url


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql://incidents:Secret123@db:5433/incidents", "db:5433"),
        ("postgresql://incidents:Secret123@db/incidents", "db:5432"),
        ("postgresql://incidents:Secret123@one:5432,two:5433/i", "one:5432, two:5433"),
        ("postgresql:///i?host=/run/x&user=u&password=Secret123", "/run/x:5432"),
        ("postgresql:///i?password=Secret123", "localhost:5432"),
        ("postgresql://u:Secret123%40%2F@[::1]:5433/i", "::1:5433"),
    ],
)
def test_logs_name_a_database_by_host_and_port_without_its_password(url: str, name: str) -> None:
    database = incidents.Database()
    database.url = incidents.normalize_database_url(url)

    assert str(database) == name


# ── Origins of other sites ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        (
            "https://ops.example.com/, http://localhost:3000",
            ["https://ops.example.com", "http://localhost:3000"],
        ),
        (" HTTPS://Ops.Example.COM ,https://b.org/ ", ["https://ops.example.com", "https://b.org"]),
        ("https://ops.example.com:8443", ["https://ops.example.com:8443"]),
        ("https://ops.example.com:80", ["https://ops.example.com:80"]),
        ("http://ops.example.com:443", ["http://ops.example.com:443"]),
        ("http://127.0.0.1:3000,http://[::1]:3000", ["http://127.0.0.1:3000", "http://[::1]:3000"]),
        ("https://xn--80aswg.xn--p1ai", ["https://xn--80aswg.xn--p1ai"]),
    ],
)
def test_cors_origins_are_taken_as_a_browser_sends_them(
    given: str, origins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORS_ORIGINS", given)

    assert get_settings().cors_origins == origins


@pytest.mark.parametrize(
    "value",
    [
        "*",
        "*.example.com",
        "https://*.example.com",
        "https://ops.example.com:443",
        "http://ops.example.com:80",
        "https://ops.example.com/app",
        "https://ops.example.com//",
        "https://ops.example.com?a=b",
        "https://alice@ops.example.com",
        "https://ops.example.com:99999",
        "https://ops.example.com http://localhost:3000",
        "https://",
        "ops.example.com",
        "localhost:3000",
        "ftp://ops.example.com",
        "null",
        ",",
        "https://ops.example.com,*",
    ],
)
def test_cors_origins_that_no_browser_sends_are_refused_with_an_example(
    value: str, read_error: ReadError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORS_ORIGINS", value)
    message = read_error()

    shown = f"CORS_ORIGINS='{value}' is refused: "
    assert message.startswith(shown)
    sentence = message.removeprefix(shown)
    assert re.search(r"https?://[a-z]", sentence)
    assert not re.search(r"[\\^$\n]|pattern|regex", sentence)
