"""What a model's folder must hold, whatever brought it: which files are taken, which are refused by name, and
how the model's own files are completed to those that every model here has.

Only safetensors and GGUF hold weights. Pickles and the like can run code when they are read; `.py` files and
`auto_map` ask for code to be run. Neither is ever read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from llmasos.drivers.base import check_sizes
from llmasos.syscalls import types as t
from llmasos.syscalls.errors import Corrupt, RefusedFile, UnsupportedModel
from msgspec import Meta, Struct

from . import safetensors_index

ARCHITECTURES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Values of config.json's model_type that a driver computes with code of ours."""

DECODERS = ("ForCausalLM", "LMHeadModel")
"""Ends of the class names in config.json's `architectures` of models that continue text. Where transformers
is installed, a driver computes those of them that we have no code for."""

ENCODERS = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
"""Values of model_type of encoders that a driver computes, when they are a class of these ends."""

ENCODER_CLASSES = (
    "Model",
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
)

# Such models that no driver computes, refused before gigabytes are fetched: they keep a state between tokens,
# or bend the scores of attention by distance. Only the driver knows all of them.
_UNPAGED = {"bamba", "bloom", "falcon_h1", "falcon_mamba", "jamba", "lfm2", "mamba", "mamba2", "mpt"}
_UNPAGED |= {"nemotron_h", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"}

PICKLES = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".npz",
    ".npy",
    ".joblib",
    ".ot",
)

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
TEXTS = (
    CONFIG,
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
"""The small files that are taken; the last three are of sentence-transformers."""

_POOLING = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}_Pooling)[/.]config\.json")
POOLINGS = "*_Pooling/config.json"
"""Where it is looked for in a folder."""

MAX_CONFIG = 4 * 1024 * 1024
MAX_TEMPLATE = 1024 * 1024

_LICENSE = re.compile(r"(?i)(licen[cs]e|copying)(\.(md|txt))?")
FLOATS = ("F32", "F16", "BF16")
# Buffers that old checkpoints carry; the code computes them.
_BUFFERS = re.compile(
    r".*(\.(attn|attention)\.(masked_)?bias|\.causal_mask|rotary_emb\.inv_freq|position_ids)"
)


class Chosen(NamedTuple):
    """The files to take of a folder: small ones and weights."""

    texts: list[str]
    weights: list[str]


class Assembled(Struct, frozen=True):
    """A model's small files, and what its manifest says about it."""

    texts: dict[str, bytes]
    architecture: str
    parameters: int
    quantization: str
    context_length: int
    license: str


# -- which files -------------------------------------------------------------------------------------


def refuse_code(names: Iterable[str]) -> None:
    """Raises RefusedFile naming the Python files among `names`."""
    if code := sorted(name for name in names if name.endswith((".py", ".pyc", ".so"))):
        raise RefusedFile(
            f"the source holds code: {', '.join(code)[:300]}",
            hint="LLMasOS runs no code that comes with a model; import a copy without it",
            file=code[0],
        )


def is_pooling(name: str) -> bool:
    """Whether it says how an encoder's vectors are pooled: 1_Pooling/config.json, in its source's folder."""
    return _POOLING.fullmatch(name) is not None


def kept_as(name: str) -> str:
    """What a file is called that its source has in a folder: a model's files have no folders."""
    return name.replace("/", ".") if is_pooling(name) else name


def choose(names: Iterable[str], read: Callable[[str], bytes]) -> Chosen:
    """Which files to take of a folder of `names`, whose small files `read` reads. Raises RefusedFile,
    UnsupportedModel, Corrupt."""
    present = set(names)
    if CONFIG in present:
        check_config(read(CONFIG))
    elif ADAPTER_CONFIG in present:
        raise RefusedFile(
            "the source holds an adapter",
            hint="name it BASE+NAME, of the model that it is for",
            file=ADAPTER_CONFIG,
        )
    poolings = {name for name in present if is_pooling(name)}
    weights = choose_weights(present - poolings, read(INDEX) if INDEX in present else None)
    # A GGUF file holds all that a model needs.
    texts = [] if weights[0].endswith(".gguf") else sorted(poolings | present.intersection(TEXTS))
    return Chosen(texts, weights)


def choose_weights(names: Iterable[str], index: bytes | None = None) -> list[str]:
    """The weight files to take of a folder: those that `index` (the content of INDEX) names, or the one
    safetensors file, or the one GGUF file. Raises RefusedFile when there are only pickles, or when it is
    not clear which file is meant."""
    present = set(names)
    if index is not None:
        return _of_index(index, present)
    tensors = sorted(name for name in present if name.endswith(".safetensors"))
    if "model.safetensors" in tensors:
        return ["model.safetensors"]
    found = tensors or sorted(name for name in present if name.endswith(".gguf"))
    if len(found) == 1:
        return found
    if found:
        raise RefusedFile(
            f"which of these weights? {', '.join(found)[:500]}",
            hint="name the one file: hf:owner/repo/FILE.gguf or file:/path/FILE.gguf",
        )
    if pickles := sorted(name for name in present if name.endswith(PICKLES)):
        raise RefusedFile(
            f"the weights are only there as {', '.join(pickles)[:300]}, which can run code when read",
            hint="only .safetensors and .gguf are read; ask the author for them",
            file=pickles[0],
        )
    raise RefusedFile("the source holds no weights", hint="LLMasOS reads .safetensors and .gguf files")


def _of_index(index: bytes, present: set[str]) -> list[str]:
    weight_map = parse_json(INDEX, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise Corrupt(f"{INDEX} has no weight_map", file=INDEX)
    files = sorted(set(weight_map.values()))
    for name in files:
        if "/" in name or not name.endswith(".safetensors"):
            raise RefusedFile(
                f"{INDEX} names {name[:120]!r}", hint="only .safetensors files are read", file=name[:120]
            )
        if name not in present:
            raise Corrupt(f"{INDEX} names {name}, which is missing", file=name)
    if not files:
        raise Corrupt(f"{INDEX} names no file", file=INDEX)
    return files


def is_license(name: str) -> bool:
    """Whether a file of this name holds the license's text."""
    return _LICENSE.fullmatch(name) is not None


def license_of_card(card: str) -> str:
    """The license's id in the front matter of a model card (README.md), or ""."""
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:[ \t]*([\w.-]{1,64})[ \t]*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else ""


# -- what is in them ---------------------------------------------------------------------------------


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """A JSON object, whose texts are Unicode and whose numbers are finite. Raises Corrupt."""
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as problem:
        raise Corrupt(f"{name} is no JSON: {problem}", file=name) from None
    if not isinstance(found, dict):
        raise Corrupt(f"{name} holds no JSON object", file=name)
    return found


def check_config(data: bytes) -> dict[str, Any]:
    """config.json, if it is of a model that can be computed without foreign code.

    Raises RefusedFile, UnsupportedModel, Corrupt.
    """
    if len(data) > MAX_CONFIG:
        raise RefusedFile(f"config.json of {len(data)} bytes", file="config.json")
    config = parse_json("config.json", data)
    if "auto_map" in config:
        raise RefusedFile(
            "config.json has an auto_map: this model wants its own code to be run",
            hint="LLMasOS runs no code that comes with a model",
            file="config.json",
        )
    if config.get("quantization_config"):
        raise UnsupportedModel("weights quantised for transformers", hint="try the full model or a GGUF file")
    _check_architecture(config)
    check_sizes(config)
    return config


def _check_architecture(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel unless it is one of ours or may be one that transformers computes."""
    kind, classes = config.get("model_type"), config.get("architectures")
    if kind in ARCHITECTURES:
        return
    named = isinstance(kind, str) and re.fullmatch(r"[\w.-]{1,64}", kind) is not None
    names = [str(name) for name in classes] if isinstance(classes, list) else []
    if kind in ENCODERS and all(name.endswith(ENCODER_CLASSES) for name in names):
        return
    decoder = any(name.endswith(DECODERS) for name in names)
    if not named or not decoder or kind in _UNPAGED or config.get("is_encoder_decoder"):
        raise UnsupportedModel(
            f"no support for the architecture {str(kind)[:40]!r}",
            hint=f"known: {', '.join(ARCHITECTURES)}, decoders (…ForCausalLM) that transformers knows, and "
            f"encoders: {', '.join(ENCODERS)}",
        )


class _Habits(Struct):
    """What is read of generation_config.json and is no t.Sampling."""

    do_sample: bool = False
    max_new_tokens: Annotated[int, Meta(ge=0)] = 0
    max_length: Annotated[int, Meta(ge=0)] = 0
    num_beams: Annotated[int, Meta(ge=1, le=16)] = 1
    length_penalty: Annotated[float, Meta(ge=-10, le=10)] = 1.0
    early_stopping: bool | Literal["never"] = False


_UNREAD = {"seed", "stop_token_ids", "logprobs", "prompt_logprobs", "grammar"}  # there


def check_generation(file: str, said: Mapping[str, Any]) -> None:
    """Raises Corrupt for a value with which no request could be made, as transformers refuses it then."""
    given = {name: value for name, value in said.items() if value is not None}
    sampling = {n: given[n] for n in t.Sampling.__struct_fields__ if n in given and n not in _UNREAD}
    ends = given.get("eos_token_id", [])
    sampling["stop_token_ids"] = ends if isinstance(ends, list) else [ends]
    try:
        msgspec.convert(given, _Habits)
        msgspec.convert(sampling, t.Sampling)
    except msgspec.ValidationError as problem:
        what = str(problem).replace("stop_token_ids", "eos_token_id").replace("$.", "")
        raise Corrupt(f"{file}: {what}", hint="correct the field, or leave it out", file=file) from None


def check_template(template: str) -> bytes:
    """A chat template as stored. Raises RefusedFile when it is too long to be one."""
    data = template.encode()
    if len(data) > MAX_TEMPLATE:
        raise RefusedFile(f"a chat template of {len(data)} bytes", file="chat_template.jinja")
    return data


def check_tokenizer(data: bytes) -> Any:
    """The tokenizer that tokenizer.json holds. Raises Corrupt."""
    from tokenizers import Tokenizer  # only importers need it

    try:
        return Tokenizer.from_str(data.decode())
    except MemoryError:
        raise
    except BaseException as problem:  # a panic in Rust is no Exception
        if isinstance(problem, (KeyboardInterrupt, SystemExit)):
            raise
        raise Corrupt(f"tokenizer.json: {str(problem)[:200]}", file="tokenizer.json") from None


def most_of(tensors: Iterable[tuple[str, int]]) -> str:
    """The type that most numbers have, of (type, numbers) of each tensor."""
    total: dict[str, int] = {}
    for kind, size in tensors:
        total[kind] = total.get(kind, 0) + size
    return max(total, key=lambda kind: total[kind])


# -- the files that every model has ------------------------------------------------------------------


def assemble(texts: Mapping[str, bytes], weights: Mapping[str, Path]) -> Assembled:
    """Completes a folder in Hugging Face's layout: `texts` its small files, `weights` where its safetensors
    lie. Raises RefusedFile, UnsupportedModel, Corrupt."""
    if "config.json" not in texts:
        raise RefusedFile("the source has no config.json", hint="give a folder as transformers saves it")
    config = check_config(texts["config.json"])
    index = _index(weights)
    done = {name: data for name, data in texts.items() if name in (*TEXTS, "LICENSE") or is_pooling(name)}
    done["tensors.json"] = _json({"tensors": index})
    done |= _tokenizer_files(texts, config)
    if GENERATION in texts:
        check_generation(GENERATION, parse_json(GENERATION, texts[GENERATION]))
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        said = {name: config[name] for name in names if config.get(name) is not None}
        check_generation(CONFIG, said)
        done[GENERATION] = _json(said)
    sizes = [(entry["type"], math.prod(entry["shape"])) for entry in index.values()]
    check_sizes(config, len(sizes), sum(size for _, size in sizes))
    return Assembled(
        texts=done,
        architecture=config["model_type"],
        parameters=sum(size for _, size in sizes),
        quantization=most_of(sizes),
        context_length=_context_length(config, texts),
        license="",
    )


def _context_length(config: Mapping[str, Any], texts: Mapping[str, bytes]) -> int:
    """Tokens of a context, or of what an encoder reads at once. Raises Corrupt."""
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    length = next((config[name] for name in names if config.get(name)), 0)
    if not isinstance(length, int) or isinstance(length, bool):
        raise Corrupt(f"config.json: a context of {str(length)[:40]}", file="config.json")
    if config["model_type"] in ENCODERS:
        padding = config.get("pad_token_id")
        if length and config["model_type"] not in ("bert", "distilbert"):
            length -= (padding if isinstance(padding, int) else 1) + 1  # positions that stand for no token
        name = "sentence_bert_config.json"  # has what the model was trained for
        most = parse_json(name, texts[name]).get("max_seq_length") if name in texts else None
        length = min(length, most) if length and isinstance(most, int) and most > 0 else length
    if length <= 0:
        raise Corrupt("config.json does not say how long a context may be", file="config.json")
    return length


def _index(weights: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = {}
    for file, path in weights.items():
        for name, tensor in safetensors_index.read(path).items():
            if _BUFFERS.fullmatch(name):
                continue
            if tensor.dtype not in FLOATS:
                raise UnsupportedModel(
                    f"{name} is of type {tensor.dtype}", hint="F32, F16 and BF16 are computed"
                )
            if name in index:
                raise Corrupt(f"{name} is in {index[name]['file']} and in {file}")
            index[name] = {
                "file": file,
                "type": tensor.dtype,
                "shape": tensor.shape,
                "offset": tensor.offset,
                "nbytes": tensor.nbytes,
            }
    if not index:
        raise Corrupt("the weight files hold no weights")
    return index


def _tokenizer_files(texts: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer_config.json with at least bos_token, eos_token and add_bos_token; the chat template as its
    own file."""
    if "tokenizer.json" not in texts:
        raise UnsupportedModel(
            "the source has no tokenizer.json",
            hint="save one beside the weights: AutoTokenizer.from_pretrained(…).save_pretrained(folder)",
        )
    tokenizer = check_tokenizer(texts["tokenizer.json"])
    about = parse_json("tokenizer_config.json", texts.get("tokenizer_config.json", b"{}"))
    complete = dict(about)
    for name in ("bos", "eos"):
        number = config.get(f"{name}_token_id")
        first = number[0] if isinstance(number, list) and number else number
        token = tokenizer.id_to_token(first) if isinstance(first, int) and 0 <= first < 2**31 else None
        complete.setdefault(f"{name}_token", token)
    if not isinstance(complete.get("add_bos_token"), bool):
        # tokenizer.json decides: what stands before an empty text?
        bos = complete["bos_token"]
        content = bos.get("content") if isinstance(bos, dict) else bos
        complete["add_bos_token"] = tokenizer.encode("").tokens[:1] == [content]
    done = {}
    try:
        template = texts.get("chat_template.jinja", b"").decode()
    except UnicodeDecodeError:
        raise Corrupt("chat_template.jinja is no UTF-8", file="chat_template.jinja") from None
    if template := template or _template(complete.pop("chat_template", None)):
        done["chat_template.jinja"] = check_template(template)
    if complete != about or "tokenizer_config.json" not in texts:
        done["tokenizer_config.json"] = _json(complete)
    return done


def _template(found: object) -> str:
    """tokenizer_config.json holds a template, or a list of named ones of which "default" counts."""
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, indent=1).encode()
