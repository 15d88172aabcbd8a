"""Files of a Hugging Face folder other than weights and tokenizer, from import to export.

A checkpoint records them in its environment: config.json, generation_config.json, the chat
template, the model card and the license. An export needs no folder that may be gone by then.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagrow.common.json_text import read_json
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError, DataError
from megagrow.formats.hugging_face_config import (
    CONFIG_FILE,
    check_nesting,
    code_warnings,
    config_of,
    config_warnings,
    without_code,
)

GENERATION_FILE = "generation_config.json"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"
TEXT_FILES = (
    *("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt"),
    "USE_POLICY.md",
)
ORIGIN_KEY = "hugging_face"
"""Key of a source's environment that records its `HuggingFaceOrigin`."""

_TEXT_BYTES = 2**18
"""Maximum size of a recorded text file; every checkpoint of a run repeats it."""

_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class HuggingFaceOrigin:
    """Files of the Hugging Face folder from which a model was imported, without code keys."""

    folder: str | None = None
    config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    chat_template: Any = None
    """A template, or a list of objects with name and template, as in tokenizer_config.json."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Contents of `TEXT_FILES`."""

    @classmethod
    def recorded(cls, environment: Mapping[str, Any]) -> "HuggingFaceOrigin":
        """Return the origin in a source's environment; unusable parts are absent.

        Raises CheckpointError if it is nested too deeply.
        """
        entry = environment.get(ORIGIN_KEY)
        entry = entry if isinstance(entry, dict) else {}
        check_nesting(entry, f"record of the Hugging Face folder {entry.get('folder')!r:.200}")

        def part(name: str, kind: Any) -> Any:
            value = entry.get(name)
            return value if isinstance(value, kind) else None

        texts = part("texts", dict) or {}
        return cls(
            part("folder", str),
            part("config", dict),
            part("generation_config", dict),
            part("chat_template", str | list),
            {name: texts[name] for name in TEXT_FILES if isinstance(texts.get(name), str)},
        )

    def as_environment(self) -> dict[str, Any]:
        """Return the entry of an environment that records this origin."""
        return {ORIGIN_KEY: dict(vars(self))}

    def documents(
        self, model: ModelConfig, dtype: str, ids: Mapping[str, int | None], own: bool
    ) -> dict[str, dict[str, Any]]:
        """Return config.json and generation_config.json of an exported model.

        Args:
            model: exported model.
            dtype: safetensors dtype name of its weights.
            ids: token ids of its tokenizer, by key.
            own: the tokenizer is that of this folder, whose ids have precedence.
        """
        # Without special token ids in config.json, the classes have ids by default.
        like = dict.fromkeys(_ID_KEYS) if self.config is None else self.config
        generation = self.generation_config
        if generation is None:  # transformers takes the ids of config.json
            known = self.config or {}
            generation = {key: known[key] for key in _ID_KEYS if known.get(key) is not None}
        return {
            CONFIG_FILE: config_of(model, dtype, _with_ids(like, ids, own)),
            GENERATION_FILE: _with_ids(without_code(generation), ids, own),
        }


def _with_ids(
    document: Mapping[str, Any], ids: Mapping[str, int | None], own: bool
) -> dict[str, Any]:
    """Return a config with a tokenizer's ids; a list that contains the tokenizer's id is kept."""
    kept = {
        key
        for key, number in ids.items()
        if (own and document.get(key) is not None)
        or (isinstance(document.get(key), list) and number in document[key])
    }
    return {**document, **{key: number for key, number in ids.items() if key not in kept}}


def read_origin(folder: Path, config: dict[str, Any]) -> tuple[HuggingFaceOrigin, list[str]]:
    """Read a folder's files, and a line for every part of them that is ignored or left out."""
    path = folder / GENERATION_FILE
    generation = read_json(path, CheckpointError) if path.is_file() else None
    warnings = config_warnings(config, str(folder / CONFIG_FILE))
    warnings += code_warnings(generation or {}, str(path))
    texts = {}
    for name in TEXT_FILES:
        try:
            if (folder / name).is_file():
                texts[name] = _read_text(folder / name)
        except DataError as error:
            warnings.append(f"{error}; later exports do not contain it")
    template = None
    try:
        template = read_chat_template(folder)
    except DataError as error:
        warnings.append(f"{error}; later exports do not contain its chat template")
    origin = HuggingFaceOrigin(
        str(folder.resolve()),
        without_code(config),
        None if generation is None else without_code(generation),
        template,
        texts,
    )
    return origin, warnings


def read_chat_template(folder: Path) -> Any:
    """Return the chat template of a folder, or None. Raises DataError if it is not readable.

    Files with templates have precedence over tokenizer_config.json, as in transformers.
    """
    main = folder / CHAT_TEMPLATE_FILE
    templates = [{"name": "default", "template": _read_text(main)}] if main.is_file() else []
    templates += [
        {"name": path.stem, "template": _read_text(path)}
        for path in sorted((folder / CHAT_TEMPLATE_FOLDER).glob("*.jinja"))
    ]
    if templates:
        only_main = main.is_file() and len(templates) == 1
        return templates[0]["template"] if only_main else templates
    settings = folder / TOKENIZER_SETTINGS_FILE
    return _template_in(settings) if settings.is_file() else None


def _template_in(settings: Path) -> Any:
    """Return the template of a tokenizer_config.json: a text, or named texts; None without one."""
    found = read_json(settings).get("chat_template")
    named = found if isinstance(found, list) else [{"name": "", "template": found or ""}]
    texts = [text for item in named if isinstance(item, dict) for text in item.values()]
    plain = all(isinstance(item, dict) and item.keys() == {"name", "template"} for item in named)
    if not plain or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{settings}: its chat_template is neither a text nor named texts")
    if sum(map(len, texts)) > _TEXT_BYTES:
        raise DataError(f"{settings}: its chat_template is larger than {_TEXT_BYTES} bytes")
    return found or None


def _read_text(path: Path) -> str:
    """Return a text file's content. Raises DataError if it is not readable, UTF-8 or too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(_TEXT_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text") from error
    if len(raw) > _TEXT_BYTES:
        raise DataError(f"{path}: larger than {_TEXT_BYTES} bytes")
    return text
