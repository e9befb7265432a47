"""What a store speaks with, read from its description: published values, other spellings, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from experts.store import ExpertStore
from extraction.manifest import Component, Manifest
from router.errors import ConfigUnsupported
from router.loading import LoadedEngine
from router.speech.facts import (
    MOST_FRAMES,
    CodecIds,
    SpeechDefaults,
    SpeechFacts,
    TurnIds,
    read_speech_facts,
)


@pytest.fixture(scope="module")
def manifest(omni: LoadedEngine) -> Manifest:
    return omni.store.manifest


def _facts(manifest: Manifest, generation: dict[str, Any] | None = None, **talker: Any) -> SpeechFacts | None:
    """With other values in the talker's configuration, or, by the name of their component, in that of a part."""
    config = copy.deepcopy(manifest.config)
    parts = {component.name: component for component in manifest.components}
    for key, value in talker.items():
        part, _, name = key.rpartition("__")
        if part:
            own = parts[part]
            parts[part] = Component(name=part, config=own.config | {name: value}, tensors=own.tensors)
        else:
            config["talker_config"][key] = value
    changed = {"config": config, "components": tuple(parts.values())}
    if generation is not None:
        changed["generation_config"] = generation
    return read_speech_facts(manifest.model_copy(update=changed))


def test_facts_are_those_of_the_checkpoint(manifest: Manifest) -> None:
    facts = _facts(manifest)
    assert facts is not None
    assert facts.voices == {"chelsie": 120, "ethan": 121, "aiden": 122}
    assert facts.default_voice == "ethan"
    assert (facts.turns.turn_start, facts.turns.user, facts.turns.assistant) == (407, 413, 414)
    assert facts.turns.media == {400, 401, 402}
    assert facts.turns.ends == {408, 511}
    assert (facts.codec.num_codes, facts.codec.vocab_size, facts.codec.end) == (64, 1088, 102)
    assert facts.accept_layer == 1
    assert facts.defaults == SpeechDefaults(MOST_FRAMES, 0.9, 50, 1.0, 1.05)


def test_published_ids_are_taken(manifest: Manifest) -> None:
    """Of Qwen3-Omni-30B-A3B-Instruct, whose configuration names the talker's own ids and leaves the text's out."""
    published = {
        "talker_config": {
            "accept_hidden_layer": 24,
            "num_code_groups": 16,
            "speaker_id": {"chelsie": 2301, "ethan": 2302, "aiden": 2303},
            "codec_pad_id": 2148,
            "codec_bos_id": 2149,
            "codec_eos_token_id": 2150,
            "codec_nothink_id": 2155,
            "codec_think_bos_id": 2156,
            "codec_think_eos_id": 2157,
        },
        "thinker_config": {"audio_token_id": 151675, "image_token_id": 151655, "video_token_id": 151656},
    }
    configs = {
        "thinker": {"num_hidden_layers": 48},
        "talker": {"vocab_size": 3072},
        "code_predictor": {"vocab_size": 2048, "num_code_groups": 16},
        "code2wav": {"codebook_size": 2048, "num_quantizers": 16},
    }
    parts = tuple(Component(name=name, config=config, tensors=()) for name, config in configs.items())
    changed = {"config": published, "components": parts, "generation_config": {}}
    facts = read_speech_facts(manifest.model_copy(update=changed))
    assert facts is not None
    assert facts.turns == TurnIds(
        151644, 872, 77091, 151672, 151673, 151671, frozenset({151655, 151656, 151675}), frozenset({151645})
    )
    assert facts.codec == CodecIds(2048, 2148, 2149, 2150, 2155, 2156, 2157)
    assert facts.accept_layer == 24
    assert facts.defaults == SpeechDefaults(4096, 0.9, 50, 1.0, 1.05)


def test_generation_config_has_the_talker_s_own_defaults(manifest: Manifest) -> None:
    generation = {
        "talker_max_new_tokens": 1500,
        "talker_temperature": 0.7,
        "talker_top_k": 20,
        "talker_top_p": 0.95,
        "talker_repetition_penalty": 1.1,
        "eos_token_id": [5, 6],
    }
    facts = _facts(manifest, generation)
    assert facts is not None
    assert facts.defaults == SpeechDefaults(1500, 0.7, 20, 0.95, 1.1)
    assert facts.turns.ends == {408, 5, 6}
    greedy = _facts(manifest, {"talker_do_sample": False, "talker_max_new_tokens": 99999})
    assert greedy is not None
    assert (greedy.defaults.temperature, greedy.defaults.max_frames) == (0.0, MOST_FRAMES)


def test_first_voice_is_the_default_where_the_usual_one_is_not_there(manifest: Manifest) -> None:
    facts = _facts(manifest, speaker_id={"Nova": 130, "Echo": 131})
    assert facts is not None
    assert facts.voices == {"nova": 130, "echo": 131}
    assert facts.default_voice == "nova"


def test_store_without_a_talker_does_not_speak(manifest: Manifest, stories_store: Any) -> None:
    silent = tuple(part for part in manifest.components if part.name != "code2wav")
    assert read_speech_facts(manifest.model_copy(update={"components": silent})) is None
    store = ExpertStore.open(stories_store)
    assert read_speech_facts(store.manifest) is None
    store.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_code_groups": 32}, "num_code_groups: is 32; spoken are frames of 16 codes"),
        ({"code_predictor__num_code_groups": 8}, "code_predictor_config.num_code_groups: is 8"),
        ({"code2wav__num_quantizers": 4}, "num_quantizers: is 4"),
        ({"code2wav__codebook_size": 65}, "codebook_size: is 65, the talker has 64 codes"),
        ({"talker__vocab_size": 1024}, "the talker has 0 codes"),
        ({"codec_eos_token_id": 12}, "codec_eos_token_id: 12 is none of the ids from 64 to 1087"),
        ({"codec_bos_id": "x"}, "codec_bos_id: 'x' is no token id"),
        ({"speaker_id": {}}, "speaker_id: names no voice"),
        ({"speaker_id": None}, "speaker_id: names no voice"),
        ({"speaker_id": {"ethan": 1088}}, "'ethan' is outside the vocabulary of 1088"),
        ({"accept_hidden_layer": 3}, "accept_hidden_layer: 3 is not below 3"),
        ({"accept_hidden_layer": 0}, "accept_hidden_layer: 0 is not a whole number from 1"),
        ({"generation": {"talker_temperature": "hot"}}, "talker_temperature: is not a number"),
        ({"generation": {"talker_top_p": 2}}, "talker_top_p: is 2, outside 0 to 1"),
        ({"generation": {"eos_token_id": True}}, "eos_token_id: True is no token id"),
    ],
)
def test_values_that_cannot_be_spoken_with_are_refused(
    manifest: Manifest, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigUnsupported, match=reason):
        _facts(manifest, **change)
