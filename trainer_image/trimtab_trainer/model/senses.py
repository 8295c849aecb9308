"""What a processor makes of images, videos and sound: the text that stands for each, and the tensors behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trimtab_api.conditions import Reason
from trimtab_api.v1alpha1.dataset import Multimodal
from trimtab_trainer.data import film, sound
from trimtab_trainer.data.opened import About, Medium, Picture
from trimtab_trainer.data.rows import KINDS, Kind
from trimtab_trainer.endings import Fault

RATE = 2
"""Frames per second of a video where neither the job nor the model says, as the Qwen-VL family learnt them."""
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def settle(processor: Any, asked: Multimodal | None) -> None:
    """Let a processor prepare as the job asks. It is published so.

    Raises Fault(SpecInvalid) for a bound that the processor does not know.
    """
    videos: Any = getattr(processor, "video_processor", None)
    if videos is not None:
        # To be another default in a later release of the library: what was learnt must not change with it.
        if getattr(videos, "cap_pixels_per_frame", False) is None:
            videos.cap_pixels_per_frame = False
        if videos.fps is None and videos.num_frames is None:
            videos.fps = RATE
    if asked is None:
        return
    if asked.max_pixels is not None:
        _bound(getattr(processor, "image_processor", None), asked.max_pixels, "maxPixels")
    if asked.video_max_pixels is not None:
        _bound(videos, asked.video_max_pixels, "videoMaxPixels")
    if asked.video_fps is not None:
        _set(videos, "fps", asked.video_fps, "videoFps")
        videos.num_frames = None
    if asked.video_max_frames is not None:
        _set(videos, "max_frames", asked.video_max_frames, "videoMaxFrames")
        if getattr(videos, "min_frames", None) is not None:
            videos.min_frames = min(videos.min_frames, asked.video_max_frames)


def _bound(part: Any, pixels: int, field: str) -> None:
    size = getattr(part, "size", None)
    if size is None or size["longest_edge"] is None or size["shortest_edge"] is None:
        raise _unknown(field)
    part.size = {"longest_edge": pixels, "shortest_edge": min(pixels, size["shortest_edge"])}


def _set(part: Any, name: str, value: float, field: str) -> None:
    if not hasattr(part, name):
        raise _unknown(field)
    setattr(part, name, value)


def _unknown(field: str) -> Fault:
    problem = f"dataset.multimodal.{field}: the model's processor knows no such bound"
    return Fault(Reason.SPEC_INVALID, problem, "Leave it out, or prepare the files beforehand.")


class Senses:
    """A processor, kind by kind."""

    def __init__(self, processor: Any):
        self._processor = processor
        self.placeholders: dict[Kind, str] = {
            kind: token for kind in KINDS if (token := getattr(processor, f"{kind}_token", None)) is not None
        }
        """What stands for each kind in a template's text."""
        self._texts: dict[About, str] = {}

    @property
    def ids(self) -> dict[Kind, int]:
        """The placeholders as tokens."""
        found = self._processor.tokenizer.convert_tokens_to_ids
        return {kind: int(found(token)) for kind, token in self.placeholders.items()}

    def see_known(self, kinds: set[Kind]) -> None:
        """Raise Fault(ModelInvalid) when the rows show what the processor has no placeholder for."""
        for kind in sorted(kinds - set(self.placeholders)):
            problem = f"the rows show {kind}s, and the model's processor has no placeholder for one"
            raise Fault(Reason.MODEL_INVALID, problem, "Name a model that takes them.")

    def types(self, ids: list[list[int]]) -> list[list[int]] | None:
        """Which tokens are of an image, a video or a sound; None for models that do not ask for it."""
        if "mm_token_type_ids" not in self._processor.model_input_names:
            return None
        found: list[list[int]] = self._processor.create_mm_token_type_ids(ids)
        return found

    def text(self, about: About) -> str:
        """What a placeholder is replaced by: as many of it as there are tokens, with whatever is written between them.

        Raises Fault(DataInvalid) for what the model does not take.
        """
        if about not in self._texts:
            self._texts[about] = self._text(about)
        return self._texts[about]

    def _text(self, about: About) -> str:
        if isinstance(about, Picture):
            sizes: Any = self._processor._get_num_multimodal_tokens(image_sizes=[list(about)])
            return self.placeholders["image"] * int(sizes["num_image_tokens"][0])
        if isinstance(about, film.Film):
            # Tensors without values: shapes are all that is asked for.
            shape = (len(self.frames(about)), 3, about.height, about.width)
            made = self._call("video", torch.empty(shape, dtype=torch.uint8, device="meta"), about, replaced=True)
        else:
            made = self._call("audio", torch.zeros(self._heard(about)).numpy(), about, replaced=True)
        [[found]] = made["text_replacement_offsets"]
        return str(found["replacement"])

    def prepared(self, medium: Medium) -> tuple[int, dict[str, torch.Tensor]]:
        """How many tokens of its kind a medium becomes, and what goes to the model with them.

        Raises Fault(DataInvalid) when it cannot be read.
        """
        made = self._call(medium.kind, self._read(medium), medium.about, return_tensors="pt")
        count = int((made["input_ids"] == self.ids[medium.kind]).sum())
        return count, {name: value for name, value in made.items() if name not in _TEXT}

    def frames(self, about: film.Film) -> list[int]:
        """The frames of a video that a model is shown, by their numbers."""
        videos = self._processor.video_processor
        known = {name: getattr(videos, name, None) for name in videos.valid_kwargs.__annotations__}
        indices: Any = videos.sample_frames(metadata=_metadata(about, None), **known)
        return [int(each) for each in indices]

    def _call(self, kind: Kind, given: Any, about: About, replaced: bool = False, **how: Any) -> Mapping[str, Any]:
        """The processor on one placeholder."""
        how |= {"return_text_replacement_offsets": True} if replaced else {}
        if kind == "image":
            how |= {"images": [given]}
        elif kind == "video":
            assert isinstance(about, film.Film)
            told = _metadata(about, self.frames(about))
            how |= {"videos": [given], "video_metadata": [told], "do_sample_frames": False}
        else:
            how |= {"audio": [given], "sampling_rate": self._hears}
        made: Mapping[str, Any] = self._processor(text=[self.placeholders[kind]], add_special_tokens=False, **how)
        return made

    def _read(self, medium: Medium) -> Any:
        from PIL import Image

        about, path = medium.about, medium.path
        if isinstance(about, Picture):
            with Image.open(path) as image:
                return image.convert("RGB")
        try:
            if isinstance(about, film.Film):
                return film.frames(path, self.frames(about))
            return sound.samples(path, about, self._hears)
        except film.Unreadable as error:
            problem = f"{medium.kind} {path.name} {error}"
            raise Fault(Reason.DATA_INVALID, problem, "Replace it, or take the row out.") from error

    @property
    def _hears(self) -> int:
        """Samples per second that the model hears."""
        return int(self._processor.feature_extractor.sampling_rate)

    def _heard(self, about: sound.Sound) -> int:
        """Samples of a sound as the model hears it."""
        found, most = about.at(self._hears), getattr(self._processor.feature_extractor, "n_samples", None)
        if most is not None and found > most:
            problem = f"a sound is {found / self._hears:.1f} seconds long, and the model hears {most / self._hears:.0f}"
            raise Fault(Reason.DATA_INVALID, problem, "Cut it into pieces of that length.")
        return found


def _metadata(about: film.Film, indices: list[int] | None) -> Any:
    """What the library is told of a film; it writes into the list of frames."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=about.frames,
        fps=about.rate,
        width=about.width,
        height=about.height,
        duration=about.frames / about.rate,
        frames_indices=indices,
    )
