"""A token's way from HTTP to an expert and back, in one process and without Ray: every stage is the real one.

What Ray adds (processes, placement, supervision) is in tests/gateway/test_deployment.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from experts.remote_directory import RemoteDirectory
from experts.roster import Roster
from experts.store import ExpertStore
from gateway.http.app import build_app
from gateway.http.settings import GatewaySettings
from gateway.local.generate import generate
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.loading import EngineOptions, load_engine
from router.service import RouterService
from tests.expert_servers import PATIENT, SECRET, expert_servers
from tests.one_process import OneProcessClient

MODEL = "stories"
PROMPT = "There was once a miller who"
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def roster(stories_store: Path) -> Iterator[Roster]:
    """Two expert groups, each behind a socket as in an actor."""
    with expert_servers(stories_store, 2) as listed:
        yield listed


async def _ask(store_root: Path, roster: Roster, body: dict[str, Any]) -> tuple[httpx.Response, int]:
    """The answer to a completion, and how many expert rows crossed a socket for it."""
    store = ExpertStore.open(store_root)
    loaded = load_engine(
        store, EngineOptions(), lambda worker: RemoteDirectory(worker, roster, SECRET, limits=PATIENT)
    )
    service = RouterService(loaded)
    tokenizer = TextTokenizer.from_folder(store_root)
    facts = (MODEL, loaded.config.max_position_embeddings, loaded.config.vocab_size, 1)
    settings = GatewaySettings.from_manifest(store.manifest, *facts)
    app = build_app(
        settings, tokenizer, ChatTemplate.from_folder(store_root, tokenizer), OneProcessClient(service)
    )
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            answer = await client.post("/v1/completions", json=body)
    finally:
        service.close()
    return answer, loaded.directory.stats().remote_rows


@pytest.mark.parametrize("is_streamed", [False, True])
def test_token_travels_from_http_to_expert_and_back(
    stories_store: Path, roster: Roster, is_streamed: bool
) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "seed": 3, "stream": is_streamed}
    answer, remote_rows = asyncio.run(_ask(stories_store, roster, body))
    assert answer.status_code == 200, answer.text
    local = generate(stories_store, PROMPT, {"max_tokens": 20, "seed": 3}, EngineOptions())
    assert _text(answer, is_streamed) == local.text
    positions = (
        len(local.prompt_token_ids) + len(local.token_ids) - 1
    )  # the last token is not computed further
    assert remote_rows == positions * 6 * 8  # layers, experts per token


def _text(answer: httpx.Response, is_streamed: bool) -> str:
    if not is_streamed:
        return str(answer.json()["choices"][0]["text"])
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


def test_readme_follows_the_token_through_files_that_exist() -> None:
    """The section names each file of the way, in order; a renamed file must be renamed there too."""
    section = README.read_text(encoding="utf-8").split("## A token's way")[1].split("\n## ")[0]
    files = [
        word.strip("`")
        for word in section.split()
        if word.startswith("`") and word.strip("`,.;:)").endswith(".py")
    ]
    files = [file.strip("`,.;:()") for file in files]
    assert len(files) >= 10
    for file in files:
        assert (README.parent / file).is_file(), f"README names {file}"


def test_the_tree_has_one_line_for_every_file() -> None:
    tree = (README.parent / "docs" / "tree.md").read_text(encoding="utf-8").split("```")[1]
    listed, folders = [], [""]
    for line in tree.strip().splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            listed.append("/".join(folders))
    packages = ("extraction", "experts", "router", "cluster", "gateway", "benchmarks")
    paths = [path for package in packages for path in (README.parent / package).rglob("*.py")]
    files = [path.relative_to(README.parent).as_posix() for path in paths if path.name != "__init__.py"]
    assert sorted(listed) == sorted(files), "each once"
