"""What schemathesis cannot know from the description of this API, for tests/test_schemathesis.py.

It is imported by the schemathesis command, in an environment without the packages of the service.
"""

import hashlib
import zlib
from typing import Any

import schemathesis


def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Change valid requests where values must fit earlier responses, which no schema can say."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if "after" in case.query:
        # A cursor ends with a checksum; this is what `incidents.encode_cursor` does.
        position = f"1700000000000000-{len(str(case.query['after']))}"
        case.query["after"] = f"{position}-{zlib.crc32(position.encode()):08x}"
    if "If-Match" in case.headers:
        # Most incidents have one of these versions. The generated value stays in the list.
        versions = ", ".join(f'"{version}"' for version in range(1, 10))
        case.headers["If-Match"] = f"{versions}, {case.headers['If-Match']}"
    if "Idempotency-Key" in case.headers:
        # The same key with another request is refused, so each request gets its own key.
        digest = hashlib.md5(f"{case.path_parameters} {case.body}".encode("utf-8", "replace"))
        key = f"{digest.hexdigest()}{case.headers['Idempotency-Key']}"
        case.headers["Idempotency-Key"] = key[:255]


def filter_case(context: Any, case: Any) -> bool:
    """Leave out requests with NUL characters: the pattern of texts allows them, the service not."""
    return "\\x00" not in f"{case.query} {case.body}"


def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Accept what no schema can say, and that events and alerts are taken whatever their types."""
    if type(failure).__name__ == "RejectedPositiveData":
        # If-Match may not have the version of the incident, and only a trigger needs a payload.
        return response.status_code != 412 and b"A trigger needs a payload" not in response.content
    is_lenient = case.operation.path in ("/v2/enqueue", "/webhooks/alertmanager")
    return not (is_lenient and type(failure).__name__ == "AcceptedNegativeData")


schemathesis.hook(before_call)
schemathesis.hook(filter_case)
schemathesis.hook(filter_failure)
