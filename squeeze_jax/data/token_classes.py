"""The tokenizer classes of `transformers` 5.23 that can be read, and the files that tell the class of a tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from squeeze_jax.data import token_options
from squeeze_jax.data.token_options import CONFIG
from squeeze_jax.data.tokenizer import BERT, END, ROBERTA, ROLES
from squeeze_jax.errors import UserError, shortened

MODEL = "config.json"
GENERIC = "PreTrainedTokenizerFast"


class Kind(NamedTuple):
    """Classes that build equal tokenizers.

    Attributes:
      classes: their names, without "Fast".
      models: the types of model, in config.json, whose tokenizers are of these classes.
      special: {name: token} of the special tokens if the files name no others.
      required: the names of special tokens that a vocabulary has to hold, unless the files name others.
      files: the vocabulary beside a tokenizer.json or instead of it.
      fixed: the names of special tokens that cannot become new tokens.
    """

    classes: tuple[str, ...]
    models: tuple[str, ...]
    special: dict[str, str]
    required: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()


def _by_name(roles: Mapping[str, str], **others: str) -> dict[str, str]:
    return {ROLES[role][0]: token for role, token in roles.items()} | others


_BYTE_LEVEL = ("vocab.json", "merges.txt")
_ROBERTA = _by_name(ROBERTA, bos_token="<s>", eos_token="</s>")
KINDS = {
    "bert": Kind(
        (
            *("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"),
            *("MobileBertTokenizer", "SqueezeBertTokenizer", "ConvBertTokenizer"),
            "LayoutLMTokenizer",
        ),
        (
            *("bert", "distilbert", "electra", "mobilebert", "squeezebert", "convbert"),
            *("layoutlm", "megatron-bert", "nezha", "nomic_bert", "ernie", "retribert"),
        ),
        _by_name(BERT),
        ("pad_token", "unk_token", "cls_token", "sep_token"),
        ("vocab.txt",),
        ("unk_token",),
    ),
    "roberta": Kind(
        (
            *("RobertaTokenizer", "BartTokenizer"),
            *("LongformerTokenizer", "LEDTokenizer"),
        ),
        (
            *("roberta", "bart", "longformer", "data2vec-text", "ibert", "mega", "mra"),
            "roberta-prelayernorm",
        ),
        _ROBERTA,
        tuple(_by_name(ROBERTA)),
        _BYTE_LEVEL,
    ),
    "gpt2": Kind(
        ("GPT2Tokenizer", "CodeGenTokenizer"),
        ("gpt2", "gpt_neo", "gptj", "opt", "phi", "codegen", "starcoder2"),
        {"unk_token": END, "bos_token": END, "eos_token": END},
        ("unk_token", "bos_token", "eos_token"),
        _BYTE_LEVEL,
    ),
    "albert": Kind(
        ("AlbertTokenizer", "FNetTokenizer"),
        ("albert", "yoso"),
        _by_name(BERT, bos_token="[CLS]", eos_token="[SEP]")
        | {"unk_token": "<unk>", "pad_token": "<pad>"},
        ("cls_token", "sep_token"),
        fixed=("cls_token", "sep_token"),
    ),
    "xlm-roberta": Kind(
        ("XLMRobertaTokenizer",),
        ("xlm-roberta", "xmod"),
        _ROBERTA,
        ("bos_token", "eos_token"),
    ),
    # These use a tokenizer.json as it is.
    "generic": Kind(
        (GENERIC, "PreTrainedTokenizer", "TokenizersBackend"),
        ("modernbert", "modernbert-decoder", "nystromformer", "xlm-roberta-xl"),
        {},
    ),
}


class Class(NamedTuple):
    """A tokenizer class: its name in `transformers`, and the key of its row in `KINDS`."""

    name: str
    kind: str


def find(folder: Path) -> Class | None:
    """Returns the class of the tokenizer in a folder; None if neither tokenizer_config.json nor config.json tells it.

    Raises:
      UserError: the class is not one of `KINDS`, or a file is not JSON.
    """
    config, model = (
        token_options.read_json(folder / name) if (folder / name).is_file() else {}
        for name in (CONFIG, MODEL)
    )
    name, model_type = config.get("tokenizer_class"), model.get("model_type")
    where = f"{folder / CONFIG}: tokenizer_class = {shortened(repr(name), 60)}"
    if name is None:
        name = model.get("tokenizer_class")
        where = f"{folder / MODEL}: tokenizer_class = {shortened(repr(name), 60)}"
    if name is None and model_type is None:
        return None
    if model_type in KINDS["generic"].models:
        return Class(GENERIC, "generic")
    for key, kind in KINDS.items():
        if name is None and model_type in kind.models:
            return Class(kind.classes[0], key)
        if str(name).removesuffix("Fast") in _without_fast(kind):
            return Class(name, key)
    if name is None:
        where = f"{folder / MODEL}: model_type = {shortened(repr(model_type), 60)}"
    known = ", ".join(row.classes[0] for key, row in KINDS.items() if key != "generic")
    raise UserError(
        f'{where} has a tokenizer of its own that is not read here: set "tokenizer_class" in {CONFIG} to {known}, or to {GENERIC},'
        " which uses a tokenizer.json as it is"
    )


def _without_fast(kind: Kind) -> list[str]:
    return [name.removesuffix("Fast") for name in kind.classes]
