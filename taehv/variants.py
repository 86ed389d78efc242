"""The published TAEHV variants and how each aligns frames with latents."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

# MiniMax-H3 codes 17 frames, led by 3 black ones, into 5 latents, and drops the
# last 3 latents of a video (FL2VA/video_vae/klvae.py in MiniMaxAI/MiniMax-H3).
CHUNK_FRAMES = 17
CHUNK_LEAD_FRAMES = 3
CHUNK_LATENTS = 5
CHUNK_DROPPED_LATENTS = 3


@dataclass(frozen=True)
class CountRule:
    """Which counts of frames, or of pixels, are legal: `period * k + a remainder`."""

    period: int
    remainders: tuple[int, ...] = (0,)
    least: int = 1

    def __str__(self) -> str:
        """The rule as a formula: "8k or 8k + 1"."""
        return " or ".join(
            f"{self.period}k" + (f" + {remainder}" if remainder else "")
            for remainder in self.remainders
        )

    def allows(self, count: int) -> bool:
        """Whether a count is legal."""
        return count >= self.least and count % self.period in self.remainders

    def nearest(self, count: int) -> str:
        """The legal counts next to one that is not: "8 or 9"."""
        below = filter(self.allows, range(count, self.least - 1, -1))
        above = filter(self.allows, itertools.count(max(count, self.least)))
        return " or ".join(str(n) for n in [*itertools.islice(below, 1), next(above)])


FRAME_RULES: dict[str, CountRule] = {
    "cogvideox": CountRule(8, (0, 1)),
    "hunyuanvideo": CountRule(4, (1,)),
    "hunyuanvideo1_5": CountRule(4, (1,)),
    "wan": CountRule(4, (1,)),
    "ltx2": CountRule(8, (1,)),
    "minimax_h3": CountRule(CHUNK_FRAMES, (5,), least=CHUNK_FRAMES + 5),
}
"""Lengths of a clip, in frames, that each built-in kind of teacher codes whole.

Of other lengths diffusers' classes drop frames silently, raise, or decode to another
length.
"""


@dataclass(frozen=True)
class Variant:
    """One member of the family: its shape and its alignment of frames and latents.

    The decoder turns every latent into `upscale` raw frames, `upscale` being the time
    factor unless a preview switch lowers it, and `trim` says which raw frames of a
    video are returned:

    - "causal": all but the first `upscale - 1`, so that latent 0 gives frame 0 alone
      and latent i ends at frame `i * time_factor`.
    - "parity" (CogVideoX): all of an even number of latents, else as "causal".
    - "chunks" (MiniMax-H3): all but the first `upscale - 1` of each 5 latents' frames
      and, in the last such group, those of its last 3 latents.

    Source: madebyollin/taehv, `decode_video` and `_decode_h3_video`.
    """

    latent_channels: int
    latent_space: str
    patch_size: int = 1
    decoder: Literal["base", "super", "wide"] = "base"
    time_stages: tuple[bool, bool, bool] = (True, True, False)
    """Which encoder stages halve the frame rate; the decoder mirrors them."""
    trim: Literal["causal", "parity", "chunks"] = "causal"
    teacher: str = ""
    """Kind of the reference VAE, a key of FRAME_RULES; empty where none is built in."""

    @property
    def time_factor(self) -> int:
        """Frames a latent."""
        return 2 ** sum(self.time_stages)

    @property
    def space_factor(self) -> int:
        """Pixels a latent, in height and in width."""
        return 8 * self.patch_size

    def latents_of(self, frames: int) -> int:
        """Count of latents that encoding `frames` frames gives."""
        if self.trim == "chunks":
            chunks = math.ceil(frames / CHUNK_FRAMES)
            return chunks * CHUNK_LATENTS - CHUNK_DROPPED_LATENTS
        return math.ceil(frames / self.time_factor)

    def is_trimmed(self, frame: int, latents: int, upscale: int | None = None) -> bool:
        """Whether raw decoder frame `frame` is a lead-in that is never returned.

        `latents` is the video's count of latents; only its parity matters, and that
        for "parity" alone.
        """
        upscale = upscale or self.time_factor
        if self._is_untrimmed(latents):
            return False
        if self.trim == "chunks":
            frame %= CHUNK_LATENTS * upscale
        return frame < upscale - 1

    def is_held_back(
        self, frame: int, latents: int, upscale: int | None = None
    ) -> bool:
        """Whether raw frame `frame` is returned only if more than `latents` follow."""
        if self.trim != "chunks":
            return False
        last_group = (latents - 1) // CHUNK_LATENTS * CHUNK_LATENTS
        shown_latents = last_group + CHUNK_LATENTS - CHUNK_DROPPED_LATENTS
        return frame >= shown_latents * (upscale or self.time_factor)

    def kept_frames(self, latents: int, upscale: int | None = None) -> list[slice]:
        """Runs of raw decoder frames that decoding `latents` latents returns.

        The published MiniMax-H3 code also returns up to four black frames where the
        count of latents is 1 modulo 5; these are left out here.
        """
        upscale = upscale or self.time_factor
        kept = [
            not self.is_trimmed(frame, latents, upscale)
            and not self.is_held_back(frame, latents, upscale)
            for frame in range(latents * upscale)
        ]
        before, after = [False, *kept], [*kept, False]
        edges = [i for i in range(len(after)) if before[i] != after[i]]
        return [
            slice(start, stop)
            for start, stop in zip(edges[::2], edges[1::2], strict=True)
        ]

    def frames_of(self, latents: int, upscale: int | None = None) -> int:
        """Count of frames that decoding `latents` latents returns."""
        upscale = upscale or self.time_factor
        lead_in = upscale - 1
        if self.trim == "chunks":
            groups, last = divmod(latents - 1, CHUNK_LATENTS)
            shown = min(last + 1, CHUNK_LATENTS - CHUNK_DROPPED_LATENTS)
            whole = CHUNK_LATENTS * upscale - lead_in
            return groups * whole + max(0, shown * upscale - lead_in)
        return latents * upscale - (0 if self._is_untrimmed(latents) else lead_in)

    def _is_untrimmed(self, latents: int) -> bool:
        return self.trim == "parity" and latents % 2 == 0

    def padded_frames(self, frames: int) -> int:
        """The least count of frames that decode to `frames` or more.

        Repeating the last frame up to it brings every frame back.
        """
        longer = itertools.count(frames)
        return next(n for n in longer if self.frames_of(self.latents_of(n)) >= frames)

    def latents_of_frames(self, latents: int) -> list[int]:
        """Of each frame that decoding `latents` latents returns, which latent it is of.

        Latents before that one have a part in the frame, too, through the memory.
        """
        factor = self.time_factor
        runs = self.kept_frames(latents)
        return [raw // factor for run in runs for raw in range(run.start, run.stop)]

    def target_frames(self, frames: int) -> int:
        """How many leading input frames the decoded frames are compared with.

        Of `frames` frames encoded and decoded, output frame i is to equal input
        frame i for every i below this count.
        """
        return min(self.frames_of(self.latents_of(frames)), frames)

    def lead_frames(self, latents: int, lead: int) -> int:
        """How many of the frames of `latents` latents come from the first `lead`.

        Decoding returns these frames first, so that the rest begins at this place.
        """
        raw = lead * self.time_factor
        runs = self.kept_frames(latents)
        return sum(min(run.stop, raw) - run.start for run in runs if run.start < raw)

    def first_frame(self, latent: int) -> int:
        """Number of the frame at which a crop that begins at `latent` begins."""
        if self.trim == "chunks":
            return latent // CHUNK_LATENTS * CHUNK_FRAMES
        return latent * self.time_factor

    def crop_starts(self, latents: int, frames: int) -> range:
        """Where in a window of `latents` latents a crop of `frames` frames may begin.

        A crop that begins at latent a has the latents from a on, as many as
        `latents_of(frames)`, and the frames from `first_frame(a)` on: decoding those
        latents gives those frames. Empty where there is no such crop: it would be
        longer than the window, decode to another count of frames, or, for "parity",
        decode by the rule of the other parity. Crops of "chunks" begin with a chunk.
        """
        cropped = self.latents_of(frames)
        by_other_rule = self.trim == "parity" and (latents - cropped) % 2 == 1
        if by_other_rule or not self.is_exact(frames):
            return range(0)
        step = CHUNK_LATENTS if self.trim == "chunks" else 1
        return range(0, latents - cropped + 1, step)

    def is_exact(self, frames: int) -> bool:
        """Whether as many frames come out of the decoder as went into the encoder."""
        return self.frames_of(self.latents_of(frames)) == frames


_HUNYUAN = {"patch_size": 2, "teacher": "hunyuanvideo1_5"}
_LTX = {"patch_size": 4, "time_stages": (True, True, True), "teacher": "ltx2"}
_WAN = {"patch_size": 2, "teacher": "wan"}

VARIANTS: dict[str, Variant] = {
    "taehv": Variant(16, "HunyuanVideo", teacher="hunyuanvideo"),
    "taecvx": Variant(16, "CogVideoX", trim="parity", teacher="cogvideox"),
    "taew2_1": Variant(16, "Wan 2.1", teacher="wan"),
    "taew2_2": Variant(48, "Wan 2.2", **_WAN),
    "taew2_2_super": Variant(48, "Wan 2.2", decoder="super", **_WAN),
    "taehv1_5": Variant(32, "HunyuanVideo 1.5", **_HUNYUAN),
    "taehv1_5_super": Variant(32, "HunyuanVideo 1.5", decoder="super", **_HUNYUAN),
    "taeltx_2": Variant(128, "LTX-2", **_LTX),
    "taeltx2_3": Variant(128, "LTX-2.3", **_LTX),
    "taeltx2_3_wide": Variant(128, "LTX-2.3", decoder="wide", **_LTX),
    "taeos1_3": Variant(16, "Open-Sora 1.3"),
    "taeh3": Variant(24, "MiniMax-H3", 2, trim="chunks", teacher="minimax_h3"),
}
