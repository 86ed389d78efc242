"""Encoding and decoding of videos that arrive piece by piece."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from taehv.errors import UserError
from taehv.model import TAEHV, FrameMemory
from taehv.variants import (
    CHUNK_DROPPED_LATENTS,
    CHUNK_FRAMES,
    CHUNK_LEAD_FRAMES,
)


class StreamingTAEHV:
    """Encode and decode a stream as `encode_video` and `decode_video` would the whole.

    Memory does not grow with the length of the stream, and no gradients are kept.
    Encoding and decoding are independent streams: use either or both.

        stream = StreamingTAEHV(model)
        for frames_N1CHW in video:
            for latents_N1CHW in stream.encode(frames_N1CHW):
                show(stream.decode(latents_N1CHW))
        show(stream.flush())

    Args:
        model: any variant, preview switches included.
        total_latents: count of latents that will be decoded. Only CogVideoX needs it,
            whose first frames depend on whether the count is even.
        trim: in place of `total_latents`, whether the first frames are trimmed: True
            for an odd count of latents, False for an even one.
    """

    def __init__(
        self,
        model: TAEHV,
        total_latents: int | None = None,
        trim: bool | None = None,
    ) -> None:
        self.model = model
        self.variant = model.variant
        # Only the parity of the count matters, and trim tells just that.
        self._told_latents = int(trim) if trim is not None else total_latents
        self.reset()

    def reset(self) -> None:
        """Forget everything and begin a new video."""
        self._reset_encoder()
        self._reset_decoder()

    def _reset_encoder(self) -> None:
        self._encoder_memory = FrameMemory()
        self._frames_in = 0
        self._last_frame_N1CHW: Tensor | None = None
        self._latents_held: deque[Tensor] = deque()

    def _reset_decoder(self) -> None:
        self._decoder_memory = FrameMemory()
        self._latents_in = 0
        self._raw_frames = 0
        self._frames_held: deque[tuple[int, Tensor]] = deque()

    @torch.no_grad()
    def encode(self, frames_NTCHW: Tensor) -> list[Tensor]:
        """Take the next frames.

        Args:
            frames_NTCHW: RGB in [0, 1], one or more frames; see `encode_video`.

        Returns:
            The latents that became ready, each N 1 C H W. MiniMax-H3 holds back the
            last three, which the end of a video would drop.

        Raises:
            ValueError: if the shape does not fit.
        """
        self.model.check_frames(frames_NTCHW)
        for frame_N1CHW in frames_NTCHW.split(1, 1):
            self._encode_frame(frame_N1CHW)
        self._last_frame_N1CHW = frame_N1CHW.clone()
        ready = len(self._latents_held) - self._dropped_latents
        return [self._latents_held.popleft() for _ in range(ready)]

    def _encode_frame(self, frame_N1CHW: Tensor) -> None:
        if self.variant.trim == "chunks" and self._frames_in % CHUNK_FRAMES == 0:
            self._encoder_memory = FrameMemory()
            for _ in range(CHUNK_LEAD_FRAMES):
                self._run_encoder(torch.zeros_like(frame_N1CHW))
        self._run_encoder(frame_N1CHW)
        self._frames_in += 1

    def _run_encoder(self, frame_N1CHW: Tensor) -> None:
        x_N1CHW = self.model.fold_patches(frame_N1CHW)
        latents_NTCHW = self.model.encoder(x_N1CHW, self._encoder_memory)
        if latents_NTCHW.shape[1]:
            self._latents_held.append(latents_NTCHW)

    @property
    def _dropped_latents(self) -> int:
        return CHUNK_DROPPED_LATENTS if self.variant.trim == "chunks" else 0

    @torch.no_grad()
    def decode(self, latents_NTCHW: Tensor) -> list[Tensor]:
        """Take the next latents.

        Args:
            latents_NTCHW: one or more latents; see `decode_video`.

        Returns:
            The frames that became ready, each N 1 3 H W, RGB in [0, 1]. MiniMax-H3
            holds back up to twelve, which the end of a video would drop.

        Raises:
            ValueError: if the shape does not fit, or if CogVideoX was not told how to
                trim.
        """
        self.model.check_latents(latents_NTCHW)
        if self.variant.trim == "parity" and self._told_latents is None:
            raise UserError(
                f"{self.model.variant_name} trims by the count of latents; give "
                "StreamingTAEHV total_latents= or trim="
            )
        ready = []
        for latents_N1CHW in latents_NTCHW.split(1, 1):
            ready += self._decode_latent(latents_N1CHW)
        return ready

    def _decode_latent(self, latents_N1CHW: Tensor) -> list[Tensor]:
        self._latents_in += 1
        x_NTCHW = self.model.decoder(latents_N1CHW, self._decoder_memory)
        for x_N1CHW in x_NTCHW.split(1, 1):
            if not self.variant.is_trimmed(self._raw_frames, *self._alignment):
                self._frames_held.append((self._raw_frames, x_N1CHW))
            self._raw_frames += 1
        ready = []
        while self._frames_held and not self._is_held_back(self._frames_held[0][0]):
            _, x_N1CHW = self._frames_held.popleft()
            ready.append(self.model.unfold_patches(x_N1CHW).clamp(0, 1))
        return ready

    def _is_held_back(self, frame: int) -> bool:
        return self.variant.is_held_back(frame, *self._alignment)

    @property
    def _alignment(self) -> tuple[int, int]:
        told = self.variant.trim == "parity"
        latents = self._told_latents if told else self._latents_in
        return latents, self.model.time_upscale

    def flush_encoder(self) -> list[Tensor]:
        """End the video that is encoded and return its last latents.

        Its end is padded by repeating the last frame, as in `encode_video`.
        """
        chunks = self.variant.trim == "chunks"
        multiple = CHUNK_FRAMES if chunks else self.variant.time_factor
        ready = []
        for _ in range(-self._frames_in % multiple):
            ready += self.encode(self._last_frame_N1CHW)
        self._reset_encoder()
        return ready

    def flush_decoder(self) -> list[Tensor]:
        """End the video that is decoded and return its last frames.

        There are none: what is held back is what the end of a video drops.
        """
        self._reset_decoder()
        return []

    def flush(self) -> list[Tensor]:
        """End the video: decode the encoder's last latents and return the frames."""
        ready = []
        for latents_N1CHW in self.flush_encoder():
            ready += self.decode(latents_N1CHW)
        return ready + self.flush_decoder()
