"""Boxes around what images show: checked in rows, and written into their messages as a model writes them.

A message names a thing by <ref-object> and says where it is by <bbox>. The row's column objects says which, as ms-swift
has it: {"ref": names, "bbox": [x1, y1, x2, y2] or [x, y] each, "bbox_type": "real" (pixels, the default) or "norm1"
(parts of the sides), "image_id": the image of each box, by default the first}. What models write is of their families:
thousandths in Qwen2-VL (arXiv:2409.12191), pixels of the image as it is seen in Qwen2.5-VL (arXiv:2502.13923).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trimtab_api.conditions import Reason
from trimtab_trainer.data.conversations import parsed
from trimtab_trainer.data.reading import broken
from trimtab_trainer.data.rows import IMAGES, Row
from trimtab_trainer.endings import Fault

OBJECTS = "objects"
"""Column of a row, as it is given and as it is in the standard row."""
REF_TAG, BOX_TAG = "<ref-object>", "<bbox>"
Size = tuple[int, int]
"""Height and width in pixels."""


class Way(NamedTuple):
    """How a family of models writes boxes."""

    ref: str
    """Around the name of a thing."""
    box: str
    """Around the coordinates."""
    points: str
    """A point; empty where coordinates are one list."""
    thousandths: bool
    """Coordinates are thousandths of the sides, not pixels of the image as the model sees it."""

    def write(self, coordinates: Sequence[float], seen: Size) -> str:
        """Coordinates as parts of the sides, on an image that the model sees in the size `seen`."""
        height, width = (1000, 1000) if self.thousandths else seen
        whole = [round(part * (height if place % 2 else width)) for place, part in enumerate(coordinates)]
        pairs = [(whole[place], whole[place + 1]) for place in range(0, len(whole), 2)]
        text = ",".join(self.points.format(*pair) for pair in pairs) if self.points else ", ".join(map(str, whole))
        return self.box.format(text)


WAYS = {
    "qwen2_vl": Way("<|object_ref_start|>{}<|object_ref_end|>", "<|box_start|>{}<|box_end|>", "({},{})", True),
    "qwen2_5_vl": Way("{}", "[{}]", "", False),
}
"""By model_type of config.json."""


def boxed(raw: Mapping[str, Any], row: Row, where: str, number: int) -> Row:
    """The standard row with the boxes that its messages show.

    Raises Fault(DataInvalid) when tags and objects are not equally many, or a box is none.
    """
    given = parsed(raw.get(OBJECTS))
    if not given:
        return row
    if not isinstance(given, Mapping):
        raise broken(where, number, "'objects' must be an object with ref and bbox")
    refs, boxes = given.get("ref") or [], given.get("bbox") or []
    images = given.get("image_id") or [0] * len(boxes)
    shown, text = row.get(IMAGES, []), said(row)
    for name, values, tag in (("ref", refs, REF_TAG), ("bbox", boxes, BOX_TAG)):
        if not isinstance(values, list) or len(values) != text.count(tag):
            problem = f"'objects.{name}' is not as many as the messages' {text.count(tag)} {tag}"
            raise broken(where, number, problem, f"Write {tag} into a message for each of them, in their order.")
    if not shown:
        raise broken(where, number, "'objects' is given, and no image", "Name the image in images.")
    if not all(isinstance(ref, str) for ref in refs):
        raise broken(where, number, "'objects.ref' must be a list of names")
    if len(images) != len(boxes) or not all(isinstance(each, int) and 0 <= each < len(shown) for each in images):
        raise broken(where, number, "'objects.image_id' must be the place of one of the row's images for each box")
    kind = given.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise broken(where, number, f"'objects.bbox_type' is {kind!r}; it must be real or norm1")
    for box in boxes:
        _see_box(box, 1.0 if kind == "norm1" else float("inf"), where, number)
    return {**row, OBJECTS: {"ref": refs, "bbox": boxes, "image": images, "norm": kind == "norm1"}}


def said(row: Row) -> str:
    """All that a standard row's messages say."""
    return "".join(str(message.get("content", "")) for message in row.get("messages", []))


def see_none(raw: Mapping[str, Any], row: Row, where: str, number: int) -> None:
    """Raise Fault(DataInvalid) when a row shows boxes to a method that does not look at them."""
    if raw.get(OBJECTS) and any(tag in said(row) for tag in (REF_TAG, BOX_TAG)):
        raise broken(where, number, "'objects' is given, and this job does not look at it", "Write boxes out as text.")


def _see_box(box: Any, most: float, where: str, number: int) -> None:
    numbers = isinstance(box, list) and len(box) in (2, 4) and all(isinstance(each, int | float) for each in box)
    if not numbers or not all(0 <= each <= most for each in box):
        bound = "not below 0" if most > 1 else "from 0 to 1"
        raise broken(where, number, f"'objects.bbox' has {box!r}; it must be [x1, y1, x2, y2] or [x, y], {bound}")
    if len(box) == 4 and not (box[0] < box[2] and box[1] < box[3]):
        raise broken(
            where, number, f"'objects.bbox' has {box!r}, whose second corner is not below and right of the first"
        )


class Boxes:
    """Writes a row's boxes into its messages."""

    def __init__(self, model_type: str, size: Callable[[str], Size], seen: Callable[[Size], Size]):
        """`size` is an image's, by its whole name; `seen` the one that the model resizes such an image to."""
        self._model_type = model_type
        self._size = size
        self._seen = seen

    def __call__(self, row: Row) -> Row:
        """The row with texts in the place of tags.

        Raises Fault(ModelInvalid) for a model that is not known to write boxes, Fault(DataInvalid) for a box that does
        not lie on its image.
        """
        found = row.get(OBJECTS)
        if found is None:
            return row
        way = WAYS.get(self._model_type)
        if way is None:
            problem = f"the rows have boxes, and how a {self._model_type} model writes them is not known"
            raise Fault(Reason.MODEL_INVALID, problem, f"Name a model of {', '.join(WAYS)}, or write them yourself.")
        refs = iter([way.ref.format(ref) for ref in found["ref"]])
        boxes = iter([self._box(way, row, *each) for each in zip(found["bbox"], found["image"], strict=True)])
        messages = [{**message, "content": _filled(message["content"], refs, boxes)} for message in row["messages"]]
        return {**{name: value for name, value in row.items() if name != OBJECTS}, "messages": messages}

    def _box(self, way: Way, row: Row, box: Sequence[float], image: int) -> str:
        name = row[IMAGES][image]
        height, width = size = self._size(name)
        sides = [height if place % 2 else width for place in range(len(box))]
        parts = list(box) if row[OBJECTS]["norm"] else [each / side for each, side in zip(box, sides, strict=True)]
        if max(parts) > 1:
            problem = f"box {list(box)} does not lie on image {name[:200]}, which is {width}x{height} pixels"
            raise Fault(Reason.DATA_INVALID, problem, "Correct the box, or say objects.bbox_type: norm1.")
        return way.write(parts, self._seen(size))


def _filled(text: str, refs: Iterator[str], boxes: Iterator[str]) -> str:
    for tag, values in ((REF_TAG, refs), (BOX_TAG, boxes)):
        first, *others = text.split(tag)
        text = first + "".join(next(values) + other for other in others)
    return text
