"""Words that sampling options take. Apart from the rest, as ``--help`` does without torch."""

CFG_SCHEDULES = ("constant", "linear", "power-cosine")
TEMPERATURE_SCHEDULES = ("constant", "linear", "cosine")
NOISES = ("uniform", "gumbel")
