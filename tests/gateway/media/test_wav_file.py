"""Sound from WAV files: every coding, every rate, and files that are damaged or too long."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from gateway.media.decoder import MediaDecoder
from gateway.media.errors import MediumRefused
from gateway.media.resampling import resample
from gateway.media.wav_file import RATES, decode_wav
from router.media.facts import MediaFacts, SoundFacts
from router.media.items import SAMPLE_RATE
from tests.gateway.media.files import tones, wav_file

DECODER = MediaDecoder(MediaFacts(None, SoundFacts(1, 128)))


def _float_wav(values: np.ndarray[Any, Any], rate: int, kind: str) -> bytes:
    """With a format chunk that is extended, a chunk between, and a length that a streaming program writes."""
    size = np.dtype(kind).itemsize
    channels = values.shape[1]
    form = struct.pack("<HHIIHH", 0xFFFE, channels, rate, rate * size * channels, size * channels, 8 * size)
    form += struct.pack("<HHIH", 22, 8 * size, 0, 3) + bytes(14)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"LIST" + struct.pack("<I", 3) + b"abc\0"
    return b"RIFF\xff\xff\xff\xffWAVE" + chunks + b"data\xff\xff\xff\xff" + values.astype(kind).tobytes()


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_whole_numbers_come_out_as_they_were_and_channels_are_averaged(bits: int, channels: int) -> None:
    values = tones(0.3, 16_000, channels)
    found, rate = decode_wav(wav_file(values, 16_000, bits), 10)
    assert rate == 16_000
    assert np.abs(found - values.mean(axis=1)).max() < 2.0 / 2 ** (bits - 1) + 1e-6


@pytest.mark.parametrize("kind", ["<f4", "<f8"])
def test_floating_point_comes_out_as_it_was(kind: str) -> None:
    values = tones(0.3, 44_100, 2)
    found, rate = decode_wav(_float_wav(values, 44_100, kind), 10)
    assert rate == 44_100 and len(found) == len(values)
    assert np.abs(found - values.mean(axis=1)).max() < 1e-6


@pytest.mark.parametrize("rate", RATES)
def test_tones_survive_a_change_of_rate(rate: int) -> None:
    def sound(samples_a_second: int) -> np.ndarray[Any, Any]:
        times = np.arange(samples_a_second) / samples_a_second
        return 0.4 * np.sin(2 * np.pi * 440 * times) + 0.3 * np.cos(2 * np.pi * 3100 * times)

    found = resample(sound(rate), rate, SAMPLE_RATE)
    assert len(found) == SAMPLE_RATE
    middle = slice(1000, -1000)  # a filter sees nothing beyond the ends
    assert np.abs(found - sound(SAMPLE_RATE))[middle].max() < 2e-4


@pytest.mark.parametrize("rate", [24_000, 44_100, 96_000])
def test_what_the_lower_rate_cannot_hold_is_left_out(rate: int) -> None:
    times = np.arange(rate) / rate
    found = resample(np.sin(2 * np.pi * 8_900 * times), rate, SAMPLE_RATE)
    assert np.abs(found[1000:-1000]).max() < 1e-3


def _with_field(offset: int, kind: str, value: int) -> bytes:
    content = bytearray(wav_file(tones(0.2, 16_000), 16_000))
    struct.pack_into(kind, content, offset, value)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no WAV file"),
        (b"ID3" + bytes(100), "no WAV file"),
        (wav_file(tones(0.2, 16_000), 16_000)[:36], "no data"),
        (b"RIFF\0\0\0\0WAVEdata\4\0\0\0abcd", "before what says how"),
        (b"RIFF\0\0\0\0WAVEfmt \4\0\0\0abcd", "cut short"),
        (_with_field(20, "<H", 85), "coding 85"),
        (_with_field(22, "<H", 0), "0 channels"),
        (_with_field(22, "<H", 60_000), "60000 channels"),
        (_with_field(24, "<I", 44_099), "44099 samples a second"),
        (_with_field(24, "<I", 0), "0 samples a second"),
        (_with_field(34, "<H", 12), "12 bits"),
        (wav_file(tones(0.05, 16_000), 16_000), "shorter than 0.1 s"),
        (wav_file(np.zeros((301 * 8000, 1)), 8000, 8), "at most 300 s"),
        (_float_wav(np.full((4000, 1), np.nan), 16_000, "<f4"), "no numbers"),
        (_float_wav(np.full((4000, 1), np.inf), 16_000, "<f8"), "no numbers"),
    ],
)
def test_what_cannot_be_used_is_refused_by_what_is_wrong(content: bytes, reason: str) -> None:
    with pytest.raises(MediumRefused, match=reason):
        DECODER.sound(content)


def test_damaged_files_are_refused_or_decoded_and_nothing_else() -> None:
    chance = random.Random(5)
    sound = [wav_file(tones(0.2, 16_000, 2), 16_000), _float_wav(tones(0.2, 16_000), 16_000, "<f4")]
    num_refused = 0
    for _ in range(400):
        content = bytearray(chance.choice(sound))
        for _ in range(chance.randrange(1, 6)):
            content[chance.randrange(min(len(content), 100))] = chance.randrange(256)
        try:
            DECODER.sound(bytes(content[: chance.randrange(1, len(content) + 1)]))
        except MediumRefused:
            num_refused += 1
    assert num_refused > 100


def test_longest_file_takes_no_more_than_256_mebibytes() -> None:
    """In a process of its own, above what it is without: as many samples as a request holds."""
    script = """
import sys
import numpy as np
from tests.gateway.media.files import peak_bytes, tones, wav_file
from tests.gateway.media.test_wav_file import DECODER
DECODER.sound(wav_file(tones(1, 44_100), 44_100))
content = bytearray(wav_file(np.zeros((1, 1)), 192_000, 8)) + bytes(18_000_000)
content[40:44] = (18_000_000).to_bytes(4, "little")
before = peak_bytes()
assert DECODER.sound(bytes(content)).num_samples == 1_500_000
print(peak_bytes() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(run.stdout) < 256 << 20
