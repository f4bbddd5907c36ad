"""The options that point each benchmark at its fixture, in the layout of the real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures"


def _vqa(name: str, questions: str, annotations: str) -> dict[str, str]:
    return {
        "samples.questions": f"{name}/{questions}_mscoco_val2014_questions.json",
        "samples.annotations": f"{name}/{annotations}mscoco_val2014_annotations.json",
        "samples.images": f"{name}/val2014",
    }


FILES: dict[str, dict[str, str]] = {
    "vqav2": _vqa("vqav2", "v2_OpenEnded", "v2_")
    | {
        "train.questions": "vqav2/v2_OpenEnded_mscoco_train2014_questions.json",
        "train.annotations": "vqav2/v2_mscoco_train2014_annotations.json",
    },
    "okvqa": _vqa("okvqa", "OpenEnded", ""),
    "gqa": {
        "samples.questions": "gqa/testdev_balanced_questions.json",
        "samples.images": "gqa/images",
        "train.questions": "gqa/testdev_balanced_questions.json",
    },
    "textvqa": {
        "samples.questions": "textvqa/TextVQA_0.5.1_val.json",
        "samples.images": "textvqa/train_images",
    },
    "docvqa": {"samples.questions": "docvqa/val_v1.0.json", "samples.images": "docvqa"},
    "chartqa": {"samples.path": "chartqa/test"},
    "scienceqa": {
        "samples.problems": "scienceqa/problems.json",
        "samples.splits": "scienceqa/pid_splits.json",
        "samples.images": "scienceqa/images",
        "train.problems": "scienceqa/problems.json",
    },
    "mmbench": {"samples.path": "mmbench/mmbench_dev_en.tsv"},
    "pope": {"samples.path": "pope", "samples.images": "pope/val2014"},
    "coco_captions": {
        "samples.path": "coco/dataset_coco.json",
        "samples.images": "coco",
        "samples.instances": "coco/instances_val2014.json",
        "train.path": "coco/dataset_coco.json",
    },
    "flickr30k_captions": {
        "samples.path": "flickr30k/dataset_flickr30k.json",
        "samples.images": "flickr30k/flickr30k-images",
    },
    "coco_retrieval": {"samples.path": "coco/dataset_coco.json", "samples.images": "coco"},
    "flickr30k_retrieval": {
        "samples.path": "flickr30k/dataset_flickr30k.json",
        "samples.images": "flickr30k/flickr30k-images",
    },
    "retrieval_captions": {
        "samples.path": "flickr30k/dataset_flickr30k.json",
        "samples.images": "flickr30k/flickr30k-images",
        "samples.split": "test",
    },
    "winoground": {
        "samples.path": "winoground/examples.jsonl",
        "samples.images": "winoground/images",
    },
    "sugarcrepe": {"samples.path": "sugarcrepe/data", "samples.images": "sugarcrepe/val2017"},
    "zero_shot_folder": {
        "samples.path": "imagenet/val",
        "samples.names": "imagenet/LOC_synset_mapping.txt",
    },
    "ocr": {},
    "ocr_folder": {"samples.path": "ocr"},
    "jsonl": {"path": "own/questions.jsonl", "images": "own/pictures"},
}
SMALL: dict[str, dict[str, Any]] = {  # what is made here needs no file, only fewer samples
    "ocr": {"samples.size": 8},
    "easy_vqa": {"samples.limit": 60, "train.limit": 400, "blind_subset": None},
    "few_shot": {"samples.samples.limit": 8, "samples.support.limit": 200, "train.limit": 40},
    "shapes": {"samples.size": 8, "train.size": 20},
    "retrieval": {"samples.size": 8},
    "relations": {"samples.size": 12},
    "zero_shot": {"samples.size": 24},
    "linear_probe": {"samples.size": 24, "train.size": 60},
}


def options(name: str) -> dict[str, Any]:
    """What has to be set below `benchmark.NAME`."""
    files = {
        key: file if key.endswith("split") else str(FIXTURES / file)
        for key, file in FILES.get(name, {}).items()
    }
    return files | SMALL.get(name, {})


def build(name: str, **replaced: Any) -> Any:
    """A benchmark from its own YAML file, pointed at its fixture."""
    from omegaconf import OmegaConf

    from triptych.build import build as instantiate
    from triptych.cli import conf_dir

    node = OmegaConf.load(conf_dir() / "benchmark" / f"{name}.yaml")
    for key, value in (options(name) | replaced).items():
        OmegaConf.update(node, key, value, force_add=True)
    return instantiate(node)
