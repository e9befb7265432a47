"""A folder in which `sage-moe chat` leaves what was spoken, an answer a file."""

from __future__ import annotations

import itertools
from pathlib import Path

from gateway.media.wav_writing import wav_of
from gateway.output_file import prepare_folder
from router.speech.wish import SAMPLE_BYTES, SAMPLE_RATE


class SoundFolder:
    """Files 0001.wav, 0002.wav and so on, after those that are there, none of which is written over."""

    def __init__(self, path: Path) -> None:
        """Raises FileUnusable."""
        prepare_folder(path)
        names = (file.stem for file in path.glob("*.wav"))
        last = max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)
        self._path, self._numbers = path, itertools.count(last + 1)

    def save(self, samples: bytes) -> str:
        """See SoundKeeper.save."""
        while True:
            path = self._path / f"{next(self._numbers):04}.wav"
            try:
                with path.open("xb") as file:
                    file.write(wav_of(samples))
            except FileExistsError:  # another chat's in the same folder
                continue
            except OSError as error:
                return f"{path} cannot be written: {error.strerror or error}"
            return f"[{len(samples) / SAMPLE_BYTES / SAMPLE_RATE:.1f} s of speech in {path}]"
