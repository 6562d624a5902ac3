"""Tokenizer folders in the styles of public models, built in the test: real files of the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

CORPUS = [
    "Given following image: and its background audio: . What is the colour of the small car on the left?",
    "A red car stands beside the house, and two children play with a ball. user assistant model system",
    "The rain falls on the tin roof while a dog barks. Is it heard twice? Yes, it is. No. I see nothing.",
]


class Style(NamedTuple):
    """How a public model's tokenizer and chat template look."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    added: tuple[str, ...] = ()
    llama: bool = False


_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
_LOOP = "{% for m in messages %}"
STYLES = {
    "qwen3": Style(
        _LOOP
        + "{%- set text = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content %}"
        "{{ '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ text + '<|im_end|>\\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{%- endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        "<|im_end|>",
        ("<think>", "</think>"),
    ),
    "llama3": Style(
        "{{ bos_token }}" + _LOOP + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": Style(
        "{{ bos_token }}"
        + _NO_SYSTEM
        + _LOOP
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{ m.content | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<table>",),
        llama=True,
    ),
    "smollm2": Style(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
        + _LOOP
        + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    ),
    "phi3": Style(
        _LOOP + "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|end|>"),
        "<s>",
        "<|endoftext|>",
        "<|end|>",
        ("<|user|>",),
        llama=True,
    ),
    "words": Style(
        _NO_SYSTEM
        + _LOOP
        + "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}",
        ("<s>", "</s>"),
        "<s>",
        "</s>",
        "</s>",
    ),
}


def write_folder(folder: Path, style: Style, **config: Any) -> Path:
    """A folder with ``tokenizer.json``, a trained BPE of bytes or with LLaMA's byte tokens, and its configuration."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if style.llama:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(steps)
        first = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=first, show_progress=False)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    if style.llama:  # byte tokens are plain entries of the vocabulary, not special tokens
        described = json.loads(made.to_str())
        described["added_tokens"] = []
        made = Tokenizer.from_str(json.dumps(described))
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in style.special])
    made.add_tokens([AddedToken(token, normalized=False, special=False) for token in style.added])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    values = {"chat_template": style.template, "bos_token": style.bos, "eos_token": style.eos}
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **values, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder
