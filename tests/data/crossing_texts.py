"""Templates, chat templates and texts that meet at their borders, for the tests of prompts."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from nextquill.data import PromptTemplate

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
SHOUTED = {token: token.upper().replace("<", "＜") for token in SPECIAL}  # noqa: RUF001
#: A normaliser joins or changes these to a special token.
DISGUISED = [*SHOUTED.values(), "<|ím_end|>", "<\u200b/s>", "＜|im_\u200bend|＞", "<\u00b4s>"]  # noqa: RUF001
COMPOSING = {
    "built-in": PromptTemplate(),
    "history-first": PromptTemplate(order="history_first", newest_first=True, show_dates=True),
    "labels": PromptTemplate(title_label="<", text_label="</", query_heading="<|"),
    "special-labels": PromptTemplate(title_label="<|im_start|>", text_label="<pad>"),
    **{
        name: PromptTemplate(prompt_jinja=source)
        for name, source in {
            "lower": "{% filter lower %}Q: {{ query }} {% for i in history %}{{ i.text }} {% endfor %}{% endfilter %}",
            "replace": "{% filter replace('x', '') %}Q: {{ query }}{% for i in history %} {{ i.text }}{% endfor %}"
            "{% endfilter %}",
            "slices": "{{ query[:3] }}{{ query[3:] }}{% for i in history %} {{ i.text[:5] }}{{ i.text[5:] }}"
            "{% endfor %}",
            "brackets": "<{{ query }}> {% for i in history %}<|{{ i.text }}|> </{{ i.title }}>{% endfor %}",
            "by-length": "Q: {{ query }} {% for i in history %}{% if i.text | length > 9 %}<pad>{% endif %}{{ i.text }}"
            " {% endfor %}",
        }.items()
    },
}
JOINING = {
    "chatml_tokenizer": None,
    "gemma_tokenizer": None,
    "plain_tokenizer": None,
    "normalising_tokenizer": None,
    "removes-spaces": "{% for m in messages %}<|im_start|>{{ m['content'] | replace(' ', '') }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}",
    "lower-case": "{% for m in messages %}<s>{{ m['content'] | lower }}</s>{% endfor %}",
    "adjoins": "{% for m in messages %}<{{ m['content'] }}|im_end|>{% endfor %}",
}
crossing = st.lists(
    st.sampled_from(
        [
            *SPECIAL,
            *DISGUISED,
            *("<", "|", "/", ">", "im_", "end|>", "s", "x", " ", "\n", "pad", "|im_end|", "S>", "word"),
        ]
    ),
    min_size=1,
    max_size=6,
).map("".join)


#: Chat templates whose borders are words.
ROLE_CHATS = {
    "vicuna": "A chat. {% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "alpaca": "{% for m in messages %}### {{ 'Instruction' if m['role'] == 'user' else 'Response' }}:\n"
    "{{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
}
ROLE_JINJA = "A chat. {% for i in history %}POST: {{ i.text }} {% endfor %}USER: {{ query }} ASSISTANT:"


def special_counts(tokenizer: Any, ids: list[int]) -> dict[str, int]:
    names = tokenizer.convert_ids_to_tokens(ids)
    return {name: names.count(name) for name in SPECIAL}
