"""Which heads a machine may join, and what is said of the others."""

from __future__ import annotations

import pytest

from cluster.errors import HeadAddressInvalid
from cluster.findings import Finding
from cluster.head_checks import check_head, check_token_file, check_versions
from cluster.head_probe import Answer, HeadFacts, encode_key, parse_head, read_versions
from cluster.ray_token import Token
from tests.cluster.machines import VERSIONS

ADDRESS = "192.0.2.1:6379"
TOKEN = Token("secret", "/home/u/.ray/auth_token", 0o600)


def _head(without: Answer, with_token: Answer | None = None, **more: str) -> HeadFacts:
    return HeadFacts(ADDRESS, without, with_token, **more)


def _failures(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "failure"]


def test_closed_head_that_takes_our_token_is_fine() -> None:
    findings = check_head(_head(Answer.REFUSED, Answer.TAKEN), TOKEN, is_local_only=False)
    assert {finding.level for finding in findings} == {"ok"}


@pytest.mark.parametrize(
    ("head", "token", "what", "mend"),
    [
        (_head(Answer.NONE, reason="Connection refused"), TOKEN, "Connection refused", "ray start --head"),
        (_head(Answer.OTHER, reason="no head"), TOKEN, "no head", "HOST:6379"),
        (_head(Answer.REFUSED), None, "there is none here", "chmod 600"),
        (_head(Answer.REFUSED, Answer.REFUSED), TOKEN, "is not the cluster's", "copy ~/.ray/auth_token"),
        (_head(Answer.TAKEN, Answer.TAKEN), TOKEN, "token authentication is off", "ray get-auth-token"),
        (_head(Answer.TAKEN), None, "token authentication is off", "RAY_AUTH_MODE=token"),
    ],
)
def test_each_fault_of_a_head_is_one_failure_with_its_mend(
    head: HeadFacts, token: Token | None, what: str, mend: str
) -> None:
    (finding,) = _failures(check_head(head, token, is_local_only=False))
    assert what in finding.what
    assert mend in finding.mend


def test_open_head_that_only_this_machine_reaches_is_allowed() -> None:
    assert not _failures(check_head(_head(Answer.TAKEN), None, is_local_only=True))


def test_no_finding_shows_the_token() -> None:
    facts = [_head(without, with_token) for without in Answer for with_token in (None, *Answer)]
    findings = [finding for head in facts for finding in check_head(head, TOKEN, is_local_only=False)]
    assert "secret" not in repr((findings, TOKEN, check_token_file(TOKEN)))


def test_token_file_that_others_may_read_is_a_warning() -> None:
    finding = check_token_file(Token("secret", "/t", 0o640))
    assert (finding.level, finding.mend) == ("warning", "chmod 600 /t")
    assert check_token_file(TOKEN).level == "ok"
    assert check_token_file(None).level == "warning"
    assert check_token_file(None, "unreadable").level == "failure"


@pytest.mark.parametrize(
    ("ray", "python", "level", "found"),
    [
        ("2.60.0", "3.11.9", "patch", ["ok"]),
        ("2.61.0", "3.11.9", "patch", ["failure"]),
        ("2.60.0", "3.11.4", "patch", ["failure"]),
        ("2.60.0", "3.11.4", "minor", ["warning"]),
        ("2.60.0", "3.12.9", "minor", ["failure"]),
        ("2.61.0", "3.12.9", "patch", ["failure", "failure"]),
        ("", "", "patch", []),
    ],
)
def test_versions_are_compared_as_ray_will(ray: str, python: str, level: str, found: list[str]) -> None:
    head = _head(Answer.REFUSED, Answer.TAKEN, ray_version=ray, python_version=python)
    assert [finding.level for finding in check_versions(head, VERSIONS, level)] == found


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("head", "head:6379"),
        (" head:7000 ", "head:7000"),
        ("192.0.2.1", "192.0.2.1:6379"),
        ("[2001:db8::1]:7000", "[2001:db8::1]:7000"),
        ("2001:db8::1", "[2001:db8::1]:6379"),
        ("[::1]", "[::1]:6379"),
    ],
)
def test_head_is_read_with_and_without_a_port(text: str, address: str) -> None:
    assert parse_head(text) == address


@pytest.mark.parametrize(
    "text", ["", ":6379", "head:0", "head:65536", "head:x", "a b", "ray://head:10001", "h\n:1"]
)
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(HeadAddressInvalid, match="is no HOST or HOST:PORT"):
        parse_head(text)


def test_versions_are_read_from_ray_s_own_answer() -> None:
    from ray.core.generated import gcs_service_pb2

    request = gcs_service_pb2.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
    assert encode_key() == request.SerializeToString()
    value = b'{"ray_version": "2.60.0", "python_version": "3.11.9", "more": {}}'
    assert read_versions(gcs_service_pb2.InternalKVGetReply(value=value).SerializeToString()) == (
        "2.60.0",
        "3.11.9",
    )


@pytest.mark.parametrize(
    "reply",
    [b"", b"{", b"}{", b"[1]", b'{"ray_version": 3}', b'{"ray_version": "\\u001b[2J"}', b"\xff\xfe{}"],
)
def test_what_is_no_versions_is_none(reply: bytes) -> None:
    assert read_versions(reply) == ("", "")
