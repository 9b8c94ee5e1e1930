"""Writes ``dist_ema/guide/reference.md`` from the docstrings of all public names: ``python .github/site/reference.py``.

Raises ValueError for a public name that has no docstring.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dist_ema
from dist_ema import errors, schedules

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "dist_ema" / "guide" / "reference.md"
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes")
#: The order of the calls of ShardedEMA on the page; others follow by name.
CALLS = ("update", "attach", "expect", "average_parameters", "copy_to", "full_state_dict", "iter_full_tensors")
CALLS += ("export", "save", "load", "snapshot", "state_dict", "load_state_dict", "reset", "rebind", "wait", "close")
#: What each trainer's module offers. They are read and not imported, since each imports its trainer.
TRAINERS = {"composer": "EMA", "lightning": "EMACallback", "transformers": "EMACallback", "accelerate": "prepare_ema"}


def markdown(text: str) -> str:
    """A docstring in Google's form, as Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)(\(\))?`", r"`\1\2`", text)
    text = text.replace("``", "`")
    lines: list[str] = []
    section, code = "", False
    for line in text.splitlines():
        heading = re.fullmatch(r"(\w+):", line)
        if heading and heading[1] in SECTIONS:
            section = heading[1]
            lines += [f"**{section}**", ""]
            continue
        if line and not line.startswith(" "):
            section = ""
        if line.startswith(">>>") and not code:
            lines.append("```pycon")
            code = True
        elif code and not line:
            lines.append("```")
            code = False
        entry = re.match(r"    (\S.*?): (.*)", line) if section else None
        if entry and section not in ("Returns", "Yields"):
            lines.append(f"- `{entry[1].strip('`')}`: {entry[2]}")
        elif section and line.startswith("    "):
            lines.append(line[4:] if section in ("Returns", "Yields") else "  " + line.strip())
        else:
            lines.append(line)
    return "\n".join([*lines, *(["```"] if code else [])]).strip()


def documented(name: str, text: str | None) -> str:
    """The Markdown of a name's docstring. Raises ValueError if there is none."""
    if not text or not text.strip():
        raise ValueError(f"{name} is public and has no docstring")
    return markdown(inspect.cleandoc(text))


def signature(name: str, target: Any) -> str:
    """A call as Python writes it, an argument a line if it is long."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(target).parameters.values()]
    shown = [str(parameter) for parameter in parameters if parameter.name != "self"]
    keywords = [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
    if keywords and not any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters):
        shown.insert(next(place for place, text in enumerate(shown) if text.split("=")[0] == keywords[0]), "*")
    line = f"{name}({', '.join(shown)})"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {each},\n" for each in shown) + ")"
    return f"```text\n{line}\n```"


def calls(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class, its own and inherited ones."""
    names = [name for name in dir(cls) if not name.startswith("_")]
    order = {name: place for place, name in enumerate(CALLS)}
    for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
        member = inspect.getattr_static(cls, name)
        if isinstance(member, (property, classmethod, staticmethod)) or inspect.isfunction(member):
            yield name, member


def described(level: str, name: str, target: Any) -> str:
    """A heading, the call, and its documentation."""
    if isinstance(target, property):
        return f"{level} {name}\n\n{documented(name, target.__doc__)}"
    function = target.__func__ if isinstance(target, (classmethod, staticmethod)) else target
    return f"{level} {name}\n\n{signature(name, function)}\n\n{documented(name, function.__doc__)}"


def trainer(module: str, name: str) -> str:
    """The part of an integration, read from its source."""
    source = (ROOT / "dist_ema" / "integrations" / f"{module}.py").read_text()
    body = ast.parse(source).body
    node = next(node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name)
    function = node
    if isinstance(node, ast.ClassDef):
        function = next(each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    for argument in [*arguments.args, *arguments.kwonlyargs, arguments.kwarg, arguments.vararg]:
        if argument is not None:
            argument.annotation = None
    shown = ast.unparse(arguments).removeprefix("self, ")
    full = f"dist_ema.integrations.{module}.{name}"
    return f"### {full}\n\n```text\n{name}({shown})\n```\n\n{documented(full, ast.get_docstring(node))}"


def page() -> str:
    """The whole page."""
    functions = [name for name in sorted(dist_ema.__all__) if inspect.isfunction(getattr(dist_ema, name))]
    kinds = [
        (name, kind)
        for name, kind in sorted(vars(schedules).items())
        if inspect.isclass(kind) and issubclass(kind, schedules.Schedule)
    ]
    failures = [(name, kind) for name, kind in vars(errors).items() if inspect.isclass(kind)]
    ema = dist_ema.ShardedEMA
    parts = [
        "# Reference",
        "Every public call, from its docstring. Import what is named here from `dist_ema`, `dist_ema.schedules`, "
        "`dist_ema.errors` and `dist_ema.integrations`; all else may change.",
        described("## ", "ShardedEMA", ema).replace("##  ", "## "),
        *(described("###", name, member) for name, member in calls(ema)),
        "## Functions",
        *(described("###", name, getattr(dist_ema, name)) for name in functions),
        "## Schedules",
        "Formulas and half lives are in [schedules](schedules.md).",
        *(described("###", name, kind) for name, kind in kinds),
        *(described("###", name, member) for name, member in calls(schedules.Schedule)),
        *(described("###", name, getattr(schedules, name)) for name in ("register", "from_dict")),
        "## Trainers",
        *(trainer(module, name) for module, name in TRAINERS.items()),
        "## Errors",
        *(f"### {name}\n\n{documented(name, kind.__doc__)}" for name, kind in failures),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
