"""Generated requests to the running service, for some minutes: `uv run pytest -m schemathesis`.

Schemathesis reads the description that the service serves, and sends what it allows, what it
forbids, and sequences of requests that go on from one another. Each answer must be one that the
description has, and none a 5xx; what it forbids must be refused, and what it allows be taken.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Server

EXAMPLES = 200  # for each operation; as many sequences


@pytest.mark.schemathesis
@pytest.mark.parametrize("phases", ["examples,coverage,fuzzing", "stateful"])
def test_every_answer_to_generated_requests_is_as_described(
    serve: Callable[..., Server], database_url: str, tmp_path: Path, phases: str
) -> None:
    uv = shutil.which("uv") or pytest.skip("schemathesis is run by uv: pip install uv")
    server = serve(DATABASE_URL=database_url)

    command = [uv, "run", "--project", str(ROOT), "--isolated", "--only-group", "schemathesis"]
    command += [
        "schemathesis",
        "run",
        f"{server.url}/openapi.json",
        "--checks",
        "all",
        "--phases",
        phases,
    ]
    command += ["--include-path-regex", "."]  # else all but the path of the description itself
    command += ["--max-examples", str(EXAMPLES), "--seed", "1", "--continue-on-failure"]
    ended = subprocess.run(
        [*command, "--generation-database", "none", "--no-color"],
        cwd=tmp_path,  # no settings of its own are taken up, and nothing is left behind
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "tests"), "SCHEMATHESIS_HOOKS": "schemathesis_hooks"},
        capture_output=True,
        encoding="utf-8",
    )

    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0
    assert not re.search("(?i)warning", ended.stdout)
    assert "Traceback" not in server.printed()
