"""The README is true: its examples print what it says, and nothing is missing from it."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, Server

import incidents

README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```sh\n(.*?)```\n```output\n(.*?)```\n", README, re.DOTALL)


def test_the_examples_print_what_the_readme_says(
    serve: Callable[..., Server], database_url: str, tmp_path: Path
) -> None:
    server = serve(DATABASE_URL=database_url)

    for command, output in EXAMPLES:
        assert without_moments(run(command, server.url, tmp_path)) == without_moments(output)


def run(command: str, url: str, folder: Path) -> str:
    """What a shell prints for the command, sent to this server; each answer on lines of its own."""
    command = command.replace("http://127.0.0.1:8000", url)
    script = f"set -euo pipefail; curl() {{ command curl -w '\\n' \"$@\"; }}; {command}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, check=True)
    return re.sub(r"\r|\n(?=\n)", "", done.stdout.decode("utf-8")).strip() + "\n"


def without_moments(text: str) -> str:
    """The text, with one and the same word for each moment and duration in it."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "MOMENT", text)
    return re.sub(r'("(?:mean|p50|p95)" ?: ?)[\d.]+', r"\1SECONDS", text)


def test_every_setting_is_in_the_readme_and_in_the_example() -> None:
    example = (ROOT / ".env.example").read_text("utf-8")
    compose = (ROOT / "docker-compose.yml").read_text("utf-8")
    names = {name.upper() for name in incidents.Settings.model_fields}
    names |= set(re.findall(r"\${(\w+)", compose))

    assert [name for name in sorted(names) if f"`{name}`" not in README] == []
    assert [name for name in sorted(names) if f"\n{name}=" not in example] == []


def test_every_setting_of_the_readme_exists() -> None:
    settings = README.split("## Settings")[1].split("##")[0]
    compose = (ROOT / "docker-compose.yml").read_text("utf-8")
    named = {name for name in re.findall(r"`([A-Z_]+)`", settings)}

    assert [
        n for n in named if n.lower() not in incidents.Settings.model_fields and n not in compose
    ] == []


def test_every_route_is_in_the_readme() -> None:
    missing = [o for o in incidents.OPERATIONS if f"`{o.method} {o.shown}`" not in README]

    assert missing == []


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) <= 200
