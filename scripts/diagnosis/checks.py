"""The list of checks: to add one, write a function in a module beside this and list it here."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from scripts.diagnosis import files, golden, machine, resume, speed
from scripts.diagnosis.check import SLOW, Check

MACHINE, GOLDEN, TRAINING, FILES, SPEED = (
    "What the code needs",
    "Golden values (numbers of the published code, computed here)",
    "Training command (a tiny GPT)",
    "Your files",
    "Speed",
)
REPORT_IT = "do not trust results of this machine: run scripts/test.sh and report what fails"
SMALLER = "choose a smaller --gpt-model, or close other programs"


def list_checks(options: Namespace, devices: list[str]) -> list[Check]:
    """Return the checks to run, in order. devices: as ``machine.devices``, fastest kind first."""
    checks = machine_checks(devices)
    for device in devices:
        checks += golden_checks(device)
    checks += training_checks(devices)
    checks += file_checks(options)
    return checks + speed_checks(devices[0])


def machine_checks(devices: list[str]) -> list[Check]:
    """Return the checks of what the machine has."""
    main = devices[0]
    install = "install them: python3 -m pip install -r requirements.txt"
    compiler = (
        "install a C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) "
        "or set CXX to one; without, sampling on a CPU takes several times as long"
    )
    gpu = "install NVIDIA's driver and a build of torch for its CUDA version, see pytorch.org"
    room = "make room, or choose other folders with --output, TMPDIR and XDG_CACHE_HOME"
    idle = "close other programs and run the doctor again: its figures are too low"
    return [
        Check(MACHINE, "Packages", machine.check_packages, install, "any"),
        Check(MACHINE, "C++ compiler", machine.check_compiler, compiler, "any", 120, SLOW),
        Check(MACHINE, "NVIDIA GPU", machine.check_gpu, gpu, "any"),
        Check(MACHINE, "Memory", machine.check_memory, SMALLER, main),
        Check(MACHINE, "Disk", machine.check_disk, room, "any"),
        Check(MACHINE, "Other programs", machine.check_idle, idle, "any"),
        *(
            Check(MACHINE, "Precision", machine.check_precision, REPORT_IT, d)
            for d in dict.fromkeys((main, "cpu"))
        ),
    ]


def golden_checks(device: str) -> list[Check]:
    """Return the comparisons with the published code on one device; few on a further GPU."""

    def check(name: str, function: object, advice: str = REPORT_IT, **more: object) -> Check:
        return Check(GOLDEN, name, function, advice, device=device, **more)

    kind = device.partition(":")[0]
    greedy, stored, step = golden.check_greedy, golden.check_stored, golden.check_training
    checks = [
        check("GPT, logits and loss", golden.check_forward),
        check("Greedy decoding, torch's operators", partial(greedy, way="eager")),
    ]
    if kind == "cuda" and device != "cuda:0":
        return checks
    checks += [
        check("Tokenizer, codes and images", golden.check_tokenizer),
        check("Sampling filters and pixels", golden.check_sampling),
    ]
    if kind == "cpu":
        no_kernels = "sample with --no-compile, and report this with the file"
        bf16 = partial(stored, way="kernels", precision="bf16")
        checks += [
            check("Greedy decoding, our kernels", partial(greedy, way="kernels"), no_kernels),
            check("Decoding, our kernels, bfloat16 kept", bf16, "sample with --precision none"),
        ]
    for precision in ("bf16", "fp16") if kind != "mps" else ():  # where auto takes float32
        name, other = speed.NAMES[precision], "bf16 or none" if precision == "fp16" else "none"
        sampled = partial(stored, way="eager", precision=precision)
        trained = partial(step, precision=precision)
        checks += [
            check(f"Decoding, torch's operators, {name}", sampled, f"use --precision {other}"),
            check(f"Training step, {name} autocast", trained, f"use --mixed-precision {other}"),
        ]
    no_compile, compiling = "use --no-compile, or update torch", dict(limit=100, thorough=True)
    compiled = partial(step, precision="none", compiled=True)
    if kind != "mps":
        checks.append(check("Training step, torch.compile", compiled, no_compile, **compiling))
    if kind == "cuda":
        graph = partial(greedy, way="compiled", sizes=(4,))
        flex, dense = partial(compiled, attention="flex"), "train with --attention dense"
        flash = partial(step, precision="bf16", attention="flash")
        checks += [
            check("Greedy decoding, torch.compile in a CUDA graph", graph, no_compile, limit=100),
            check("Training step, FlexAttention", flex, dense, **compiling),
            check("Training step, flash attention, bfloat16 autocast", flash, dense),
        ]
    return checks


def training_checks(devices: list[str]) -> list[Check]:
    """Return the checks of the training command, on the first kind of device."""
    main = devices[0]
    count = sum(device.startswith("cuda") for device in devices)
    processes = max((n for n in (8, 4, 2) if n <= count), default=1)
    no_resume = "keep copies of checkpoints, and report this with the file"
    no_shards = "train with --data-parallel ddp, and check NCCL (NCCL_DEBUG=INFO) if there are GPUs"
    sharded = partial(resume.check_sharded, processes=processes)
    checks = [Check(TRAINING, "Checkpoint and resume", resume.check_resume, no_resume, main, 90)]
    if main != "mps":  # torch shards on CUDA and the CPU
        checks.append(Check(TRAINING, "Sharded weights (FSDP)", sharded, no_shards, main, 120))
    return checks


def file_checks(options: Namespace) -> list[Check]:
    """Return the checks of the files that were given."""
    again = "get the file again; pretrained_models/README.md has the links and hashes"
    extract = (
        "run extract_codes_c2i.sh again with the same options: it makes the damaged shards again; "
        "a dead codebook needs another tokenizer"
    )
    images = "expected is one folder per class with images in it"
    belong = "give the files of one run: codes and GPT need the tokenizer that they were made with"
    given = {
        "gpt_ckpt": Check(FILES, "--gpt-ckpt", files.check_gpt, again, "any", 120),
        "vq_ckpt": Check(FILES, "--vq-ckpt", files.check_vq, again, "any"),
        "code_path": Check(FILES, "--code-path", files.check_codes, extract, "any", 120),
        "data_path": Check(FILES, "--data-path", files.check_images, images, "any"),
    }
    checks = [check for name, check in given.items() if getattr(options, name) is not None]
    if len(checks) > 1:
        checks.append(Check(FILES, "Files together", files.check_together, belong, "any"))
    return checks


def speed_checks(device: str) -> list[Check]:
    """Return the measurements on one device."""

    def check(name: str, function: object, advice: str = SMALLER, **more: object) -> Check:
        return Check(SPEED, name, function, advice, device=device, late=SLOW, **more)

    published = {name: f"{name}, the published way" for name in ("Sampling", "Training step")}
    eager, cuda = "Sampling, torch's operators", device.startswith("cuda")
    throttled = "see nvidia-smi for other programs, power limit and temperature"
    sampled = {"the published way": published["Sampling"], "torch's operators": eager}
    trained = {"the published way": published["Training step"]}
    slow_sampling = (
        "compare --compile and --no-compile by hand (scripts/benchmarks/sampling.py), and give "
        "sampling all cores of an otherwise idle machine"
    )
    slow_training = "raise --batch if memory allows, and give it an otherwise idle machine"
    time_sampling, time_training = speed.check_sampling, speed.check_training
    precisions = ("none", "bf16", "fp16") if cuda else ("none", "bf16")
    products = (partial(speed.check_products, precision=p) for p in precisions)
    checks = [
        check("Memory, bytes per second", speed.check_bandwidth, limit=30),
        *(
            check(f"Products, {speed.NAMES[p]}", function, throttled if cuda else SMALLER, limit=30)
            for p, function in zip(precisions, products, strict=True)
        ),
        check(published["Sampling"], partial(time_sampling, way="published", others={}), limit=90),
        check(eager, partial(time_sampling, way="eager", others={}), limit=90),
        check(
            "Sampling, the default",
            partial(time_sampling, way="compiled", others=sampled),
            slow_sampling,
            limit=150,
            thorough=cuda,
        ),
        check(
            published["Training step"],
            partial(time_training, way="published", others={}),
            limit=90,
        ),
        check(
            "Training step, ours",
            partial(time_training, way="ours", others=trained),
            slow_training,
            limit=90,
        ),
    ]
    for way in ("compiled", "compiled, flex") if cuda else ():
        function = partial(time_training, way=f"ours, {way}", others=trained)
        checks.append(check(f"Training step, ours, {way}", function, slow_training, thorough=True))
    exact = "Sampling, the default against float32"
    checks.append(check(exact, speed.check_agreement, REPORT_IT, limit=120, thorough=True))
    return checks
