"""Generated requests to a running service, for some minutes: `uv run pytest -m schemathesis`.

Schemathesis reads the OpenAPI description that the service serves. It sends requests that the
description allows, requests that it forbids, and sequences of requests that use earlier responses.
Each response must be described and none a 5xx, and the service must accept what is allowed and
refuse what is forbidden.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, Serve

EXAMPLES = 200  # requests to each operation, and as many sequences


@pytest.mark.schemathesis
@pytest.mark.parametrize("phases", ["examples,coverage,fuzzing", "stateful"])
def test_every_response_to_generated_requests_is_as_described(
    serve: Serve, database_url: str, tmp_path: Path, phases: str
) -> None:
    uv = shutil.which("uv") or pytest.skip("uv runs schemathesis: pip install uv")
    server = serve(DATABASE_URL=database_url)
    command = [uv, "run", "--project", str(ROOT), "--isolated", "--only-group", "schemathesis"]
    command += ["schemathesis", "run", f"{server.url}/openapi.json", "--checks", "all"]
    # By default, the path of the description itself is left out.
    command += ["--phases", phases, "--include-path-regex", ".", "--continue-on-failure"]
    command += ["--max-examples", str(EXAMPLES), "--seed", "1", "--generation-database", "none"]
    hooks = {"PYTHONPATH": str(ROOT / "tests"), "SCHEMATHESIS_HOOKS": "schemathesis_hooks"}
    ended = subprocess.run(
        command,
        cwd=tmp_path,  # so that it finds no settings and leaves no files
        env=os.environ | hooks,
        capture_output=True,
        encoding="utf-8",
    )

    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert not re.search("(?i)warning", ended.stdout)
    assert not re.search("Traceback|ERROR", server.printed())
