"""Types of which a step of the loop fails, with the reason; a test fails once it does no longer."""

EXCEPTIONS = {
    "pp_chart2table": "its config is in no auto class that builds the class of its checkpoints",
    "shieldgemma2": "Transformers does not load what it saves: the tied head of the Gemma inside",
}
