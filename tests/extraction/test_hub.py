"""Downloads from a stand-in of the model hub on the loopback address: nothing here asks a real one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from experts.store import ExpertStore
from extraction.errors import DiskFull, ExtractionError, HubRefused, TensorsMissing
from extraction.hub import HubId, parse_hub_id
from extraction.hub_extract import HubShards
from extraction.plan import SHARD_INDEX
from extraction.verify import verify
from gateway.cli import app
from gateway.stores.source import hub_id_of
from tests.hub_stand_in import COMMIT, Hub, running_hub


@pytest.fixture
def hub(copy: Path) -> Iterator[Hub]:
    """Serves the sharded checkpoint as acme/tiny, with files beside it that nobody should ask for."""
    for name in ("pytorch_model.bin", "modeling.py", "weights.pkl", "README.md", ".gitattributes"):
        (copy / name).write_bytes(b"never")
    with running_hub({"acme/tiny": copy}) as running:
        yield running


Run = Callable[..., Result]


@pytest.fixture
def run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, with the stand-in for its hub and with empty caches."""
    from huggingface_hub import constants

    for name in [name for name in os.environ if name.upper().endswith("_PROXY")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("SAGE_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what is resumed is whole chunks
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the library's next attempt
    monkeypatch.setattr("extraction.hub.RETRIES_AFTER_S", (0.0, 0.0))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def _refused(result: Result, kind: type[Exception], *words: str) -> None:
    assert isinstance(result.exception, kind), result.output
    message = str(result.exception)
    assert message.isprintable()
    for word in words:
        assert word in message


def _holds(store: Path, checkpoint: Path) -> bool:
    return verify(store, checkpoint).num_experts == 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-30B-A3B", HubId("Qwen/Qwen3-30B-A3B", None)),
        ("a/b@main", HubId("a/b", "main")),
        (f"a/b@{COMMIT}", HubId("a/b", COMMIT)),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        *[
            (text, None)
            for text in ("stories", "a/b/c", "./a", "../a", "/a/b", "a/../b", "a/b@", "a/b@..", "a//b")
        ],
        *[
            (text, None)
            for text in ("~/a", "a/b c", "a/b\n", "-a/b", "a/.b", "a--b/c", "x" * 200 + "/b", "", "ü/b")
        ],
    ],
)
def test_only_names_that_a_hub_could_have_are_hub_ids(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected


def test_what_is_here_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id_of("acme/tiny") == HubId("acme/tiny", None)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme/tiny").symlink_to("nowhere")
    assert hub_id_of("acme/tiny") is None
    assert hub_id_of("stories") is None


def test_hub_id_is_extracted_and_only_what_is_needed_is_asked_for(
    hub: Hub, run: Run, copy: Path, tmp_path: Path
) -> None:
    done = run("extract", "acme/tiny", str(tmp_path / "store"))
    assert done.exit_code == 0, done.exception
    assert re.search(r"acme/tiny: .* of shards; at most .* of disk \(.* free in ", done.stderr)
    assert _holds(tmp_path / "store", copy)
    assert set(hub.downloads()) == {
        path.name
        for path in copy.iterdir()
        if path.suffix in (".json", ".safetensors") or path.name in ("merges.txt", "chat_template.jinja")
    }
    assert all(COMMIT in path for _, path, _ in hub.requests if "/resolve/" in path and path[-5:] != ".json")
    # A second one finds the shards in the library's cache: only their headers are read again.
    before = dict(hub.bytes_sent)
    assert run("extract", f"acme/tiny@{COMMIT}", str(tmp_path / "again")).exit_code == 0
    for shard in copy.glob("*.safetensors"):
        size = shard.stat().st_size
        assert hub.bytes_sent[shard.name] - before[shard.name] <= min(size, 1 << 16)


def test_partial_extraction_downloads_only_the_shards_it_needs(
    hub: Hub, run: Run, copy: Path, tmp_path: Path
) -> None:
    done = run("extract", "acme/tiny", str(tmp_path / "store"), "--layers", "1")
    assert done.exit_code == 0, done.exception
    blobs = [path for path in (tmp_path / "hf").rglob("*.safetensors") if path.is_symlink()]
    assert 0 < len(blobs) < len(list(copy.glob("*.safetensors")))


def test_discarded_shards_take_the_disk_of_one_at_a_time(
    hub: Hub, run: Run, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, kept = HubShards.release, []

    def watched(self: HubShards, shard: str) -> None:
        (workspace,) = tmp_path.glob(".store.*.partial")
        kept.append([path.name for path in workspace.rglob("*.safetensors") if "shards" in path.parts])
        release(self, shard)

    monkeypatch.setattr(HubShards, "release", watched)
    done = run("extract", "acme/tiny", "store", "--discard-source")
    assert done.exit_code == 0, done.exception
    assert kept == [[shard.name] for shard in sorted(copy.glob("*.safetensors"))]
    assert _holds(tmp_path / "store", copy)
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("option", ["", "--discard-source"])
def test_connection_that_breaks_in_a_shard_is_resumed_inside_it(
    hub: Hub, run: Run, copy: Path, tmp_path: Path, option: str
) -> None:
    shard = max(copy.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    hub.cuts[shard.name] = [20_000, 5_000]
    hub.start_cuts[shard.name] = [100]
    done = run("extract", "acme/tiny", "store", *option.split())
    assert done.exit_code == 0, done.exception
    assert not hub.cuts[shard.name]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(shard.name)]
    assert {f"bytes={20_000 // 4096 * 4096}-", "bytes=20480-"} <= set(ranges)
    assert _holds(tmp_path / "store", copy)


def test_download_that_fails_for_good_goes_on_in_the_next_run(
    hub: Hub, run: Run, copy: Path, tmp_path: Path
) -> None:
    shards = sorted(copy.glob("*.safetensors"))
    hub.cuts[shards[5].name] = [0] * 20
    _refused(
        run("extract", "acme/tiny", "store", "--discard-source"), HubRefused, "acme/tiny could not be read"
    )
    assert not (tmp_path / "store").exists()
    before = dict(hub.bytes_sent)
    hub.cuts.clear()
    done = run("extract", "acme/tiny", "store", "--discard-source")
    assert done.exit_code == 0, done.exception
    assert "by an earlier run" in done.stdout
    for shard in shards[:5]:
        again = hub.bytes_sent[shard.name] - before[shard.name]
        assert again <= min(shard.stat().st_size, 1 << 16), "a consumed shard was downloaded again"
    assert _holds(tmp_path / "store", copy)
    assert not list(tmp_path.glob(".store.*"))


@pytest.mark.parametrize("option", ["", "--discard-source"])
def test_disk_that_is_too_small_is_said_before_a_weight_is_downloaded(
    hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    for module in ("hub_extract", "atomic_folder"):
        monkeypatch.setattr(f"extraction.{module}.free_bytes", lambda folder: 600_000)
    result = run("extract", "acme/tiny", "store", *option.split())
    _refused(result, DiskFull, "600000 free", "missing")
    assert "of disk (0.6 MiB free in" in result.stderr
    assert not [asked for _, path, asked in hub.requests if path.endswith(".safetensors") and asked is None]


def test_discarding_needs_less_disk(hub: Hub, run: Run, copy: Path) -> None:
    def peak(*options: str) -> float:
        result = run("extract", "acme/tiny", f"store{len(options)}", *options)
        found = re.search(r"at most ([0-9.]+) MiB of disk", result.stderr)
        assert found
        return float(found[1])

    weights = sum(path.stat().st_size for path in copy.glob("*.safetensors")) / 2**20
    assert peak() - peak("--discard-source") > 0.6 * weights


def test_incomplete_checkpoint_is_refused_before_its_weights_are_downloaded(
    hub: Hub, run: Run, copy: Path
) -> None:
    table = json.loads((copy / SHARD_INDEX).read_text())
    shards = set(table["weight_map"].values())
    dropped = max(shards)
    table["weight_map"] = {name: file for name, file in table["weight_map"].items() if file != dropped}
    (copy / SHARD_INDEX).write_text(json.dumps(table))
    for command in (["extract", "acme/tiny", "store"], ["generate", "acme/tiny", "--prompt", "x"]):
        _refused(run(*command), TensorsMissing, "incomplete")
    sizes = {path.name: path.stat().st_size for path in copy.glob("*.safetensors")}
    assert not [asked for _, path, asked in hub.requests if Path(path).name in sizes and asked is None]


def test_hub_id_generates_without_being_extracted_and_works_offline_later(
    hub: Hub, run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--prompt-ids", "1,2,3", "--max-tokens", "5", "--temperature", "0")
    local = run("generate", str(copy), *arguments)
    first = run("generate", "acme/tiny", *arguments)
    assert first.exit_code == 0, first.exception
    assert first.stdout == local.stdout
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    second = run("generate", "acme/tiny", *arguments)
    assert (second.exit_code, second.stdout) == (0, first.stdout), second.exception
    _refused(run("generate", "acme/other", *arguments), HubRefused, "acme/other", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("acme/none", "no public model at"),
        ("acme/tiny@v9", "no such revision"),
        (f"acme/tiny@{'f' * 40}", "no such revision"),
    ],
)
def test_name_that_the_hub_does_not_have_is_one_line(run: Run, name: str, reason: str) -> None:
    _refused(run("extract", name, "store"), HubRefused, name, reason)
    _refused(run("generate", name, "--prompt", "x"), HubRefused, name, reason)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/x.safetensors", "a\x1b[2J.safetensors"])
def test_file_that_would_lead_out_of_its_folder_is_refused(hub: Hub, run: Run, name: str) -> None:
    hub.extra = (name,)
    _refused(run("extract", "acme/tiny", "store"), HubRefused, "refused name")


@pytest.mark.parametrize("size", [-1, 1 << 62, "1", None])
def test_size_that_is_none_is_refused(hub: Hub, run: Run, copy: Path, size: object) -> None:
    hub.sizes[min(copy.glob("*.safetensors")).name] = size  # type: ignore[assignment]
    _refused(run("extract", "acme/tiny", "store"), HubRefused, "size of")


@pytest.mark.parametrize("change", [-1, 1, 5000])
def test_file_of_another_size_than_promised_is_refused(
    hub: Hub, run: Run, copy: Path, tmp_path: Path, change: int
) -> None:
    shard = min(copy.glob("*.safetensors"))
    hub.sizes[shard.name] = shard.stat().st_size + change
    _refused(run("extract", "acme/tiny", "store"), ExtractionError, shard.name)
    assert not (tmp_path / "store").exists()


def test_description_beyond_its_limit_is_not_downloaded(hub: Hub, run: Run) -> None:
    hub.sizes["tokenizer.json"] = 1 << 40
    _refused(run("extract", "acme/tiny", "store"), HubRefused, "tokenizer.json", "size of")
    assert "tokenizer.json" not in hub.downloads()


def test_discarding_is_refused_for_a_local_folder(run: Run, copy: Path) -> None:
    before = sorted(os.listdir(copy))
    result = run("extract", str(copy), "store", "--discard-source")
    assert result.exit_code == 2
    assert "nobody's own files" in result.output
    assert sorted(os.listdir(copy)) == before


def test_hub_id_is_indexed_in_the_library_s_cache(hub: Hub, run: Run, copy: Path, tmp_path: Path) -> None:
    done = run("extract", "acme/tiny", "index", "--index-only")
    assert done.exit_code == 0, done.exception
    store = ExpertStore.open(tmp_path / "index")
    assert store.manifest.source_root is not None
    assert Path(store.manifest.source_root).is_relative_to((tmp_path / "hf").resolve())
    assert store.read_expert(store.expert_keys()[0]).numel()
    store.close()
