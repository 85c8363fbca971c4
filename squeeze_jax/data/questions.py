"""Questions about documents, with answers that stand in them, from the files of SQuAD 1.1 and 2.0 (also XQuAD, MLQA)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from squeeze_jax.data import text_files
from squeeze_jax.errors import UserError


class Answer(NamedTuple):
    """A text, and the character of the document where it is said to begin."""

    text: str
    begin: int


class Question(NamedTuple):
    """A question about one document.

    Attributes:
      id: of the file's, which predictions are called by.
      text: without white space around it.
      document: number of the document it is about.
      answers: those that people gave; empty where the document has none.
    """

    id: str
    text: str
    document: int
    answers: tuple[Answer, ...]


class Questions(NamedTuple):
    """The content of a file.

    Attributes:
      documents: texts.
      questions: in the file's order.
      version2: whether there may be questions without an answer, as in SQuAD 2.0.
    """

    documents: list[str]
    questions: list[Question]
    version2: bool


def read(path: str | Path) -> Questions:
    """Reads a file in the format of SQuAD: .json, also compressed, .json.gz.

    The file is of version 2 where "is_impossible" appears or its "version" begins with 2 or v2.

    Raises:
      UserError: no such file, not JSON, another structure (says where), no question, an id that comes twice, or a question
        that has no answer and is not said to have none.
    """
    path = Path(path).expanduser()
    content = _json(path)
    if not isinstance(content, dict) or "data" not in content:
        raise UserError(
            f'{path} has no "data": the file should be as SQuAD\'s, {{"version": …, "data": [{{"paragraphs": …}}]}}'
        )
    version2 = str(content.get("version", "")).lstrip("v").startswith("2")
    documents, questions, ids = [], [], set()
    for where, document, rows in _paragraphs(content, path):
        for i, row in enumerate(rows):
            version2 |= isinstance(row, dict) and "is_impossible" in row
            question = _question(row, len(documents), f"{where}.qas[{i}]")
            if question.id in ids:
                raise UserError(
                    f"{path} has two questions with the id {question.id!r}: predictions could not be told apart"
                )
            ids.add(question.id)
            questions.append(question)
        documents.append(document)
    if not questions:
        raise UserError(f"{path} holds no question")
    return Questions(documents, questions, version2)


def _json(path: Path):
    content = text_files.read_text(path)
    if not content.strip():
        raise UserError(f"{path} is empty")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def _paragraphs(content, path: Path) -> Iterator[tuple[str, str, list]]:
    """(where in the file, document, its questions)."""
    for a, article in enumerate(_get(content, "data", list, f"{path}: ")):
        where = f"{path}: .data[{a}]"
        for p, paragraph in enumerate(_get(article, "paragraphs", list, where)):
            here = f"{where}.paragraphs[{p}]"
            document = _get(paragraph, "context", str, here)
            yield here, document, _get(paragraph, "qas", list, here)


def _question(row, document: int, where: str) -> Question:
    id, text = _get(row, "id", str, where), _get(row, "question", str, where).strip()
    if not text:
        raise UserError(f"{where}: the question {id!r} has no text")
    if row.get("is_impossible"):
        return Question(id, text, document, ())
    answers = []
    for i, answer in enumerate(_get(row, "answers", list, where)):
        here = f"{where}.answers[{i}]"
        begin = _get(answer, "answer_start", int, here)
        answers.append(Answer(_get(answer, "text", str, here), begin))
    if not answers:
        raise UserError(
            f'{where}: the question {id!r} has no answers; where there is none it needs "is_impossible": true'
        )
    return Question(id, text, document, tuple(answers))


def _get(row, key: str, kind: type, where: str):
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        names = {list: "a list", str: "a text", int: "a whole number"}
        raise UserError(f"{where}.{key} should be {names[kind]}, as in SQuAD's files")
    return value


def places(content: Questions) -> list[tuple[int, int] | None]:
    """Characters [begin, end) of each question's first answer that is where the file says, or None."""
    found = []
    for question in content.questions:
        document = content.documents[question.document]
        places = (_place(answer, document) for answer in question.answers)
        found.append(next(filter(None, places), None))
    return found


def _place(answer: Answer, document: str) -> tuple[int, int] | None:
    text, begin = answer
    bare = text.strip()
    if not bare or begin < 0 or document[begin : begin + len(text)] != text:
        return None
    begin += text.index(bare)
    return begin, begin + len(bare)
