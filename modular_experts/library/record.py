"""Make and check an expert's record, `expert.json`: where the expert comes from, how it was made, what it scored.

A record is plain JSON and never leads to code: nobody imports or builds what it names.

Format 1 is an expert of deltas alone. Format 2 adds a state (`state.safetensors`): the record then lists the expert's
`files`, of which `delta.safetensors` may be missing. Format 3 is a routed expert, whose content hash covers more than
its tensors (`hash_of_all`). Format 4 is an expert with encoded values (`encoded.py`), and lists its `files`. Format 5
is an expert that acts on answers alone, which its content hash covers, too; it lists its `files`.
`write_expert` writes the lowest format that an expert needs, and all formats are read.

| key                     | what it holds                                                                           |
|-------------------------|-----------------------------------------------------------------------------------------|
| `kind`                  | class of the trained experts, such as `SparseExpert`, or `merge`, or `routed`            |
| `base`                  | `id` (path or hub id), `revision`, `fingerprint`, `rows` of the embeddings if known;    |
|                         | `untied` where it is an untied copy:                                                    |
| ` untied`               | `fingerprint` of the tied base, and the names of its `head` and `embeddings`            |
| `tasks`, `scores`       | names of the tasks it was trained on; what it scored                                    |
| `parents`               | `name`, `content_hash`, `tasks` of each expert that it was made of or trained on top of |
| `encoding`              | how the values are stored, if not as float32                                            |
| `inputs`                | tasks, number, SHA-256 of the kept inputs; their file (`kept_inputs.py`) may be missing |
| `hyperparameters`       | settings of the kind, the exported step and the learning rate among them                |
| `method`, `per_weight`  | of a merge: the method, `class_path` and `init_args`; methods by pattern of names       |
| `costs`, `seed`         | memory and time of the training; seed of the run                                        |
| `class_path`            | dotted path of the experts' class, for a reader of their state; it stays text           |
| `not_mergeable_because` | why the deltas are not all that the experts do, as the end of a sentence                |
| `acts_on`               | `answer` for experts that act on answers alone (`injection/answer_only.py`)             |
| `plan`                  | `class` and `settings` of the `LayerPlan` that makes the experts again                  |
| `training`              | how it was trained; of a merge where all parents agree; every key may be missing:       |
| ` batch_size`, ` accumulate_grad_batches` | rows of a batch of all processes, and batches of a step               |
| ` rows`                 | rows trained on up to the exported step                                                 |
| ` dtype`, ` precision`  | of the base, and of the trainer, such as `bf16-mixed`                                   |
| ` quantised`            | `form`, `library` and `settings`, or the `quantization_config` of the base               |
| ` max_length`, ` chat_template` | the most tokens of a row; hash of the template, or null                         |
| ` shots`                        | how many demonstrations stood before each row, if any                           |
| ` data`, ` config`      | of each task `rows` by split and their `hash`; the file with the configuration          |
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import modular_experts
from modular_experts.places import RECORD_FILE as RECORD_FILE

FORMAT = "modular-experts/1"
FORMAT_WITH_STATE = "modular-experts/2"
FORMAT_ROUTED = "modular-experts/3"
FORMAT_ENCODED = "modular-experts/4"
FORMAT_OF_ANSWERS = "modular-experts/5"
FORMATS = (FORMAT, FORMAT_WITH_STATE, FORMAT_ROUTED, FORMAT_ENCODED, FORMAT_OF_ANSWERS)
DELTA_FILE = "delta.safetensors"
STATE_FILE = "state.safetensors"
MERGE = "merge"
ROUTED = "routed"
"""Kinds of records of experts that were not trained."""
ANSWER = "answer"
"""What experts act on that leave prompts to the base."""
Record = dict[str, Any]
"""The content of an `expert.json`, plain JSON."""
Facts = Mapping[str, Any]
"""Plain values by name, as JSON holds them: a record to read, or a part of one."""
_PACKAGES = ("torch", "lightning", "transformers", "safetensors")
_TYPES = {"format": str, "kind": str, "base": dict, "tasks": list, "scores": dict, "parents": list, "content_hash": str}
_OPTIONAL = ("hyperparameters", "method", "per_weight", "costs", "versions", "source", "training")


def make_record(
    kind: str,
    base: Facts,
    tasks: Sequence[str] = (),
    parents: Sequence[Facts] = (),
    **more: object,
) -> Record:
    """Return the record of a new expert; `write_expert` adds the content hash.

    Args:
        more: Other keys of the table above. One without a value, such as None, counts as not given.
    """
    record = {
        "format": FORMAT,
        "kind": kind,
        "hyperparameters": {},
        "base": {name: base.get(name) for name in ("id", "revision", "fingerprint")}
        | {name: base[name] for name in ("rows", "untied") if base.get(name)},
        "tasks": list(tasks),
        "scores": {},
        "parents": [dict(parent) for parent in parents],
        "method": None,
        "per_weight": {},
        "costs": {},
        "versions": package_versions(),
        "seed": None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    known = {*record, "training", "class_path", "not_mergeable_because", "acts_on", "plan"}
    assert more.keys() <= known, f"a record has no {sorted(more.keys() - known)}"
    return record | {name: value for name, value in more.items() if value not in (None, {}, "")}


def package_versions() -> dict[str, str]:
    """Return the versions of this package and of those that training and storing depend on."""
    return {"modular-experts": modular_experts.__version__} | {name: _version(name) for name in _PACKAGES}


_version = cache(metadata.version)  # which parses a text of many lines each time


def read_json(file: Path, consequence: str) -> Record:
    """Read a JSON object; a sentence about a missing file ends with the consequence."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, {consequence}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: it is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it must hold a JSON object, and holds a {type(content).__name__}")
    return content


def read_record(file: Path) -> Record:
    """Read and check an `expert.json`."""
    record = read_json(file, f"so {file.parent} is not an expert")
    if record.get("format") not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        raise ValueError(f"{file} has format {record.get('format')!r}, and this version reads {known}")
    if wrong := what_is_wrong(record):
        raise ValueError(f"{file} is damaged: {wrong}")
    return record


def hash_of_all(tensors: str, record: Facts) -> str:
    """Return the content hash of an expert: the hash of its tensors, or of all by which experts of the same differ.

    Two routed experts whose routers have the same state act alike only if their routers have the same class and
    settings and choose among the same experts. An expert that acts on answers alone is another than one of whole rows.
    """
    if record["kind"] == ROUTED:
        parents = [parent["content_hash"] for parent in record["parents"]]
        parts = plain([tensors, record.get("class_path"), record.get("hyperparameters"), parents])
    elif record.get("acts_on"):
        parts = [tensors, record["acts_on"]]
    else:
        return tensors
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def files_of(record: Facts) -> list[str]:
    """Return the names of the files that an expert of this record has beside the record itself."""
    return [DELTA_FILE] if record["format"] == FORMAT else record["files"]


def what_is_wrong(record: Facts) -> str:
    """Return which parts of a record are missing or not what its readers rely on, or an empty string."""
    wrong = [name for name, kind in _TYPES.items() if not isinstance(record.get(name), kind)]
    if wrong:
        return f"{', '.join(wrong)} is missing or of a wrong type"
    base = record["base"]
    methods = [record.get("method")]
    if isinstance(record.get("per_weight"), dict):
        methods += record["per_weight"].values()
    texts = [base.get("id"), base.get("revision"), record.get("class_path"), record.get("not_mergeable_because")]
    sound = {
        **{name: isinstance(record.get(name), dict | None) for name in _OPTIONAL},
        "the fingerprint of its base": isinstance(base.get("fingerprint"), str),
        "the id or the revision of its base": all(isinstance(text, str | None) for text in texts[:2]),
        "the number of rows of its base": isinstance(base.get("rows"), int | None),
        "a task": _are_texts(record["tasks"]),
        "a parent": all(
            _has_texts(parent, "name", "content_hash") and _are_texts(parent.get("tasks", []))
            for parent in record["parents"]
        ),
        "the list of its files": record["format"] == FORMAT
        or record.get("files") in ([STATE_FILE], [DELTA_FILE, STATE_FILE])
        or (record["format"] in (FORMAT_ENCODED, FORMAT_OF_ANSWERS) and record.get("files") == [DELTA_FILE]),
        "the list of its inputs": (inputs := record.get("inputs")) is None
        or (_has_texts(inputs, "sha256") and _are_texts(inputs.get("tasks")) and isinstance(inputs.get("rows"), int)),
        "the class path or the reason not to merge": all(isinstance(text, str | None) for text in texts[2:]),
        "what it acts on": record.get("acts_on") == (ANSWER if record["format"] == FORMAT_OF_ANSWERS else None),
        "the plan": (plan := record.get("plan")) is None
        or (_has_texts(plan, "class") and isinstance(plan.get("settings"), dict)),
        "a merge method": all(
            method is None or (_has_texts(method, "class_path") and isinstance(method.get("init_args"), dict))
            for method in methods
        ),
    }
    wrong = [name for name, is_sound in sound.items() if not is_sound]
    return f"{', '.join(wrong)} is not what it must be" if wrong else ""


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _has_texts(value: object, *names: str) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)


def plain(value: object) -> Any:
    """Convert a value to strict JSON: numbers that are not finite become null, unknown objects their text."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
