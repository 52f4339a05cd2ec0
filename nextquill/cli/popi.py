"""The commands of `nextquill popi`, which write users' preferences as short texts."""

DESCRIPTION = (
    "Summarise users' preferences in words (POPI, arXiv 2510.17881): one model reads a user's signals and writes a "
    "short summary; another reads the summary and answers as the user would like."
)
SUBCOMMANDS = {
    "train": "Train the model that writes summaries, and the one that reads them, on preference pairs.",
    "summarize": "Write one summary for every user.",
    "summaries": "Show, edit or delete users' summaries.",
    "evaluate": "Measure how often the generator prefers the user's choice, without and with the summary.",
    "export": "Write prompts with summaries for a model behind an API.",
    "demo": "Train on synthetic users with hidden preferences, and read their summaries (in a checkout).",
}
