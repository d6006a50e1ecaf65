"""The English part of the PyPI package ``chatterbot-corpus``, as rows for either task.

The package has one YAML file a topic, each with a list of conversations, each a list of utterances. Some of
those are dialogues and others a question with several answers, so only the first two utterances make a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedllm.errors import DataError

_MIN_TEXTS = (
    40  # a smaller topic cannot be split into training, test and clients in a way that tells anything
)


@dataclass(frozen=True)
class _Topic:
    name: str
    file: str
    conversations: list[list[str]]


def topic_texts(topics: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """Columns ``text``, ``label`` (the topic) and ``source`` (its file); no text occurs twice.

    Args:
        topics: the topics to use; empty: all with at least 40 different texts.

    Raises:
        DataError: the package is not installed, or there is no such topic.
    """
    corpus = _read(topics)
    if not topics:
        corpus = [topic for topic in corpus if len(set(_texts(topic))) >= _MIN_TEXTS]
    # A text of two topics stays with the first: else it could be trained on in one and tested in the other.
    owner: dict[str, _Topic] = {}
    for topic in corpus:
        for text in _texts(topic):
            owner.setdefault(text, topic)
    return {
        "text": list(owner),
        "label": [topic.name for topic in owner.values()],
        "source": [topic.file for topic in owner.values()],
    }


def question_answers(topics: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """Columns ``prompt``, ``response``, ``label`` (the topic) and ``source``; no prompt occurs twice.

    Args:
        topics: the topics to use; empty: all.

    Raises:
        DataError: the package is not installed, or there is no such topic.
    """
    pairs: dict[str, tuple[str, _Topic]] = {}
    for topic in _read(topics):
        for conversation in topic.conversations:
            if len(conversation) >= 2:
                pairs.setdefault(conversation[0], (conversation[1], topic))
    return {
        "prompt": list(pairs),
        "response": [response for response, _ in pairs.values()],
        "label": [topic.name for _, topic in pairs.values()],
        "source": [topic.file for _, topic in pairs.values()],
    }


def _read(topics: tuple[str, ...]) -> list[_Topic]:
    files = {path.stem: path for path in sorted(_folder().glob("*.yml"))}
    if unknown := [topic for topic in topics if topic not in files]:
        raise DataError(
            f"packaged:chatterbot has no topic {unknown[0]!r} (data.labels); "
            f"its topics are {', '.join(files)}"
        )
    return [_topic(path) for name, path in files.items() if not topics or name in topics]


def _folder() -> Path:
    found = find_spec("chatterbot_corpus")
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "data.source packaged:chatterbot needs the package chatterbot-corpus, which is not installed: "
            'pip install "fedllm[demo]"'
        )
    return Path(found.submodule_search_locations[0]) / "data" / "english"


def _topic(path: Path) -> _Topic:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    conversations = [_utterances(entry) for entry in content["conversations"] if isinstance(entry, list)]
    return _Topic(path.stem, path.name, conversations)


def _utterances(entry: list[Any]) -> list[str]:
    # YAML reads an unquoted year or yes as a number or a truth value.
    texts = (str(utterance).strip() for utterance in entry if utterance is not None)
    return [text for text in texts if text]


def _texts(topic: _Topic) -> Iterator[str]:
    for conversation in topic.conversations:
        yield from conversation
