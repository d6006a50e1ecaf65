"""What the tests of deploy/ share: command lines, settings files and environment variables checked against the code."""

import re
import shlex
import tomllib
from pathlib import Path

import typer
from click import Group

from fedllm.cli import app
from fedllm.node.settings import NodeSettings, SuperLinkSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
_BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def check_command(arguments):
    """Parse a command line of fedllm as fedllm does, without running it."""
    assert arguments[0] == "fedllm", arguments
    context = typer.main.get_command(app).make_context("fedllm", list(arguments[1:]))
    while isinstance(context.command, Group):
        name, command, rest = context.command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(name, rest, parent=context)
    return context


def fedllm_commands(page):
    """The command lines of fedllm in a page's shell blocks, also behind `docker … exec` and the like."""
    text = page.read_text(encoding="utf-8")
    for block in _BASH.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace(";", " ; "), comments=True)
            for index, word in enumerate(words):
                rest = words[index + 1 :]
                # Behind a folder, a user or a release of that name comes no sub-command.
                if Path(word).name == "fedllm" and rest and re.fullmatch("[a-z]+", rest[0]):
                    end = next((i for i, w in enumerate(rest) if w in {"&&", "|", ">", ";", "&"}), len(rest))
                    yield ["fedllm", *rest[:end]]
                    break


def settings(text):
    """A settings file as the program reads it, whose kind its keys tell; the files that it names need not exist."""
    values = tomllib.loads(text)
    return (NodeSettings if "superlink" in values else SuperLinkSettings).model_validate(values)


def credentials(read):
    """Paths of certificates and keys in settings."""
    names = ("certificate", "private_key", "root_certificates")
    return {str(getattr(read, name)) for name in names if hasattr(read, name)}


def unknown_variables(names):
    """Environment variables of ours that no code reads."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "fedllm").rglob("*.py"))
    return {name for name in names if name.startswith("FEDLLM_") and f'"{name}"' not in source}
