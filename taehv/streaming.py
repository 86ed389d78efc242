"""Encoding and decoding of videos that arrive piece by piece."""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

from taehv.errors import UserError
from taehv.model import TAEHV
from taehv.replay import Continuation, Graphing
from taehv.variants import (
    CHUNK_DROPPED_LATENTS,
    CHUNK_FRAMES,
    CHUNK_LEAD_FRAMES,
)


class StreamingTAEHV:
    """Encode and decode a stream as `encode_video` and `decode_video` would the whole.

    Memory does not grow with the length of the stream, and no gradients are kept. The
    frames or latents of one call are computed at once: more of them are faster, and
    take more memory.
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
        graph: replay calls as CUDA graphs, which give the same and do not wait for
            Python: "auto" those on a GPU that are small enough to gain, True all there.
            The first two calls of a shape run as they are. Weights may change in place;
            where load_state_dict(assign=True) has replaced them, make a new stream.
    """

    def __init__(
        self,
        model: TAEHV,
        total_latents: int | None = None,
        trim: bool | None = None,
        graph: Graphing = "auto",
    ) -> None:
        self.model = model
        self.variant = model.variant
        # Only the parity of the count matters, and trim tells just that.
        self._told_latents = int(trim) if trim is not None else total_latents
        self._encoder = Continuation(model.encoder, graph)
        self._decoder = Continuation(model.decoder, graph)
        self.reset()

    def reset(self) -> None:
        """Forget everything and begin a new video."""
        self._reset_encoder()
        self._reset_decoder()

    def _reset_encoder(self) -> None:
        self._encoder.reset()
        self._frames_in = 0
        self._last_frame_N1CHW: Tensor | None = None
        self._latents_held: deque[Tensor] = deque()

    def _reset_decoder(self) -> None:
        self._decoder.reset()
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
        self._last_frame_N1CHW = frames_NTCHW[:, -1:].clone()
        while frames_NTCHW.shape[1]:
            piece_NTCHW = frames_NTCHW[:, : self._frames_to_chunk_end]
            self._run_encoder(piece_NTCHW)
            frames_NTCHW = frames_NTCHW[:, piece_NTCHW.shape[1] :]
        ready = len(self._latents_held) - self._dropped_latents
        return [self._latents_held.popleft() for _ in range(ready)]

    @property
    def _frames_to_chunk_end(self) -> int | None:
        """How many frames may be encoded with the memory of those before them."""
        if self.variant.trim != "chunks":
            return None
        return CHUNK_FRAMES - self._frames_in % CHUNK_FRAMES

    def _run_encoder(self, frames_NTCHW: Tensor) -> None:
        x_NTCHW = self.model.fold_patches(frames_NTCHW)
        if self.variant.trim == "chunks" and self._frames_in % CHUNK_FRAMES == 0:
            self._encoder.reset()
            x_NTCHW = F.pad(x_NTCHW, (0, 0, 0, 0, 0, 0, CHUNK_LEAD_FRAMES, 0))
        latents_NTCHW = self._encoder(x_NTCHW)
        if latents_NTCHW.shape[1]:
            self._latents_held.extend(latents_NTCHW.split(1, 1))
        self._frames_in += frames_NTCHW.shape[1]

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
        self._latents_in += latents_NTCHW.shape[1]
        x_NTCHW = self._decoder(latents_NTCHW)
        frames_NTCHW = self.model.unfold_patches(x_NTCHW).clamp(0, 1)
        for frame_N1CHW in frames_NTCHW.split(1, 1):
            if not self.variant.is_trimmed(self._raw_frames, *self._alignment):
                self._frames_held.append((self._raw_frames, frame_N1CHW))
            self._raw_frames += 1
        ready = []
        while self._frames_held and not self._is_held_back(self._frames_held[0][0]):
            ready.append(self._frames_held.popleft()[1])
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
