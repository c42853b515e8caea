"""How many tokens each step predicts.

n regions hold T / n tokens each; the n tokens at one place of all regions are a round of n. A step
predicts tokens of one round only, so those predicted together are always in different regions. At
n = 16, 1 x 4 meaning four steps of one token:

    region    first round 1 x 16              then 16, 16, ...    the paper's, the default
    nested    first round 1 x 4, 4 x 3        then 16, 16, ...    24x24: 42 steps instead of 51
    written   1x4,4x3,2x8,4x4,16x33           any sizes whose sums meet every multiple of n

``nested`` repeats the paper's idea among the first tokens: they form a grid of their own, which is
decoded with n / 4 regions.
"""

from __future__ import annotations

import re
from itertools import accumulate, groupby


def step_sizes(schedule: str, n: int, num_tokens: int) -> tuple[int, ...]:
    """Return the tokens of each step for ``--schedule``; ``ValueError`` says what does not fit."""
    rounds = num_tokens // n
    if schedule == "region":
        return (1,) * n + (n,) * (rounds - 1)
    if schedule == "nested":
        return (*nested_start(n), *(n,) * (rounds - 1))
    return written_sizes(schedule, n, num_tokens)


def canonical(schedule: str, n: int, num_tokens: int) -> str:
    """Return the name of a schedule, the same for all that are the same; ``step_sizes`` checks it.

    Written sizes keep their own name where the paper's order of regions is another than theirs.
    """
    sizes = step_sizes(schedule, n, num_tokens)
    reordered = n > 4 and n % 4 == 0  # the regions, in all orders but the paper's
    if schedule == "region" or (not reordered and sizes == step_sizes("region", n, num_tokens)):
        return "region"
    if schedule == "nested" or (reordered and sizes == step_sizes("nested", n, num_tokens)):
        return "nested"
    return ",".join(f"{size}x{len(list(run))}" for size, run in groupby(sizes))


def nested_start(n: int) -> tuple[int, ...]:
    """Return the steps of the first round of n tokens: n / 4 / 4 ... alone, 4 or fewer, then
    growing groups.
    """
    alone = n
    while alone > 4:
        if alone % 4:
            raise ValueError(
                f"--schedule nested: n = {n} cannot be divided by 4 until 4 or fewer are left"
            )
        alone //= 4
    sizes = (1,) * alone
    while len(sizes) and sum(sizes) < n:
        sizes += (sum(sizes),) * 3
    return sizes


def written_sizes(schedule: str, n: int, num_tokens: int) -> tuple[int, ...]:
    """Return the sizes of a schedule such as ``1x4,4x3,16x35``: size x number of steps, ..."""
    sizes: list[int] = []
    for part in schedule.split(","):
        match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", part.strip())
        if match is None:
            raise ValueError(
                f"--schedule {schedule}: expected region, nested, or sizes such as 1x4,4x35, "
                f"not {part.strip()!r}"
            )
        size, steps = map(int, match.groups())
        if len(sizes) + steps > num_tokens:
            raise ValueError(f"--schedule {schedule}: more than {num_tokens} tokens")
        sizes += [size] * steps
    if sum(sizes) != num_tokens:
        raise ValueError(f"--schedule {schedule}: {sum(sizes)} tokens, but there are {num_tokens}")
    ends = set(accumulate(sizes))
    for end in range(n, num_tokens, n):
        if end not in ends:
            raise ValueError(
                f"--schedule {schedule}: a step goes beyond token {end}; tokens of a step must be "
                f"in different regions, so a step must end at every multiple of n = {n}"
            )
    return tuple(sizes)
