"""What README and docs/ say is true of the code: commands parse, links resolve, blocks of Python run, quoted messages exist."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import torch
from torch import nn

import granq_plugin.zero_shot
from granq_plugin.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8")
         for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
QUOTED = re.compile(r"\*\*`([^`]+)`\*\*")


def prose(page: str) -> str:
    return FENCE.sub("", page)


def spans(page: str) -> list[str]:
    """Inline code, quoted messages left out; it may go on in the next line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", QUOTED.sub("", prose(page)))]


# --- commands


def commands(command: click.Command, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command below one, by its words."""
    found = {words: command}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found |= commands(command.get_command(context, name), (*words, name))
    return found


COMMANDS = commands(cli)


def parse(line: str, mention: bool = False) -> None:
    """Parse a line ``granq ...`` as the command line does, without running it. Raises a click.UsageError.

    Args:
        mention: it stands in a sentence: arguments may be missing, and of alternatives ``a|b`` the first counts.
    """
    if mention:
        line = re.sub(r"\\?\|\S*", "", line.replace(" B ", " 4 ")).replace("...", "")
    command, (_, *words) = cli, shlex.split(line, comments=True)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        _, command, words = command.resolve_command(click.Context(command), words)
    words = [word for word in words if word not in ("-h", "--help", "--help-config")]  # these print and exit
    try:
        command.make_context(line, words)
    except click.MissingParameter:
        if not (mention or "--help" in line):
            raise
    except click.exceptions.NoArgsIsHelpError:  # a group without a verb
        pass


def lines_of(page: str) -> list[str]:
    """The commands ``granq ...`` in blocks of bash."""
    blocks = [text.replace("\\\n", " ") for language, text in FENCE.findall(page) if language == "bash"]
    parts = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [part for part in parts if part.startswith("granq ")]


def mentions_of(page: str) -> list[str]:
    return [span for span in spans(page) if re.match(r"granq [a-z-]", span) and ":" not in span.split()[1]]


def examples_of(command: click.Command) -> list[str]:
    return re.findall(r"^ +(granq .*)", (command.help or "").partition("Example:")[2], re.M)


def test_lines_are_found():
    assert len(lines_of(PAGES["README.md"])) >= 10 and len(mentions_of(PAGES["README.md"])) >= 10


@pytest.mark.parametrize("name", PAGES)
def test_commands_in_pages_parse(name):
    for line in lines_of(PAGES[name]):
        parse(line)
    for line in mentions_of(PAGES[name]):
        parse(line, mention=True)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_of_itself_that_parses(words):
    lines = examples_of(COMMANDS[words])
    assert lines and all(line.split()[1:1 + len(words)] == list(words) for line in lines)
    for line in lines:
        parse(line)


@pytest.mark.parametrize("line, mention", [
    ("granq quantise x", True), ("granq qat --bits 3", True), ("granq export RUN --format tflite --out x", True),
    ("granq zoo lists", True), ("granq qat resnet20_cifar10", False), ("granq report a b", False),
    ("granq qat x --out r --weight-bits 0", False)])
def test_a_wrong_command_is_found(line, mention):
    with pytest.raises(click.UsageError):
        parse(line, mention)


# --- links


def anchors(page: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ +(.*?)\s*$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(name: str, page: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "code", prose(page))):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (ROOT / name).parent / path
        is_broken = bool(path) and not file.exists()
        if not is_broken and anchor:
            is_broken = anchor not in anchors(file.read_text(encoding="utf-8") if path else page)
        broken += [target] if is_broken else []
    return broken


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name):
    assert broken_links(name, PAGES[name]) == []


def test_a_broken_link_is_found():
    page = "# One & two\n[a](#one--two) [b](#three) ![c](no.png) [d](results.md#speed) [e](results.md#haste) [f](https://x.org/#y)"
    assert broken_links("docs/page.md", page) == ["#three", "no.png", "results.md#haste"]


@pytest.mark.parametrize("name", PAGES)
def test_benchmarks_that_are_named_exist(name):
    named = {*re.findall(r"python -m\s+benchmarks\.(\w+)", PAGES[name]), *re.findall(r"`benchmarks\.(\w+)`", PAGES[name])}
    assert {module for module in named if module != "X" and not (ROOT / "benchmarks" / f"{module}.py").is_file()} == set()


# --- messages


def rendered(node: ast.AST) -> str:
    """The text of an expression that makes a string; what is computed becomes a NUL."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(rendered, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return rendered(node.left) + rendered(node.right)
    return "\0"


def strings_of(source: str) -> set[str]:
    return {rendered(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)}


def quoted(page: str) -> list[str]:
    return [" ".join(message.split()) for message in QUOTED.findall(prose(page))]


def is_said(message: str, strings: list[str]) -> bool:
    """Whether one string of the source has the literal pieces of a message in their order."""
    pieces = [piece for piece in re.split(r"\{\w+\}|…", message) if piece.strip()]
    assert sum(map(len, pieces)) >= 10, f"{message} could be anything"
    pattern = re.compile(".*".join(map(re.escape, pieces)), re.S)
    return any(pattern.search(string) for string in strings)


@pytest.fixture(scope="module")
def strings():
    files = [file for folder in ("granq_plugin", "zoo") for file in (ROOT / folder).rglob("*.py")]
    return sorted(set().union(*(strings_of(file.read_text(encoding="utf-8")) for file in files)))


def test_messages_quoted_in_troubleshooting_are_those_of_the_code(strings):
    messages = quoted(PAGES["docs/troubleshooting.md"])
    assert len(messages) >= 30
    assert [message for message in messages if not is_said(message, strings)] == []


def test_a_message_that_nothing_says_is_found():
    strings = strings_of('f"no zoo entry {name!r}; " "did you mean: " + f"{near}"')
    assert is_said("no zoo entry {name}; did you mean: {names}", strings)
    assert not is_said("no zoo entry called {name}; did you mean: {names}", strings)
    assert not is_said("did you mean: {names} no zoo entry", strings)


# --- Python


class Network(nn.Module):
    """With the layers that README names."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.layer4 = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.flatten(self.pool(self.layer4(self.relu(self.bn(self.conv(x)))))))


def blocks_of(page: str) -> list[str]:
    return [text for language, text in FENCE.findall(page) if language == "python"]


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_are_python(name):
    for block in blocks_of(PAGES[name]):
        compile(block, name, "exec")


def test_readmes_python_runs_in_its_order(tmp_path, monkeypatch):
    """Each block sees the names of those before it, ``model``, ``teacher`` and data; settings are cut to one iteration."""
    whole = granq_plugin.zero_shot.preset
    small = dict(image_size=8, batch_size=4, memory_size=4, epochs=1, iterations=1, warmup_epochs=0)
    monkeypatch.setattr(granq_plugin.zero_shot, "preset", lambda name, **changes: whole(name, **small | changes))
    monkeypatch.chdir(tmp_path)
    images = torch.rand(8, 3, 8, 8)
    names = dict(torch=torch, model=Network().eval(), teacher=Network().eval(), calibration_batches=[images])
    names["example_input"] = images[:1]
    blocks = blocks_of(PAGES["README.md"])
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        if "static" in names and not Path("static.pt").exists():  # README: "Save and load state dicts"
            torch.save(names["static"].state_dict(), "static.pt")
    for name in ("conv", "act", "quantized", "static", "student", "result", "deployed"):
        assert name in names, f"README defines no {name}"
    assert torch.isfinite(names["static"](images)).all() and Path("net.onnx").stat().st_size > 1000
    for call in (span for page in PAGES.values() for span in spans(page) if span.startswith("preset(")):
        eval(call, dict(preset=whole))
