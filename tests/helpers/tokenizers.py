"""Tokenizers of the common families, each with its real pre-tokenisation and a vocabulary small enough for a test."""

import json
import string
from collections.abc import Iterator
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from perce.demo import DATA_DIR

FAMILIES = ("gpt2", "qwen2", "llama3", "gemma", "llama2", "sentencepiece")
VOCAB = 900  # including added tokens, bytes and alphabet; merges fill the rest

BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<|endoftext|>"
SPECIAL = (
    BOS, EOS, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|user|>", "<|assistant|>",
    "<|system|>", "<|end|>", PAD, "[INST]", "[/INST]",
)  # fmt: skip
NOT_SPECIAL = ("<think>", "</think>", "<|plain_end|>")  # added, so never cut, but kept by skip_special_tokens

# How GPT-4's successors cut a text into words; Qwen takes one digit at a time, Llama 3 up to three.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "▁"
TRAINING_WORDS = rf"{SPACE}?\p{{L}}+|\p{{N}}|{SPACE}?[^\p{{L}}\p{{N}}{SPACE}]+|{SPACE}+"
NEWLINE_RUNS = tuple("\n" * n for n in range(1, 7))
SPACE_RUNS = tuple(SPACE * n for n in range(1, 9))

# Texts that the built-in rows lack: line ends after every punctuation mark, role names, digits, indentation, Markdown.
HEADINGS = ("system", "user", "assistant", "model", "About the user", "Who is it", "It's 2024, isn't it", "I said 17")
LINE_ENDS = (".", ":", "?", "!", ")", "...", "")
LAYOUT = "- one, two\n- three\n\n  * four\n    return 10 + 12\n\n\n# Six: (seven) 1234567890\n\n\n\n\t8 ünïts, 東京"


def _corpus() -> Iterator[str]:
    for line in (DATA_DIR / "validation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield "".join(f"- {entry}\n" for entry in row["persona"])
        said = [message["content"] for message in row["messages"]] if "messages" in row else [row["query"]]
        yield "\n\n".join([*said, f"{row['response']}\n"])
    for _ in range(20):  # often enough for merges of their own
        yield LAYOUT
        for end in LINE_ENDS:
            yield "".join(f"{heading}{end}\n{heading}{end}\n\n" for heading in HEADINGS)


def _add_tokens(tokenizer: Tokenizer) -> None:
    """Adds tokens that are matched in the raw text, before a normaliser can put a space in front of them."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])


def _begins_with_bos(tokenizer: Tokenizer) -> processors.PostProcessor:
    bos = (BOS, tokenizer.token_to_id(BOS))
    return processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[bos])


def _byte_level(family: str) -> Tokenizer:
    """BPE over bytes: each byte is a letter of its alphabet, so that it can encode every text."""
    tokenizer = Tokenizer(models.BPE())
    if family == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        words = WORDS % (r"\p{N}" if family == "qwen2" else r"\p{N}{1,3}")
        split = pre_tokenizers.Split(Regex(words), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(NOT_SPECIAL),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    _add_tokens(tokenizer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if family == "llama3":
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, _begins_with_bos(tokenizer)])
    return tokenizer


def _trained(runs: list[str], *, across_lines: bool) -> models.BPE:
    """BPE over characters, which writes unknown ones as bytes, "<0xE2>".

    SentencePiece splits text into words and digits when it trains, and not at all when it encodes. It trains line by
    line, so Llama 2 and Gemma have no token of a full stop and a newline; `across_lines` is for tokenizers with one.
    """
    teacher = Tokenizer(models.BPE())
    teacher.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    teacher.pre_tokenizer = pre_tokenizers.Split(Regex(TRAINING_WORDS), behavior="isolated")
    first = [UNK, *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *runs]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(first) - len(NOT_SPECIAL),
        initial_alphabet=[*string.digits, *string.ascii_letters, *string.punctuation, SPACE],
        show_progress=False,
    )
    texts = list(_corpus())
    teacher.train_from_iterator(texts if across_lines else [line for t in texts for line in t.splitlines()], trainer)
    learnt = json.loads(teacher.to_str())["model"]
    # Runs of one character come before all words, as in the real ones, with merges from every two shorter runs.
    merges = [(run[:cut], run[cut:]) for run in runs for cut in range(1, len(run))]
    merges += [pair for pair in map(tuple, learnt["merges"]) if pair not in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*first, *learnt["vocab"]]))}
    return models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)


def _byte_fallback(family: str) -> Tokenizer:
    """Spaces are letters, written "▁"; the families differ in whether and where they put one in front."""
    runs = [*SPACE_RUNS, *(NEWLINE_RUNS if family == "gemma" else ())]
    tokenizer = Tokenizer(_trained(runs, across_lines=family == "sentencepiece"))
    spaces = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if family == "gemma":
        tokenizer.normalizer = spaces
        # Never splits, because no space is left. The real one also has it.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif family == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    if family != "gemma":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    _add_tokens(tokenizer)
    if family != "sentencepiece":
        tokenizer.post_processor = _begins_with_bos(tokenizer)
    return tokenizer


@lru_cache
def tokenizer_like(family: str) -> PreTrainedTokenizerFast:
    """One of FAMILIES, without a chat template. All callers share it: deep-copy it before you change it.

    Encoding and decoding gives the text back, except that qwen2 composes characters (NFC), llama2 puts a space behind
    each added token, and sentencepiece drops one space at the beginning of the text.
    """
    assert family in FAMILIES, family
    byte_level = family in ("gpt2", "qwen2", "llama3")
    tokenizer = _byte_level(family) if byte_level else _byte_fallback(family)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=None if byte_level else UNK,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
