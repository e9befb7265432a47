"""`tokenizer.json` for checkpoints that have only `vocab.json` and `merges.txt`, as Qwen's have.

Byte-level BPE as `Qwen2Tokenizer` of `transformers` builds it: NFC, Qwen's pattern of words, bytes, then the added
tokens at their ids. Other classes of tokenizers are left alone. Called by `extraction.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from extraction.errors import CheckpointDamaged
from extraction.strict_json import parse_object

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
SETTINGS, ADDED = "tokenizer_config.json", "added_tokens.json"
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
MAX_ADDED = 1 << 16
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Source: `transformers`, tokenization_qwen2."""


def built_tokenizer(files: Mapping[str, bytes], model_type: str) -> bytes | None:
    """The content of `tokenizer.json`; None where the checkpoint has one, or nothing of which to build Qwen's.

    Raises CheckpointDamaged.
    """
    if TOKENIZER_FILE in files or VOCABULARY not in files or MERGES not in files:
        return None
    settings = parse_object(files[SETTINGS], SETTINGS) if SETTINGS in files else {}
    is_qwen = settings.get("tokenizer_class") in CLASSES
    if not is_qwen and not ("tokenizer_class" not in settings and model_type.startswith("qwen")):
        return None
    tokenizer = _byte_level_bpe(_vocabulary(files[VOCABULARY]), _merges(files[MERGES]))
    listed, source = settings.get("added_tokens_decoder"), SETTINGS
    if listed is None:
        listed, source = _older_list(files, settings), ADDED
    _add_tokens(tokenizer, _added_tokens(listed, source), source)
    return tokenizer.to_str().encode()


def _byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises bare Exception for everything
        raise CheckpointDamaged(MERGES, f"does not fit {VOCABULARY}: {error}") from error
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, added: Mapping[int, AddedToken], source: str) -> None:
    """Each at its id. Ids between them that nothing has get placeholders, since the library counts on."""
    from tokenizers import AddedToken

    first, last = tokenizer.get_vocab_size(), max(added, default=-1)
    if last - first > MAX_ADDED:
        raise CheckpointDamaged(
            source, f"an added token has id {last}, far behind the {first} of {VOCABULARY}"
        )
    for token_id in sorted({*added, *range(first, last)}):
        token = added.get(token_id) or AddedToken(f"<|reserved_token_{token_id}|>", special=True)
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            reason = f"added token {token.content[:200]!r} cannot have id {token_id}: it is in use"
            raise CheckpointDamaged(source, reason)


def _older_list(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`added_tokens.json`, from text to id, in the form of `added_tokens_decoder`."""
    older = parse_object(files[ADDED], ADDED) if ADDED in files else {}
    special = _named_tokens(settings)
    return {str(id_): {"content": text, "special": text in special} for text, id_ in older.items()}


def _added_tokens(listed: Any, source: str) -> dict[int, AddedToken]:
    """By id, from the form of `added_tokens_decoder`."""
    from tokenizers import AddedToken

    if not isinstance(listed, dict):
        raise CheckpointDamaged(source, "added_tokens_decoder is no object")
    added = {}
    for id_, facts in listed.items():
        text = facts.get("content") if isinstance(facts, dict) else None
        if not (id_.isascii() and id_.isdigit() and len(id_) < 10) or not isinstance(text, str) or not text:
            raise CheckpointDamaged(source, f"added token {id_[:200]!r} has no whole number or no content")
        is_special = bool(facts.get("special"))
        flags = {name: bool(facts.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        is_normalised = bool(facts.get("normalized", not is_special))
        added[int(id_)] = AddedToken(text, special=is_special, normalized=is_normalised, **flags)
    return added


def _named_tokens(settings: Mapping[str, Any]) -> set[str]:
    """Those that the settings give a role."""
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    values = [settings.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad")]
    values += extra if isinstance(extra, list) else list(extra.values()) if isinstance(extra, dict) else []
    texts = [value.get("content") if isinstance(value, dict) else value for value in values]
    return {text for text in texts if isinstance(text, str)}


def _vocabulary(raw: bytes) -> dict[str, int]:
    vocabulary = parse_object(raw, VOCABULARY, has_unique_keys=True)
    ids = list(vocabulary.values())
    if not all(type(id_) is int for id_ in ids) or sorted(ids) != list(range(len(ids))):
        raise CheckpointDamaged(VOCABULARY, "its ids are not 0, 1, 2, ... each once")
    return vocabulary


def _merges(raw: bytes) -> list[tuple[str, str]]:
    try:
        lines = raw.decode().split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointDamaged(MERGES, "is no UTF-8 text") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.rstrip("\r").partition(" ")
        if not (left and space and right) or " " in right:
            raise CheckpointDamaged(MERGES, f"line {number} is no pair of tokens")
        merges.append((left, right))
    return merges
