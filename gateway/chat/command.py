"""`sage-moe chat`: a conversation in the terminal, with a running service or with a store in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from gateway.budget_options import (
    DeviceOption,
    ExpertBudgetOption,
    HostBudgetOption,
    SpeechBudgetOption,
    SpeechFramesOption,
    VoiceOption,
    read_memory,
    read_speech_choice,
)
from gateway.command_line import announce

if TYPE_CHECKING:
    from gateway.chat.loop import ChatBackend
    from gateway.local.speech import SpeechChoice

Number = Optional[int]  # noqa: UP045 - typer reads the annotation at run time
Word = Optional[str]  # noqa: UP045


def chat(
    target: Annotated[
        str, typer.Argument(metavar="[STORE|URL]", help="A store (see serve), or where a service answers.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        Word, typer.Option(help="With URL: the model to ask; default: the service's first.")
    ] = None,
    system: Annotated[Word, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[
        Number, typer.Option(min=1, help="Most tokens of an answer; default: what fits.")
    ] = None,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, max=2.0, help="0 is greedy; default: the checkpoint's."),
    ] = None,
    seed: Annotated[
        Number, typer.Option(min=0, max=2**64 - 1, help="Seed of the sampling noise; default: random.")
    ] = None,
    speech: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Speak every answer: a WAV file each, in this folder."),
    ] = None,
    voice: VoiceOption = None,
    max_speech_frames: SpeechFramesOption = None,
    speech_budget: SpeechBudgetOption = None,
    dtype: Annotated[Word, typer.Option(help="With STORE: float32 or bfloat16; default: as stored.")] = None,
    device: DeviceOption = None,
    expert_budget: ExpertBudgetOption = None,
    host_budget: HostBudgetOption = None,
    api_key: Annotated[
        Word,
        typer.Option(
            metavar="KEY|@FILE", help="With URL: key to send; default: the first of SAGE_MOE_API_KEYS."
        ),
    ] = None,
) -> None:
    """Chat in the terminal: /help, /reset, /system, /image, /audio, /save, /quit; Ctrl-C stops an answer."""
    from gateway.chat.loop import Conversation, run_chat
    from gateway.chat.sound_folder import SoundFolder
    from gateway.chat.view import PlainTerminal

    wish = read_speech_choice(speech is not None, voice, max_speech_frames, speech_budget)
    sounds = None if speech is None else SoundFolder(speech)
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    terminal = PlainTerminal()
    memory = (device, expert_budget, host_budget)
    with _backend(target, model, dtype, memory, api_key, sampling, wish) as backend:
        terminal.note(f"{backend.model} at {target}; /help lists commands, Ctrl-D ends")
        run_chat(backend, terminal, Conversation(system), sounds=sounds)


@contextmanager
def _backend(
    target: str,
    model: str | None,
    dtype: str | None,
    memory: tuple[str | None, str | None, str | None],
    api_key: str | None,
    sampling: dict[str, Any],
    speech: SpeechChoice | None,
) -> Iterator[ChatBackend]:
    if target.startswith(("http://", "https://")):
        if dtype is not None or any(option is not None for option in memory):
            raise typer.BadParameter("--dtype, --device and budgets go with a STORE")
        if speech is not None and speech.budget is not None:
            raise typer.BadParameter("--speech-budget goes with a STORE")
        from gateway.chat.remote import connect
        from gateway.http.api_keys import client_key

        with connect(
            target, client_key(api_key, os.environ), model, sampling | speech_fields(speech)
        ) as remote:
            yield remote
        return
    if model is not None or api_key is not None:
        raise typer.BadParameter("--model and --api-key go with a URL")
    from gateway.chat.local import open_store
    from gateway.stores.source import model_name, resolve_runnable
    from router.loading import EngineOptions

    chosen = read_memory(*memory, announce)
    with open_store(
        resolve_runnable(target, announce=announce),
        model_name(target),
        sampling,
        EngineOptions(dtype=dtype, device=chosen.device, has_media=True),
        chosen.experts,
        chosen.host,
        speech,
    ) as local:
        yield local


def speech_fields(speech: SpeechChoice | None) -> dict[str, Any]:
    """Of a request to a service, for its answer to be spoken."""
    if speech is None:
        return {}
    voice = {} if speech.voice is None else {"voice": speech.voice}
    frames = {} if speech.max_frames is None else {"sage": {"max_speech_frames": speech.max_frames}}
    return {"modalities": ["text", "audio"], "audio": {"format": "pcm16", **voice}, **frames}
