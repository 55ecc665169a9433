"""Break the service in 160 small ways, one after the other, and see whether the tests notice it.

    uv run tests/mutants.py                  # all mutants, with the tests of HEAD
    uv run tests/mutants.py --tests main~5   # the same mutants, with older tests
    uv run tests/mutants.py --only 17        # one mutant, with what pytest says

A mutant is one change in the code of HEAD, chosen at random, always the same. First all tests run
once, to record which lines each executes. Then each mutant gets the tests that execute its line,
until one fails: first those that execute the fewest lines, and 60 at most. What no test executes in
pytest's own process is tried by whole files. All of this happens in copies of the checkout.
"""

import argparse
import ast
import contextlib
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import coverage

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 150  # for the tests of a mutant; one that makes them hang is caught
MOST_TESTS = 60
# Files for what runs in processes of its own, or when the module is imported.
FILES_OF_PYTHON = ("settings", "problems", "routes", "openapi", "sockets", "running", "connections")
FILES_OF_MIGRATIONS = ("migrations", "sql", "plans", "labels", "list", "upgrade", "events")

PAIRS: list[tuple[type[Any], type[Any]]] = [
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq)),
    *((ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or)),
]
PYTHON_TURNED = dict(PAIRS) | {second: first for first, second in PAIRS}
# Log lines, what only Windows uses, and what is only a text.
SKIPPED = re.compile(r"\blog\.|print\(|__name__|win32|TypeVar|Histogram\(|Gauge\(|gc\.|^import ")
SQL_CHANGES = [
    (r" (<|<=|>|>=|=|<>) ", {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "=": "<>", "<>": "="}),
    (r"\s(AND|OR)\b", {"AND": "OR", "OR": "AND"}),
    (r"\b(?:WHERE|AND|WHEN) (NOT )", {"NOT ": ""}),
    (r"\b(IS NOT|IS)\b", {"IS": "IS NOT", "IS NOT": "IS"}),
    (r"\b(coalesce|greatest)\(", {"coalesce": "nullif", "greatest": "least"}),
    (r"( SKIP LOCKED| DESC)\b", {" SKIP LOCKED": "", " DESC": ""}),
    (r"(?<![\w$.])(\d+)(?![\w.])", {}),
]


class Mutant(NamedTuple):
    """Another text between two offsets of a file."""

    file: str
    line: int
    start: int
    end: int
    new: str


def change_node(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Give the changes of a part of the code: what is replaced, and by what."""
    match node:
        case ast.Compare(left, [operator], right):
            yield node, ast.Compare(left, [PYTHON_TURNED[type(operator)]()], right)
        case ast.BoolOp(operator, values):
            yield node, ast.BoolOp(PYTHON_TURNED[type(operator)](), values)
            yield node, values[0]
            yield node, values[-1]
        case ast.UnaryOp(ast.Not(), operand):
            yield node, operand
        case ast.If(test) | ast.IfExp(test) | ast.comprehension(ifs=[test]):
            yield test, ast.Constant(True)
            yield test, ast.Constant(False)
        case ast.Constant(bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield node, ast.Constant(value + 1)
        case ast.Call(ast.Name() as function, [first, second], keywords):
            yield node, ast.Call(function, [second, first], keywords)
        case ast.keyword(value=value) | ast.Return(ast.expr() as value):
            yield value, ast.Constant(None)
        case ast.Expr(ast.Call() | ast.Await()) | ast.AugAssign() | ast.Raise() | ast.Continue():
            yield node, ast.Pass()


def find_python_mutants(file: str, text: str) -> Iterator[Mutant]:
    """Find what can be changed in a module."""
    lines = text.splitlines(keepends=True)

    def offset(line: int, column: int) -> int:  # ast counts columns in bytes
        return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())

    tree = ast.parse(text)
    # Python 3.11 does not know where the parts of an f"…" are.
    texts = [
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
    ]
    for node in ast.walk(tree):
        for old, new in change_node(node) if node not in texts else ():
            assert isinstance(old, ast.expr | ast.stmt) and old.end_lineno is not None
            start = offset(old.lineno, old.col_offset)
            end = offset(old.end_lineno, old.end_col_offset or 0)
            code = f"({ast.unparse(new)})" if isinstance(new, ast.BoolOp) else ast.unparse(new)
            if not SKIPPED.search(lines[old.lineno - 1]):
                yield Mutant(file, old.lineno, start, end, code)


def find_sql_mutants(file: str, text: str) -> Iterator[Mutant]:
    """Find what can be changed in an SQL file, outside comments and texts."""
    code = re.sub(r"--.*|'[^'\n]*'", lambda found: "~" * len(found[0]), text)
    for pattern, turned in SQL_CHANGES:
        for match in re.finditer(pattern, code):
            new = turned[match[1]] if turned else str(int(match[1]) + 1)
            yield Mutant(file, text.count("\n", 0, match.start(1)) + 1, *match.span(1), new)


def choose_mutants(found: Iterable[Mutant], count: int) -> list[Mutant]:
    """Choose mutants at random, at most one per line."""
    mutants = list(found)
    random.Random(1).shuffle(mutants)
    by_line = {(mutant.file, mutant.line): mutant for mutant in mutants}
    return sorted(list(by_line.values())[:count])


def choose_tests(mutant: Mutant, module: str, tests: dict[int, set[str]]) -> list[str]:
    """Choose tests from those that execute each line of the module; files if there are none."""
    lines = [mutant.line]
    if mutant.file.startswith("sql/"):
        name = rf"SQL\.{Path(mutant.file).stem}\b"
        code = module.split("\n")
        lines = [number for number, line in enumerate(code, 1) if re.search(name, line)]
    if mutant.file.startswith("migrations/"):
        return [f"tests/test_{name}.py" for name in FILES_OF_MIGRATIONS]
    sizes = Counter(test for names in tests.values() for test in names)
    found = {test for line in lines for test in tests.get(line, ())}
    chosen = sorted(found, key=lambda test: (sizes[test], test))[:MOST_TESTS]
    return chosen or [f"tests/test_{name}.py" for name in FILES_OF_PYTHON]


def git(*arguments: str) -> str:
    """Run git in the checkout, and give its output."""
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True)


def copy_checkout(copy: Path, revision: str) -> Path:
    """Copy the code of HEAD and the tests of a revision to a new folder."""
    copy.mkdir()
    for archive in ("HEAD | tar -x --exclude=./tests", f"{revision} tests | tar -x"):
        subprocess.run(f"git archive {archive} -C {copy}", shell=True, cwd=ROOT, check=True)
    return copy


def run_pytest(copy: Path, *options: str, seconds: int | None = None) -> tuple[int | None, str]:
    """Run pytest in a copy; give its exit code, None after so many seconds, and its output."""
    log = copy.with_suffix(".log")
    with log.open("wb") as output:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        process = subprocess.Popen(
            command, cwd=copy, stdout=output, stderr=output, start_new_session=True
        )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so that the tests end what they have started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        code = None
    return code, log.read_text("utf-8", "replace")


def record_tests(copy: Path) -> dict[int, set[str]]:
    """Run all tests, and give those that execute each line of the module."""
    print("Recording which lines each test executes", flush=True)
    run_pytest(copy, "--cov", "--cov-context=test", "--cov-report=", "--cov-fail-under=0")
    data = coverage.CoverageData(str(copy / ".coverage"))
    data.read()
    return {
        line: {context.partition("|")[0] for context in contexts if "::" in context}
        for line, contexts in data.contexts_by_lineno(str(copy / "incidents.py")).items()
    }


def try_mutant(copy: Path, mutant: Mutant, tests: list[str]) -> tuple[str, str]:
    """Run the tests of a mutant in a copy; give what caught it, or "", and pytest's output."""
    path = copy / mutant.file
    text = path.read_text("utf-8")
    path.write_text(text[: mutant.start] + mutant.new + text[mutant.end :], "utf-8")
    code, output = run_pytest(copy, "-x", "-rfE", "--tb=short", *tests, seconds=SECONDS)
    path.write_text(text, "utf-8")
    failed = re.search(r"(?m)^(?:FAILED|ERROR) (\S+)", output)
    return "" if code == 0 else failed[1] if failed else "a failing start or the limit", output


def main() -> None:
    """Run the mutants, print a line for each, and how many were caught."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tests", default="HEAD", help="the revision whose tests run")
    parser.add_argument("--only", type=int, help="the number of the mutant to run")
    options = parser.parse_args()
    names = git("ls-tree", "-r", "--name-only", "HEAD", "sql", "migrations").split()
    texts = {name: git("show", f"HEAD:{name}") for name in names if ".rollback." not in name}
    module = git("show", "HEAD:incidents.py")
    mutants = choose_mutants(find_python_mutants("incidents.py", module), 120)
    sql = (mutant for name, text in texts.items() for mutant in find_sql_mutants(name, text))
    mutants += choose_mutants(sql, 40)
    numbers = iter([options.only] if options.only else range(1, len(mutants) + 1))
    results = Counter[str]()

    def run_waiting(job: int) -> None:
        copy = copy_checkout(folder / f"copy{job}", options.tests)
        for number in numbers:  # Each thread takes the next one.
            mutant = mutants[number - 1]
            text = texts.get(mutant.file, module)
            caught_by, output = try_mutant(copy, mutant, choose_tests(mutant, module, tests))
            results["caught" if caught_by else "survived"] += 1
            old = text[mutant.start : mutant.end]
            result = f"caught by {caught_by}" if caught_by else "SURVIVED"
            place = f"{number} {mutant.file}:{mutant.line}"
            print(f"{place} {old[:60]!r} -> {mutant.new[:60]!r}: {result}", flush=True)
            if options.only:
                print(output)

    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        tests = record_tests(copy_checkout(folder / "record", options.tests))
        with ThreadPoolExecutor() as pool:
            list(pool.map(run_waiting, range(2)))
    print(options.tests, dict(results))


if __name__ == "__main__":
    main()
