"""Reads questions about documents, with answers in them, from files in the format of SQuAD 1.1 and 2.0 (also XQuAD, MLQA)."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from squeeze_jax.data import text_files
from squeeze_jax.errors import UserError
from squeeze_jax.files import parse_json


class Answer(NamedTuple):
    """An answer's text, and the character of the document where it begins according to the file."""

    text: str
    begin: int


class Question(NamedTuple):
    """A question about one document.

    Attributes:
      id: in the file; predictions are named by it.
      text: of the question, without white space around it.
      document: index of the document that it is about.
      answers: of human annotators; empty if the document does not answer the question.
    """

    id: str
    text: str
    document: int
    answers: tuple[Answer, ...]


class Questions(NamedTuple):
    """The content of a file.

    Attributes:
      documents: the texts.
      questions: in the order of the file.
      version2: whether questions may have no answer, as in SQuAD 2.0.
    """

    documents: list[str]
    questions: list[Question]
    version2: bool


def read(path: str | Path) -> Questions:
    """Reads a file in the format of SQuAD, .json or .json.gz.

    The file is of version 2 if a question has the key "is_impossible", or if its "version" begins with 2 or v2.

    Raises:
      UserError: the file is missing, not JSON, of another structure (the error says where), without questions, or has an id
        twice; or a question has no answers and is not marked "is_impossible".
    """
    path = Path(path).expanduser()
    content = _load_json(path)
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


def _load_json(path: Path):
    content = text_files.read_text(path)
    if not content.strip():
        raise UserError(f"{path} is empty")
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def _paragraphs(content, path: Path) -> Iterator[tuple[str, str, list]]:
    """Yields (place in the file, document, its questions) for each paragraph."""
    for a, article in enumerate(_get_entry(content, "data", list, f"{path}: ")):
        where = f"{path}: .data[{a}]"
        for p, paragraph in enumerate(_get_entry(article, "paragraphs", list, where)):
            here = f"{where}.paragraphs[{p}]"
            document = _get_entry(paragraph, "context", str, here)
            yield here, document, _get_entry(paragraph, "qas", list, here)


def _question(row, document: int, where: str) -> Question:
    id, text = (
        _get_entry(row, "id", str, where),
        _get_entry(row, "question", str, where).strip(),
    )
    if not text:
        raise UserError(f"{where}: the question {id!r} has no text")
    if row.get("is_impossible"):
        return Question(id, text, document, ())
    answers = []
    for i, answer in enumerate(_get_entry(row, "answers", list, where)):
        here = f"{where}.answers[{i}]"
        begin = _get_entry(answer, "answer_start", int, here)
        answers.append(Answer(_get_entry(answer, "text", str, here), begin))
    if not answers:
        raise UserError(
            f'{where}: the question {id!r} has no answers; where there is none it needs "is_impossible": true'
        )
    return Question(id, text, document, tuple(answers))


def _get_entry(row, key: str, kind: type, where: str):
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        names = {list: "a list", str: "a text", int: "a whole number"}
        raise UserError(f"{where}.{key} should be {names[kind]}, as in SQuAD's files")
    return value


def answer_places(content: Questions) -> list[tuple[int, int] | None]:
    """Returns the characters [begin, end) of each question's answer in its document; None if there is no such answer.

    It is the first answer whose text stands where the file claims.
    """
    answer_places = []
    for question in content.questions:
        document = content.documents[question.document]
        places = (_answer_place(answer, document) for answer in question.answers)
        answer_places.append(next(filter(None, places), None))
    return answer_places


def _answer_place(answer: Answer, document: str) -> tuple[int, int] | None:
    text, begin = answer
    bare = text.strip()
    if not bare or begin < 0 or document[begin : begin + len(text)] != text:
        return None
    begin += text.index(bare)
    return begin, begin + len(bare)
