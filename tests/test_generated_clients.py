"""A client that is generated from docs/openapi.json works, and linters accept it.

The packages of npm are installed into a folder of the test's own, and uv runs the Python generator
apart from the project, so that neither is a dependency.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, Serve

pytestmark = pytest.mark.slow

DESCRIPTION = ROOT / "docs/openapi.json"
NPM_PACKAGES = "@redocly/cli@2 @stoplight/spectral-cli@6"
TOKEN = "fedcba9876543210"
ENVIRONMENT = os.environ | {
    "REDOCLY_TELEMETRY": "off",
    "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true",
    "npm_config_update_notifier": "false",
}

# It creates, lists, changes and reads, and is refused once. It checks the types of what it gets.
PYTHON_CLIENT = """
import datetime
import sys
from client import AuthenticatedClient
from client.api.incidents import change_incident, change_status, create_incident, list_incidents
from client.api.timeline import get_timeline
from client.models import IncidentChange, NewIncident, Source, Status, StatusChange

client = AuthenticatedClient(sys.argv[1], token=sys.argv[2], raise_on_unexpected_status=True)
new = NewIncident(description="Нет света", source=Source.OPERATOR)
created = create_incident.sync(client=client, body=new, idempotency_key="one")
assert created.status is Status.OPEN, created
assert create_incident.sync(client=client, body=new, idempotency_key="one") == created
query = {"status": [Status.OPEN], "limit": 1, "since": datetime.date(2024, 1, 15)}
listed = list_incidents.sync(client=client, **query)
assert listed == [created], listed
body = StatusChange(status=Status.IN_PROGRESS)
changed = change_status.sync(created.id, client=client, body=body, if_match='"1"')
assert (changed.status, changed.version) == (Status.IN_PROGRESS, 2), changed
body = IncidentChange(source=Source.PARTNER)
refused = change_incident.sync(created.id, client=client, body=body, if_match='"1"')
assert refused.status == 412 and refused.detail, refused
timeline = get_timeline.sync(created.id, client=client)
assert [entry.kind for entry in timeline] == ["created", "status"], timeline
wrong = NewIncident(description=" ", source=Source.OPERATOR)
problem = create_incident.sync(client=client, body=wrong)
assert [error.pointer for error in problem.errors] == ["#/description"], problem
"""


def run(*command: str | Path, folder: Path, may_fail: bool = False) -> str:
    """Run a command in a folder, and give what it prints; fail the test with that if it fails."""
    ended = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, encoding="utf-8"
    )
    assert may_fail or ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the npm packages, and give the folder in which their commands run."""
    npm = shutil.which("npm") or pytest.skip("npm is not installed: apt-get install npm")
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text('{"type": "module"}', "utf-8")
    run(npm, "install", "--no-audit", "--no-fund", *NPM_PACKAGES.split(), folder=folder)
    return folder


# Both have one thing to say: /incidents/ ends with a slash. Here each path works with and without.
@pytest.mark.parametrize(
    ("command", "rule"),
    [
        ("redocly lint --extends recommended-strict", "no-path-trailing-slash"),
        ("spectral lint --ruleset ruleset.yaml --quiet", "path-keys-no-trailing-slash"),
    ],
)
def test_a_linter_finds_only_the_trailing_slash(npm_folder: Path, command: str, rule: str) -> None:
    (npm_folder / "ruleset.yaml").write_text('extends: ["spectral:oas"]\n', "utf-8")
    program, *options = f"{command} --format json".split()
    path = npm_folder / "node_modules/.bin" / program
    # Its exit code is 1 because it reports something.
    printed = run(path, *options, DESCRIPTION, folder=npm_folder, may_fail=True)

    # Redocly calls the name of a rule its ruleId, and Spectral calls it code.
    assert re.findall(r'"(?:ruleId|code)": ?"([^"]+)"', printed) == [rule], printed


def test_a_generated_python_client_works(serve: Serve, database_url: str, tmp_path: Path) -> None:
    uv = shutil.which("uv") or pytest.skip("uv is not installed: pip install uv")
    with_generator = ("run", "--no-project", "--with", "openapi-python-client~=0.29.1")
    generate = ("openapi-python-client", "generate", "--meta", "none", "--output-path", "client")
    (tmp_path / "use.py").write_text(PYTHON_CLIENT, "utf-8")
    url = serve(DATABASE_URL=database_url, API_TOKENS=f"client:{TOKEN}").url

    generated = run(uv, *with_generator, *generate, "--path", DESCRIPTION, folder=tmp_path)
    assert "warning" not in generated.lower()
    run(uv, *with_generator, "python", "use.py", url, TOKEN, folder=tmp_path)
