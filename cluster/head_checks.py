"""Whether this machine may join a head, or use its cluster: from facts to findings. Pure.

Called by `cluster.joining` (a service on a running cluster), `sage-moe join` and `sage-moe doctor`.
"""

from __future__ import annotations

from cluster.findings import Finding, failure, ok, warning
from cluster.head_probe import Answer, HeadFacts
from cluster.machine_facts import Versions
from cluster.ray_token import Token

COPY_TOKEN = (
    "copy ~/.ray/auth_token from the head to ~/.ray/auth_token here, then chmod 600 ~/.ray/auth_token"
)
CLOSE_RAY = (
    "on the head: ray get-auth-token --generate, then start Ray again on every node with RAY_AUTH_MODE=token "
    "and the same ~/.ray/auth_token"
)
FIRST_HEAD = "on the head: ray get-auth-token --generate; RAY_AUTH_MODE=token ray start --head --port=6379"


def check_head(head: HeadFacts, token: Token | None, is_local_only: bool) -> list[Finding]:
    """Whether it answers, is closed to strangers, and takes our token.

    is_local_only: whether only this machine reaches it, so that strangers do not.
    """
    where = head.address
    if head.without_token is Answer.NONE:
        mend = f"{FIRST_HEAD}; let the machines reach each other on all ports"
        return [failure(where, f"the head does not answer ({head.reason})", mend)]
    if head.without_token is Answer.OTHER:
        return [
            failure(
                where, head.reason, "name the head's own address, HOST:6379 unless it was given another port"
            )
        ]
    findings = [ok(where, "the head answers")]
    if head.is_open:
        findings.append(_open(where, is_local_only))
    elif head.with_token is Answer.TAKEN:
        findings.append(ok(where, "calls without the cluster's token are refused, ours is taken"))
    elif token is None:
        findings.append(failure(where, "the cluster wants its token and there is none here", COPY_TOKEN))
    else:
        findings.append(failure(where, f"the token of {token.source} is not the cluster's", COPY_TOKEN))
    return findings


def _open(where: str, is_local_only: bool) -> Finding:
    if is_local_only:
        return ok(where, "calls need no token, and only this machine can make them")
    what = "Ray's token authentication is off: everybody who reaches the head can run code on the cluster"
    return failure(where, what, CLOSE_RAY)


def check_token_file(token: Token | None, problem: str = "") -> Finding:
    """problem: why what is there cannot be read."""
    if problem:
        return failure("here", problem, COPY_TOKEN)
    if token is None:
        mend = f"{COPY_TOKEN}; on a head that has none yet: ray get-auth-token --generate"
        return warning("here", "no token for Ray", mend)
    if not token.is_private:
        what = f"other users of this machine may read the token in {token.source}"
        return warning("here", what, f"chmod 600 {token.source}")
    return ok("here", f"a token in {token.source}")


def check_versions(head: HeadFacts, here: Versions, match_level: str = "patch") -> list[Finding]:
    """What Ray itself demands of a node that joins, said in advance.

    match_level: `patch` or `minor`, how far Python's versions must agree (RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL).
    """
    if not head.ray_version or not head.python_version:
        return []
    findings = []
    if head.ray_version != here.ray:
        what = f"Ray is {here.ray} here and {head.ray_version} at the head"
        findings.append(failure("here", what, f"pip install 'ray[data,serve]=={head.ray_version}'"))
    is_same_minor = _minor(head.python_version) == _minor(here.python)
    if head.python_version == here.python:
        if not findings:
            findings.append(ok("here", f"Ray {here.ray} and Python {here.python}, as at the head"))
    elif is_same_minor and match_level == "minor":
        what = f"Python is {here.python} here and {head.python_version} at the head"
        findings.append(warning("here", what, f"install Python {head.python_version}"))
    else:
        what = f"Python is {here.python} here and {head.python_version} at the head"
        mend = f"make the environment anew with Python {head.python_version}"
        if is_same_minor:
            mend += ", or set RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor on every node"
        findings.append(failure("here", what, mend))
    return findings


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
