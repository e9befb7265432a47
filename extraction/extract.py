"""Turns a checkpoint into an expert store: `sage-moe extract`.

Never holds a tensor. The store is written in a hidden workspace beside its destination, synced, and renamed at the end,
so that a final name always means a finished store. A run that was killed leaves its workspace to the next one of the
same source and options, which continues behind the last finished step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from extraction.atomic_folder import atomic_folder, check_vacant
from extraction.copying import Copier, Meter, Progress
from extraction.errors import HubRefused, OptionRefused, PathRefused
from extraction.expert_index import INDEX_NAME, write_expert_index
from extraction.journal import Journal, is_journal_of
from extraction.manifest import (
    FORMAT_VERSION,
    ROLES,
    Component,
    Dtype,
    ExpertRecord,
    FileEntry,
    LeftOut,
    Manifest,
    RecordPart,
    TensorEntry,
    version_for,
    write_manifest,
)
from extraction.plan import ExtractionPlan, SourceTensor, plan_extraction
from extraction.quantised_parts import NOT_QUANTISED, QuantisedParts
from extraction.safetensors_file import ALIGNMENT
from extraction.selection import Selection, select
from extraction.shards import FolderShards, ShardSupply
from extraction.store_files import StoreFiles, describe, lay_out, source_bytes

BYTES_PER_ROW = 512
"""Most that an expert takes in the index, or a step's owner in the journal."""
BYTES_PER_TENSOR = 2048
"""Most that a backbone tensor takes in the manifest."""


@dataclass(frozen=True)
class ExtractionReport:
    """What was written."""

    root: Path
    kind: str
    num_layers: int
    num_experts: int
    weight_bytes: int
    """Of the source."""
    left_out: LeftOut | None
    resumed_bytes: int
    """Of these, what a killed run had done already."""


@dataclass(frozen=True)
class Job:
    """An extraction, decided and checked."""

    plan: ExtractionPlan
    left_out: LeftOut | None
    layout: StoreFiles | None
    """None where no weights are copied."""
    quantised: QuantisedParts = NOT_QUANTISED

    @property
    def kind(self) -> Literal["copied", "indexed"]:
        return "indexed" if self.layout is None else "copied"

    @property
    def space_needed(self) -> int:
        """Bytes of disk that the store takes at most, all files rounded up to whole blocks."""
        plan = self.plan
        small = sum(map(len, plan.small_files.values()))
        # The manifest holds the configuration twice, indented.
        described = 8 * len(plan.small_files["config.json"]) + BYTES_PER_TENSOR * plan.num_backbone_tensors
        indexed = small + described + BYTES_PER_ROW * len(plan.experts)
        num_files = len(plan.small_files) + len(plan.components) + 8
        if self.layout is None:
            return indexed + ALIGNMENT * num_files
        journal = BYTES_PER_ROW * len(self.layout.owners)
        num_files += 2 * len(self.layout.files)
        return indexed + journal + self.layout.nbytes + ALIGNMENT * num_files


def extract(
    source: Path,
    dest: Path,
    *,
    index_only: bool = False,
    selection: Selection | None = None,
    dtype: Dtype | None = None,
    quantised: QuantisedParts = NOT_QUANTISED,
    progress: Progress | None = None,
    shards: ShardSupply | None = None,
) -> ExtractionReport:
    """Write the store of the checkpoint `source` to `dest`, which must not exist.

    index_only copies no weights: the store then points into the original shards, which must stay where they are.
    selection: of layers and components; a store that lacks some is partial and says so. dtype: of all weights in the
    store; None keeps each as it is. quantised: parts that become codes, of the checkpoint's values.
    shards: where weights are read from instead of `source`, which then needs headers.
    Raises an ExtractionError; whatever is raised, nothing is left behind, except for what a supply of shards that
    failed needs to go on.
    """
    check_vacant(dest)
    job = prepare(source, index_only=index_only, selection=selection, dtype=dtype, quantised=quantised)
    if job.layout is None:
        _check_nameable(source)
    supply = shards or FolderShards(source)
    key = _fingerprint(job, supply)
    resumed = 0
    with atomic_folder(
        dest,
        job.space_needed + supply.peak_bytes,
        can_continue=lambda workspace: is_journal_of(workspace, key),
        kept_on=(HubRefused,),
    ) as root:
        supply.use(root.parent)
        if job.layout is None:
            components, records = _index_in_place(job.plan)
        else:
            digests, resumed = _copy_weights(job.layout, root, supply, key, progress)
            components, records = describe(job.plan, job.layout, digests, quantised)
        _write_descriptions(job, root, components, records)
    layers = {(key.component, key.layer) for key in job.plan.experts}
    weight_bytes = job.plan.weight_bytes
    return ExtractionReport(
        dest, job.kind, len(layers), len(job.plan.experts), weight_bytes, job.left_out, resumed
    )


def prepare(
    source: Path,
    *,
    index_only: bool = False,
    selection: Selection | None = None,
    dtype: Dtype | None = None,
    quantised: QuantisedParts = NOT_QUANTISED,
) -> Job:
    """Read headers and descriptions; decide what goes where. Raises an ExtractionError."""
    if index_only and dtype is not None:
        raise OptionRefused("--dtype", "an index points to the weights as they are; leave out --index-only")
    if index_only and quantised.name is not None:
        raise OptionRefused(
            "--quantize", "an index points to the weights as they are; leave out --index-only"
        )
    plan, left_out = select(plan_extraction(source), selection or Selection())
    layout = None if index_only else lay_out(plan, dtype, quantised)
    return Job(plan, left_out, layout, quantised)


def _check_nameable(source: Path) -> None:
    """The manifest of an index holds the folder's name, as JSON text."""
    try:
        str(source.resolve()).encode()
    except UnicodeEncodeError as error:
        raise PathRefused(str(source), "cannot be indexed: its name is no UTF-8") from error


def _fingerprint(job: Job, shards: ShardSupply) -> str:
    """Of all that decides about a byte of the store: two runs with the same one write the same."""
    digest = hashlib.sha256()
    if job.layout is None:
        return digest.hexdigest()
    facts = {
        "version": FORMAT_VERSION,
        "shards": shards.identity(job.layout.shards),
        "small_files": {n: hashlib.sha256(raw).hexdigest() for n, raw in job.plan.small_files.items()},
        "files": {name: file.nbytes for name, file in job.layout.files.items()},
        "left_out": job.left_out and job.left_out.model_dump(mode="json"),
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for pieces in job.layout.owners.values():
        for piece in pieces:
            digest.update(repr(piece).encode())
    return digest.hexdigest()


def _copy_weights(
    layout: StoreFiles, root: Path, shards: ShardSupply, key: str, progress: Progress | None
) -> tuple[dict[str, str], int]:
    """Returns the digests of all owners, and how many bytes of the source were there already."""
    workspace = root.parent
    journal = Journal(workspace, key)
    resumed = 0
    try:
        total = sum(source_bytes(step.pieces) for step in layout.steps)
        with Copier(root, shards, Meter(total, progress)) as copier:
            for file in layout.files.values():
                copier.prepare(file)
            for index, step in enumerate(layout.steps):
                if step.name in journal.done and copier.is_done(step, journal.done[step.name]):
                    resumed += source_bytes(step.pieces)
                else:
                    journal.add(step.name, copier.copy(step))
                is_last = step is layout.steps[-1] or layout.steps[index + 1].shard != step.shard
                if is_last and shards.discards:
                    copier.wait_until_synced()
                    shards.release(step.shard)
            return _digests(layout, journal, copier), resumed
    finally:
        journal.close()


def _digests(layout: StoreFiles, journal: Journal, copier: Copier) -> dict[str, str]:
    """Those of the journal, and for owners that came from several shards those of all their bytes."""
    digests: dict[str, str] = {}
    straddling = {}
    num_pieces: dict[tuple[str, str], int] = {}
    for step in layout.steps:
        for piece in step.pieces:
            num_pieces[step.name, piece.owner] = num_pieces.get((step.name, piece.owner), 0) + 1
    for step in layout.steps:
        for owner, digest in journal.done[step.name].items():
            if num_pieces[step.name, owner] == len(layout.owners[owner]):
                digests[owner] = digest
            else:
                straddling[owner] = layout.owners[owner]
    return digests | copier.digest(straddling)


def _index_in_place(plan: ExtractionPlan) -> tuple[tuple[Component, ...], list[ExpertRecord]]:
    records = []
    for key, parts in plan.experts.items():
        gate, up, down = (
            RecordPart(role, part.file, part.offset, part.nbytes)
            for role, part in zip(ROLES, parts, strict=True)
        )
        records.append(ExpertRecord(key, parts[0].dtype, None, (gate, up, down)))
    components = tuple(
        Component(
            name=part.name,
            config=dict(part.config),
            tensors=tuple(_entry(name, tensor) for name, tensor in part.backbone.items()),
        )
        for part in plan.components
    )
    return components, records


def _entry(name: str, tensor: SourceTensor) -> TensorEntry:
    return TensorEntry(
        name=name,
        source=tensor.name,
        file=tensor.file,
        dtype=tensor.dtype,
        shape=tensor.shape,
        offset=tensor.offset,
        nbytes=tensor.nbytes,
        sha256=None,
    )


def _write_descriptions(
    job: Job, root: Path, components: tuple[Component, ...], records: Sequence[ExpertRecord]
) -> None:
    plan = job.plan
    files = {}
    for name, content in plan.small_files.items():
        (root / name).write_bytes(content)
        files[name] = FileEntry(nbytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    files[INDEX_NAME] = write_expert_index(root, records)
    manifest = Manifest(
        format_version=version_for(job.quantised),
        family=plan.family,
        kind=job.kind,
        source_root=str(plan.source.resolve()) if job.kind == "indexed" else None,
        left_out=job.left_out,
        quantization=job.quantised.experts,
        backbone_quantization=job.quantised.backbone,
        head_quantization=job.quantised.head,
        config=plan.config,
        generation_config=plan.generation_config,
        components=components,
        files=files,
    )
    write_manifest(root, manifest)
