"""Requests drawn from the OpenAPI document: the server never fails and answers as it says."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.dsjax.serving.served import a_server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def schema():
    # What a drawn request may ask for at most is little, so that it is soon answered.
    with a_server(request_seconds=30.0, max_n=4) as served:
        document = httpx.get(f"{served.url}/openapi.json").json()
        made = schemathesis.openapi.from_dict(document)
        made.config.update(base_url=served.url)
        yield made
        served.wait_until_idle()


def test_answers_are_as_the_document_says(schema):
    paths = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        paths.add(operation.path)

        @given(case=operation.as_strategy())
        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics"} <= paths
