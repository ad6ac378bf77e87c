"""Records the traces: eSpeak NG speaks the questions, PocketSphinx listens while they are spoken.

Run `python -m benchmarks.traces.record` with the packages `espeakng-loader`, `numpy` and
`pocketsphinx` installed; it takes some minutes and needs neither a network nor a sound card.
All times are audio time: however fast the machine, the same packages write the same file.
"""

import argparse
import ctypes
import json
import platform
import random
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from benchmarks.traces.trace import RECORDED, questions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

SAMPLE_RATE = 16_000
BYTES_PER_SECOND = 2 * SAMPLE_RATE
#: The voices of eSpeak NG that this recogniser's acoustic model understands best.
VOICES = ("en-us+klatt3", "en-us+klatt4", "en-us+klatt5", "en-us+klatt6")
WORDS_PER_MINUTE = (140, 175)
PITCH = (38, 62)
#: Milliseconds of audio per call of the recogniser, as telephony and browser clients send them.
CHUNKS_MS = (20, 40, 60, 100)
SILENCE_BEFORE_SECONDS = (0.3, 0.8)
SILENCE_AFTER_SECONDS = 2.0
PEAK = 0.3
NOISE_RMS = 10.0
#: A turn is over when the voice detector has heard no speech for so long.
ENDPOINTING_SECONDS = 0.7
#: Spoken once by each voice first, so that the recogniser knows the channel as within a call.
GREETING = "Good morning, I have a question about my account."


@dataclass(frozen=True, slots=True)
class Speaker:
    """How one question is spoken, and in what pieces its audio arrives."""

    voice: str
    words_per_minute: int
    pitch: int
    chunk_ms: int


class Hypothesis(Protocol):
    """What the recogniser believes was said so far."""

    @property
    def hypstr(self) -> str: ...


class Recogniser(Protocol):
    """The part of `pocketsphinx.Decoder` that streaming needs."""

    def start_utt(self) -> None: ...
    def process_raw(self, data: bytes) -> object: ...
    def hyp(self) -> Hypothesis | None: ...
    def end_utt(self) -> None: ...


class VoiceDetector(Protocol):
    """The part of `pocketsphinx.Vad` that end-pointing needs."""

    @property
    def frame_bytes(self) -> int: ...
    def is_speech(self, frame: bytes) -> bool: ...


@dataclass(frozen=True, slots=True)
class Heard:
    """One utterance as heard; pairs are (audio seconds, text)."""

    partials: tuple[tuple[float, str], ...]
    final: tuple[float, str]
    speech_end: float


class Endpointer:
    """Tells when trailing silence has lasted long enough to call the turn over."""

    def __init__(self, detector: VoiceDetector, patience_seconds: float) -> None:
        self._detector = detector
        self._patience_seconds = patience_seconds
        self._rest = b""
        self._heard_bytes = 0
        self._speech_end_bytes = 0

    @property
    def speech_end_seconds(self) -> float:
        """Where the latest speech ended; 0.0 before any."""
        return self._speech_end_bytes / BYTES_PER_SECOND

    def hear(self, audio: bytes) -> bool:
        """Take the next audio; return whether the turn is over."""
        self._rest += audio
        size = self._detector.frame_bytes
        while len(self._rest) >= size:
            frame, self._rest = self._rest[:size], self._rest[size:]
            self._heard_bytes += size
            if self._detector.is_speech(frame):
                self._speech_end_bytes = self._heard_bytes
        silence = (self._heard_bytes - self._speech_end_bytes) / BYTES_PER_SECOND
        return self._speech_end_bytes > 0 and silence >= self._patience_seconds


def speaker_of(line: int, seed: int) -> Speaker:
    """The speaker of the question at `line`, whatever the other questions are."""
    dice = random.Random(f"{seed}/{line}")
    return Speaker(
        voice=dice.choice(VOICES),
        words_per_minute=dice.randint(*WORDS_PER_MINUTE),
        pitch=dice.randint(*PITCH),
        chunk_ms=dice.choice(CHUNKS_MS),
    )


def chunks(audio: bytes, milliseconds: int) -> "Iterator[bytes]":
    """Cut 16-bit audio into pieces as a client would send them; the last may be shorter."""
    size = BYTES_PER_SECOND * milliseconds // 1000
    return (audio[start : start + size] for start in range(0, len(audio), size))


def listen(audio: bytes, chunk_ms: int, recogniser: Recogniser, endpointer: Endpointer) -> Heard:
    """Stream the audio into the recogniser; note each change of its interim transcript."""
    recogniser.start_utt()
    partials: list[tuple[float, str]] = []
    shown = ""
    now = 0.0
    sent = 0
    for chunk in chunks(audio, chunk_ms):
        recogniser.process_raw(chunk)
        sent += len(chunk)
        now = round(sent / BYTES_PER_SECOND, 3)
        text = _text(recogniser.hyp())
        if text and text != shown:
            partials.append((now, text))
            shown = text
        if endpointer.hear(chunk):
            break
    else:
        raise ValueError(f"no end of speech in {now} s of audio")
    recogniser.end_utt()
    return Heard(
        tuple(partials), (now, _text(recogniser.hyp())), round(endpointer.speech_end_seconds, 3)
    )


def resampled(
    samples: "NDArray[np.float64]", rate: int, half_width: int = 32
) -> "NDArray[np.float64]":
    """Bring samples at `rate` Hz to `SAMPLE_RATE`, through a windowed sinc that does not alias."""
    cutoff = 0.95 * min(1.0, SAMPLE_RATE / rate)
    at = np.arange(len(samples) * SAMPLE_RATE // rate) * rate / SAMPLE_RATE
    nearby = np.floor(at).astype(np.int64)[:, None] + np.arange(1 - half_width, half_width + 1)
    distance = at[:, None] - nearby
    window = 0.5 + 0.5 * np.cos(np.pi * distance / half_width)
    weights = cutoff * np.sinc(cutoff * distance) * window
    result: NDArray[np.float64] = (np.pad(samples, half_width)[nearby + half_width] * weights).sum(
        1
    )
    return result


def in_a_quiet_room(speech: "NDArray[np.float64]", dice: np.random.Generator) -> bytes:
    """Put silence around the speech and a little noise under all of it; 16-bit little-endian."""
    before = np.zeros(int(dice.uniform(*SILENCE_BEFORE_SECONDS) * SAMPLE_RATE))
    after = np.zeros(int(SILENCE_AFTER_SECONDS * SAMPLE_RATE))
    loud = speech * (PEAK * 32767 / np.abs(speech).max())
    room = np.concatenate([before, loud, after])
    return (room + dice.normal(0.0, NOISE_RMS, len(room))).astype("<i2").tobytes()


class ESpeak:
    """The eSpeak NG library that `espeakng-loader` brings along, speaking into memory."""

    _RETRIEVAL, _UTF8, _RATE, _PITCH, _BY_CHARACTER = 1, 1, 1, 3, 1

    def __init__(self) -> None:
        import espeakng_loader  # type: ignore[import-not-found,import-untyped,unused-ignore]

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.rate: int = self._library.espeak_Initialize(self._RETRIEVAL, 0, data, 0)
        if self.rate <= 0:
            raise RuntimeError("eSpeak NG does not start")
        self._library.espeak_Info.restype = ctypes.c_char_p
        self.version: str = self._library.espeak_Info(None).decode().split()[0]
        self._spoken: list[bytes] = []
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = callback(self._take)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, speaker: Speaker) -> "NDArray[np.float64]":
        """Speak the text; return its samples at `rate` Hz, between -32768 and 32767."""
        self._spoken.clear()
        if self._library.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
            raise RuntimeError(f"eSpeak NG has no voice {speaker.voice}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._library.espeak_SetParameter(self._RATE, speaker.words_per_minute, 0)
        self._library.espeak_SetParameter(self._PITCH, speaker.pitch, 0)
        encoded = text.encode()
        self._library.espeak_Synth(
            encoded,
            ctypes.c_size_t(len(encoded) + 1),
            0,
            self._BY_CHARACTER,
            0,
            self._UTF8,
            None,
            None,
        )
        self._library.espeak_Synchronize()
        return np.frombuffer(b"".join(self._spoken), dtype=np.int16).astype(np.float64)

    def _take(self, samples: Any, count: int, _events: object) -> int:
        if samples and count > 0:
            self._spoken.append(ctypes.string_at(samples, 2 * count))
        return 0


def record(asked: "Sequence[str]", seed: int) -> "Iterator[dict[str, object]]":
    """Speak and recognise each question; yield the header, then one record per question."""
    import pocketsphinx  # type: ignore[import-not-found,import-untyped,unused-ignore]

    voice = ESpeak()
    streaming = pocketsphinx.Decoder(fwdflat=False, bestpath=False, loglevel="FATAL")
    rescoring = pocketsphinx.Decoder(loglevel="FATAL")

    def hear(text: str, speaker: Speaker, dice: np.random.Generator) -> tuple[Heard, Heard]:
        audio = in_a_quiet_room(resampled(voice.say(text, speaker), voice.rate), dice)
        first, second = (
            listen(
                audio,
                speaker.chunk_ms,
                decoder,
                Endpointer(pocketsphinx.Vad(pocketsphinx.Vad.MEDIUM_STRICT), ENDPOINTING_SECONDS),
            )
            for decoder in (streaming, rescoring)
        )
        return first, second

    channel: dict[str, str] = {}
    initial = streaming.get_cmn()
    for name in VOICES:
        for decoder in (streaming, rescoring):
            decoder.set_cmn(initial)
        hear(GREETING, Speaker(name, 155, 50, 60), np.random.default_rng(seed))
        channel[name] = streaming.get_cmn()

    yield header(seed, voice.version)
    for line, question in enumerate(asked):
        speaker = speaker_of(line, seed)
        for decoder in (streaming, rescoring):
            decoder.set_cmn(channel[speaker.voice])
        heard, rescored = hear(question, speaker, np.random.default_rng([seed, line]))
        yield {
            "question": question,
            **asdict(speaker),
            "speech_end": heard.speech_end,
            "partials": heard.partials,
            "final": heard.final,
            "rescored": rescored.final[1],
        }


def header(seed: int, espeak_version: str) -> dict[str, object]:
    """Where the records come from; the first line of the file."""
    return {
        "synthetic": True,
        "what": "interim and final transcripts of synthesised speech, times in audio seconds",
        "command": f"python -m benchmarks.traces.record --seed {seed}",
        "packages": {name: version(name) for name in ("pocketsphinx", "espeakng-loader", "numpy")},
        "espeak_ng": espeak_version,
        "machine": platform.machine(),
        "recogniser": {
            "model": "the package's en-us, acoustic and language model",
            "final": "first pass only (fwdflat=no, bestpath=no)",
            "rescored": "all three passes, the package's default",
            "endpointing_seconds": ENDPOINTING_SECONDS,
            "voice_detector": "pocketsphinx.Vad, MEDIUM_STRICT",
        },
        "speech": {
            "voices": VOICES,
            "words_per_minute": WORDS_PER_MINUTE,
            "pitch": PITCH,
            "chunks_ms": CHUNKS_MS,
            "silence_before_seconds": SILENCE_BEFORE_SECONDS,
            "noise_rms": NOISE_RMS,
            "greeting": GREETING,
        },
    }


def main(arguments: "Sequence[str] | None" = None) -> None:
    """Record all questions into a file."""
    parser = argparse.ArgumentParser(description="Record partial-transcript traces.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, help="record only so many questions")
    parser.add_argument("--out", type=Path, default=RECORDED)
    given = parser.parse_args(arguments)
    asked = questions()[: given.limit]
    with given.out.open("w", encoding="utf-8") as out:
        for entry in record(asked, given.seed):
            out.write(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n")


def _text(hypothesis: Hypothesis | None) -> str:
    return hypothesis.hypstr.strip() if hypothesis else ""


if __name__ == "__main__":
    main()
