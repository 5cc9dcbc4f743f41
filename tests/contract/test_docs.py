"""The documentation leads somewhere: its links, the project's files that it names, and the flags in its commands exist."""

import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from baton import openrlhf as general
from baton.training.known import CONFIGS
from ppo import openrlhf

ROOT = Path(__file__).resolve().parents[2]
IGNORED = {line.strip("/*") for line in (ROOT / ".gitignore").read_text().splitlines()}
FOLDERS = sorted(
    path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name not in IGNORED
)
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))])
README = ROOT / "README.md"

LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
CODE_SPAN = re.compile(r"`([^`]+)`")
# A file of the project: a word that begins with one of its folders. NAME, FILE and the like are the reader's to fill in.
PROJECT_FILE = re.compile(rf"(?<![\w./-])(?:\./)?((?:{'|'.join(FOLDERS)})/[\w./{{}},-]*\.(?:py|sh|yaml|env|md|txt))(?![\w/])")
PLACEHOLDER = re.compile(r"\b[A-Z]+\b")

# Flags that a program passes on to another one, or has from there.
PASSES_ON = {
    "scripts/test_gen.sh": "generation/get_hf2.py",
    "scripts/run_ppo.sh": "ppo/run_ppo.py",
    **dict.fromkeys((f"benchmarks/{name}.py" for name in ("dpo", "trainers", "distillation")), "benchmarks/sides.py"),
}
# Names of another toolkit that a program understands beside its own.
OF_OPENRLHF = {*general.NOT_PPO_NAMES, *general.NOT_PPO_DONE_ANYWAY, general.WHOLE, general.MICRO, "ipo"}
OTHER_NAMES = {
    "ppo/run_ppo.py": {*openrlhf.NAMES, *openrlhf.DONE_ANYWAY, "train_batch_size"},
    **dict.fromkeys((*CONFIGS, "generation/get_hf2.py"), OF_OPENRLHF),
}
PROGRAM = re.compile(r"(?:\./)?((?:\w+/)+\w+\.(?:py|sh))")

ids = {"ids": lambda page: str(page.relative_to(ROOT))}


def blocks_and_prose(page: Path) -> tuple[list[list[str]], list[str]]:
    """A page's code blocks (fenced, or indented by 4 and more after a blank line), as lines, and its other lines."""
    blocks: list[list[str]] = []
    prose: list[str] = []
    fenced = indented = False
    before = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            if fenced:
                blocks.append([])
        elif fenced:
            blocks[-1].append(line)
        elif line.startswith("    ") and (indented or not before.strip()):
            if not indented:
                blocks.append([])
            indented = True
            blocks[-1].append(line)
        else:
            indented = False
            prose.append(line)
        before = line
    return blocks, prose


def links(page: Path) -> list[tuple[Path, str]]:
    """The relative links of a page, as (path, anchor); the anchor is empty where there is none."""
    text = CODE_SPAN.sub(lambda span: "x" * len(span[0]), "\n".join(blocks_and_prose(page)[1]))
    targets = [unquote(target) for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    split = [target.partition("#") for target in targets]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in split]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for line in blocks_and_prose(page)[1]:
        if match := re.match(r"#{1,6} +(.*)", line):
            anchor = re.sub(r"[^\w\- ]", "", match[1].strip().lower()).replace(" ", "-")
            found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


def expanded(name: str) -> list[str]:
    """`a{b,c}d` as `abd`, `acd`; a name without braces as it is."""
    if match := re.fullmatch(r"(.*?)\{([^{}]*)\}(.*)", name):
        return [whole for choice in match[2].split(",") for whole in expanded(match[1] + choice + match[3])]
    return [name]


def named_files(page: Path) -> list[str]:
    """The project's files that a page names in backticks or in a command."""
    blocks, prose = blocks_and_prose(page)
    texts = [line for block in blocks for line in block] + CODE_SPAN.findall("\n".join(prose))
    names = [name for text in texts for word in PROJECT_FILE.findall(text) for name in expanded(word)]
    return [name for name in names if not PLACEHOLDER.search(Path(name).stem)]


def commands(page: Path) -> list[list[str]]:
    """The words of each command in a page's code blocks and backticks, comments removed and continued lines joined."""
    blocks, prose = blocks_and_prose(page)
    lines = [line for block in blocks for line in "\n".join(block).replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in CODE_SPAN.findall("\n".join(prose))]
    found = []
    for line in lines + spans:
        try:
            found.append(shlex.split(line, comments=True))
        except ValueError:  # a text with a lone quotation mark, which no shell would take either
            assert not PROGRAM.match(line.strip()), f"{page}: {line}"
    return found


def calls(page: Path) -> list[tuple[str, list[str]]]:
    """(program, its flags) of each command of a page that calls a program of the project."""
    found = []
    for words in commands(page):
        places = [i for i, word in enumerate(words) if (match := PROGRAM.fullmatch(word)) and (ROOT / match[1]).is_file()]
        if places:
            rest = words[places[0] + 1 :]
            rest = rest[: rest.index("--")] if "--" in rest else rest
            flags = [word.partition("=")[0] for word in rest if re.match(r"--\w", word)]
            found.append((PROGRAM.fullmatch(words[places[0]])[1], flags))
    return found


@cache
def own_flags(program: str) -> frozenset[str]:
    """The flags of a program: the fields of its Arguments, the options of its argparse, or those that its script reads."""
    text = (ROOT / program).read_text(encoding="utf-8")
    if program.endswith(".py") and "class Arguments(" in text:
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        names = {*module.Arguments.model_fields, *OTHER_NAMES.get(program, ()), "help"}
        return frozenset(f"--{name}" for name in names)
    pattern = r'add_argument\(\s*"(--\w+)"' if program.endswith(".py") else r"(?<![\w-])(--\w+)"
    passed_on = own_flags(PASSES_ON[program]) if program in PASSES_ON else frozenset()
    return frozenset(re.findall(pattern, text)) | {"--help"} | passed_on


@cache
def trainer_flags(program: str) -> frozenset[str]:
    """The fields of the trainer's configuration that a program takes as flags too; importing it takes seconds."""
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    config_class = getattr(module, "config_class", None)
    return frozenset(f"--{name}" for name in config_class().__dataclass_fields__) if config_class else frozenset()


def unknown_flags(page: Path) -> list[str]:
    """The flags in a page's commands that the program called does not have, each with the program."""
    found = []
    for program, flags in calls(page):
        unknown = [flag for flag in flags if flag not in own_flags(program)]
        if unknown and program.endswith(".py"):
            unknown = [flag for flag in unknown if flag not in trainer_flags(program)]
        found += [f"{program} {flag}" for flag in unknown]
    return found


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of a page."""
    return [
        f"{path}#{anchor}" if anchor else str(path)
        for path, anchor in links(page)
        if not path.exists() or (anchor and (path.suffix != ".md" or anchor not in anchors(path)))
    ]


def missing_files(page: Path) -> list[str]:
    """The project's files that a page names and that are not there."""
    return [name for name in named_files(page) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, **ids)
def test_every_relative_link_leads_to_a_file_and_to_a_heading_there(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, **ids)
def test_every_file_of_the_project_that_a_page_names_exists(page):
    assert missing_files(page) == []


@pytest.mark.parametrize("page", PAGES, **ids)
def test_every_flag_in_a_command_is_one_of_the_programs_arguments(page):
    assert unknown_flags(page) == []


def test_every_page_of_the_reference_is_reached_from_the_readme_by_links():
    reached, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead += [path for path, _ in links(page) if path.suffix == ".md" and path.exists() and path not in reached]
    assert set((ROOT / "docs").rglob("*.md")) - reached == set()


def test_the_readme_is_a_tutorial_of_two_screens():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 100


def test_the_documentation_names_every_program_that_users_call():
    named = {program for page in PAGES for program, _ in calls(page)} | {name for page in PAGES for name in named_files(page)}
    mains = {
        str(path.relative_to(ROOT))
        for name in FOLDERS
        if name not in ("tests", "benchmarks", "baton", "docs")
        for path in (ROOT / name).glob("*.py")
        if "(Arguments, __doc__" in path.read_text(encoding="utf-8")
    }
    assert len(mains) > 10  # the rule still finds programs
    assert mains - named == set()


@pytest.mark.parametrize(
    ("text", "check", "found"),
    [
        ("[x](docs/nothing.md)", broken_links, ["nothing.md"]),
        ("[x](README.md#no-such-heading)", broken_links, ["no-such-heading"]),
        ("`configs/{zero2,zero9}.yaml`", missing_files, ["configs/zero9.yaml"]),
        ("Run:\n\n    bash scripts/test_gen.sh --K 2\n    bash ./scripts/no.sh", missing_files, ["scripts/no.sh"]),
        ("```\npython generation/get_hf2.py \\\n  --temprature 1  # --note\n```", unknown_flags, ["get_hf2.py --temprature"]),
        ("`bash scripts/test_gen.sh --K 2 --no_flag`", unknown_flags, ["test_gen.sh --no_flag"]),
        ("    accelerate launch --cpu sft/run_sft.py --max_samples 1 configs/sft.yaml", unknown_flags, []),
    ],
)
def test_a_broken_link_a_missing_file_and_a_wrong_flag_are_found_and_nothing_else(text, check, found, tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "README.md").write_text("# A heading\n")
    page.write_text(f"# Page\n\n{text}\n")
    problems = check(page)
    assert len(problems) == len(found) and all(problem.endswith(end) for problem, end in zip(problems, found, strict=True))
