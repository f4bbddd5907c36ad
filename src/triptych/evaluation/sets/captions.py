"""Images with all their reference captions: COCO and Flickr30k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triptych.data.pairs import read_pairs
from triptych.evaluation.sets.files import Rows
from triptych.evaluation.sets.tables import Table
from triptych.types import DataError, Sample, assistant, user

PROMPT = "Provide a one-sentence caption of the image."


class References(Rows):
    """One sample an image, its references in meta["references"], from any file of captions.

    path: Karpathy's dataset_coco.json or dataset_flickr30k.json with its `split`, COCO's
    captions_*.json, or whatever `data=captions` reads. images: the folder in which their paths lie.
    instances: COCO's instances_val2014.json, whose objects CHAIR counts (meta["objects"]).
    """

    def __init__(
        self,
        path: str | Path | None,
        images: str | Path | None = None,
        split: str | None = None,
        instances: str | Path | None = None,
        image: str = "image",
        caption: str = "caption",
        prompt: str = PROMPT,
        limit: int | None = None,
    ) -> None:
        rows: dict[Any, dict[str, Any]] = {}
        if path is not None:
            if not Path(path).is_file():
                raise DataError(f"option path: file '{path}' does not exist; correct the path.")
            for source, text in read_pairs(Path(path), image, caption, split):
                rows.setdefault(source, {"image": source, "texts": []})["texts"].append(text)
            if not rows:
                raise DataError(f"option split: '{path}' holds no caption of split '{split}'.")
        self.objects = None if instances is None else _objects(instances)
        self.prompt, self.stem = prompt, "captions" if path is None else Path(path).stem
        super().__init__(Table(rows.values()), images, limit)

    def read(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        meta: dict[str, Any] = {"references": row["texts"]}
        if self.objects is not None:
            meta["objects"] = self.objects.get(Path(str(row["image"])).name, [])
        return Sample(
            [user(self.prompt, images=1), assistant(row["texts"][0])],
            target=row["texts"][0],
            id=name,
            source=self.stem,
            meta=meta,
        )

    def picture(self, index: int) -> tuple[Any, str]:
        image = self.rows[index]["image"]
        if isinstance(image, bytes):
            return image, f"{self.stem}/image {index}"
        return [image, Path(image).name], image

    def name(self, index: int) -> str:
        image = self.rows[index]["image"]
        return f"{self.stem}/{index if isinstance(image, bytes) else image}"


def _objects(path: str | Path) -> dict[str, list[str]]:
    """The annotated object names of each image, by its file's name."""
    import json

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        files = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        found: dict[str, set[str]] = {}
        for note in content["annotations"]:
            found.setdefault(files[note["image_id"]], set()).add(names[note["category_id"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"option instances: '{path}' is no instances_*.json of COCO ({error!r})."
        ) from None
    return {file: sorted(objects) for file, objects in found.items()}
