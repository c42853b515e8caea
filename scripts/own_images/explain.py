"""A plan in words: choices with their reasons, and warnings."""

from __future__ import annotations

from scripts.own_images.choices import MOST_EPOCHS, Plan

FEW = 100  # images per class
LEAST = 0.25  # share of the images to see, below which little is learned


def describe(plan: Plan) -> list[str]:
    """Return the choices and their reasons, a line each."""
    images, vq, options = plan.images, plan.tokenizer, plan.options
    counts, grid = images.counts.values(), plan.size // plan.tokenizer.downsample
    reason = "the largest at which both models see enough images in the budget"
    if not plan.seen():
        reason = "the smallest, as more pixels per image would leave too few training steps"
    if options.size is not None:
        reason = "as asked"
    trained = (
        f"{plan.tokenizer_epochs} epochs, {plan.tokenizer_steps:,} steps of {plan.tokenizer_batch}"
    )
    memorise = ", no more as they would memorise the images"
    network = "the features of the Inception network"
    if plan.classifier_epochs:
        network = f"a classifier's features ({plan.classifier_epochs} epochs, trained here), as "
        network += "pretrained_models/ has no Inception weights"
    shares = ", ".join(f"{name} {s / 60:.1f}" for name, s in plan.seconds.items())
    expected = sum(plan.seconds.values()) / 60
    return [
        f"images     {sum(counts):,} of {len(counts)} classes ({min(counts)} to {max(counts)} "
        f"each), shorter side {images.sides[0]} to {images.sides[-1]} pixels",
        f"split      {plan.used:,} to train on; {plan.held:,} held out as reference, "
        f"{plan.held:,} as real ones to compare with",
        f"size       {plan.size}x{plan.size}, {reason}",
        f"tokenizer  {vq.path or f'new {vq.name}'}, {vq.codebook} entries, {grid}x{grid} codes; "
        f"{trained if plan.tokenizer_epochs else 'used as it is'}",
        f"GPT        {plan.gpt}, n = {plan.n}; {plan.gpt_epochs} epochs, {plan.gpt_steps:,} steps "
        f"of {plan.gpt_batch}{memorise if plan.gpt_epochs == MOST_EPOCHS else ''}",
        f"metrics    {plan.samples:,} samples; {network}",
        f"minutes    {expected:.1f} of {options.budget:g} expected: {shares}",
    ]


def warnings(plan: Plan) -> list[str]:
    """Return what may go wrong with these images and this budget, a sentence each."""
    return [*warnings_of_images(plan), *warnings_of_budget(plan)]


def warnings_of_images(plan: Plan) -> list[str]:
    """Return what may go wrong with these images."""
    images, names, found = plan.images, list(plan.images.counts), []
    if images.unreadable:
        found.append(
            f"{len(images.unreadable)} unreadable files are left out, such as "
            f"{images.unreadable[0]}"
        )
    if few := [c for c, n in images.counts.items() if n < FEW]:
        found.append(
            f"{len(few)} of {len(names)} classes have fewer than {FEW} images, such as {few[0]} "
            f"({images.counts[few[0]]}): the GPT will partly repeat them"
        )
    ids = ", ".join(f"{i} {name}" for i, name in enumerate(names[:3]))
    found.append(
        f"class ids follow the sorted names of the folders ({ids}{', ...' if names[3:] else ''}), "
        "not ImageNet's order: the class table of a GPT trained on ImageNet does not fit them"
    )
    if all(map(str.isdecimal, names)) and sorted(names, key=int) != names:
        found.append("the folders' names are numbers sorted as text: class ids differ from them")
    if plan.options.flip:
        found.append(
            "images are mirrored in training; for text, digits and all that has a left and a "
            "right take --no-flip"
        )
    if smaller := sum(side < plan.size for side in images.sides[:-1]):
        found.append(
            f"about {10 * smaller}% of the images are below {plan.size} pixels and will be enlarged"
        )
    return found


def warnings_of_budget(plan: Plan) -> list[str]:
    """Return what may go wrong with this budget."""
    budget, expected, found = plan.options.budget, sum(plan.seconds.values()) / 60, []
    if (total := sum(plan.images.counts.values()) - 2 * plan.held) > plan.used:
        found.append(
            f"{plan.used:,} of {total:,} training images are used: the budget or the memory has no "
            "room for more"
        )
    if plan.options.finetune and not plan.perceptual:
        found.append(
            "fine-tuning has the pixel loss alone, which makes a tokenizer trained with LPIPS or a "
            "GAN loss softer: see tokenizer/README.md"
        )
    if plan.read > 0.3:
        found.append(
            f"reading the files takes {plan.read:.0%} of the tokenizer's training: smaller copies "
            "of them train faster"
        )
    if plan.held < 50:
        found.append(
            f"{plan.held} images per held-out part: the metrics are rough, look at the pictures"
        )
    if not plan.seen(LEAST):
        found.append(
            f"{budget:g} minutes are too few for anything to be learned at {plan.size}x{plan.size} "
            "on this machine: take a larger --budget"
        )
    if expected > 1.1 * budget:
        found.append(f"the shortest possible run takes about {expected:.1f} minutes")
    return found
