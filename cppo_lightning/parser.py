"""The command line's parser: a misspelt key, class or value is answered with the nearest one that is known at its place."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn, cast

from lightning.pytorch.cli import LightningArgumentParser

# where classes may come from that are named in YAML
_LIBRARIES = ("cppo_lightning", "lightning.pytorch", "torch.optim")
# how the parser says that a value is for another of a setting's types
_NOT_THIS_TYPE = ("Expected a", "Import path", "Not a valid subclass", "Not of type")


class DryRun(argparse._HelpAction):
    """``--dry_run`` is remembered by its parser.  To jsonargparse it is no key, like ``--help``, so that no config has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "help": "Print what the run would come to (batches, memory, versions, a prompt)."})

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        cast("Parser", parser).dry_run = True


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are short and end with ``did you mean model.trust_region?`` where something is near."""

    dry_run = False  # whether the command line asked for one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # a key cut short is a misspelt key

    def print_usage(self, file: Any = None) -> None:
        """Nothing: 200 lines before an error would bury it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        near = None
        if self.exit_on_error:  # else it comes back as part of an outer parser's message
            near = nearest(message, self.keys())
        super().error(f"{message.rstrip()}; did you mean {near}?" if near else message, ex)

    def keys(self) -> set[str]:
        """Every key of this parser and of its subcommands, dotted."""
        found = set()
        for action in self._actions:
            if isinstance(action.choices, dict):  # the subcommands, each with a parser of its own
                found = found.union(*(parser.keys() for parser in action.choices.values()))
            found |= {option[2:] for option in action.option_strings if option.startswith("--")}
        return found


def nearest(message: str, keys: Collection[str]) -> str | None:
    """What the parser's error ``message`` should have been about, of the parser's ``keys``, known classes or allowed values.

    None where nothing is near (``difflib``'s usual cut at 0.6).
    """
    for look in (_of_arguments, _of_keys):
        if near := look(message, keys):
            return near
    for look in (_of_parameters, _of_classes, _of_values):
        if near := look(message):
            return near
    return None


def nearest_key(key: str, keys: Collection[str]) -> str | None:
    """The dotted ``key`` with its first part that is not known replaced by the nearest that is known at its place.

    What stands behind that part is kept where it makes a known key.
    """
    place, parts = "", key.split(".")
    for i, part in enumerate(parts):
        known = {k.removeprefix(place).split(".")[0] for k in keys if k.startswith(place)}
        if part not in known:
            near = _closest(part, known)
            whole = ".".join([f"{place}{near}", *parts[i + 1 :]])
            return near and (whole if whole in keys else f"{place}{near}")
        place += f"{part}."
    return None


def said_by_classes(message: str) -> str | None:
    """What classes said of their own arguments, of the parser's ``message`` that nothing could be made of a setting; None for
    another message.

    Where a setting may be of several types, the parser puts what the first said in front and hides the others.
    """
    found = re.match(
        r"Does not validate against any of the Union subtypes\n.*?Errors:\n(.*)\nGiven value type:", message, re.DOTALL
    )
    items = re.split(r"^  - ", found[1], flags=re.MULTILINE) if found else []
    said = [" ".join(item.split()) for item in items if item and not item.startswith(_NOT_THIS_TYPE)]
    return "; ".join(said) or None


def _of_arguments(message: str, keys: Collection[str]) -> str | None:
    found = re.search(r"unrecognized arguments: (.*)", message)
    given = re.findall(r"--([\w.]+)", found[1]) if found else []
    return ", ".join(filter(None, (nearest_key(key, keys) for key in given))) or None


def _of_keys(message: str, keys: Collection[str]) -> str | None:
    if found := re.match(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return nearest_key(f"{found[1]}.{found[2]}", keys)
    found = re.match(r"Option '([^']+)' is not accepted|Subcommand '\w+' does not accept option '([^']+)'", message)
    return nearest_key(found[1] or found[2], keys) if found else None


def _of_parameters(message: str) -> str | None:
    """A parameter of the class that is named last before the one that it does not have, or right after it."""
    found = re.search(r"Option '([^']+)' is not accepted", message)
    if not found:
        return None
    before = re.findall(r"class_path '([^']+)'", message[: found.start()])
    after = re.findall(r"class_path='([^']+)'", message[found.end() :])
    paths = before[-1:] or after[:1]
    return _closest(found[1].split(".")[0], _parameters(paths[0])) if paths else None


def _of_classes(message: str) -> str | None:
    modules = [m for m in list(sys.modules) if m.startswith(_LIBRARIES) and m.count(".") < 3]
    if found := re.search(r"class_path '([^']+)':\s+(?:No module named|module '[^']+' has no attribute)", message):
        module, _, name = found[1].rpartition(".")
        if module in sys.modules:  # a user's own, perhaps
            near = _closest(name, _classes(module))
            return near and f"{module}.{near}"
        return _closest(found[1], {f"{module}.{name}" for module in modules for name in _classes(module)})
    found = re.search(r"Expected a dot import path string: (\w+)", message)
    return _closest(found[1], {name for module in modules for name in _classes(module)}) if found else None


def _of_values(message: str) -> str | None:
    allowed = [value for literal in re.findall(r"Literal\[([^\]]*)\]", message) for value in re.findall(r"'([^']*)'", literal)]
    found = re.search(r"(?:Got|Given) value: (\S+)", message)
    return _closest(found[1], allowed) if found else None


def _classes(module: str) -> list[str]:
    """Names of the public classes that an imported module offers."""
    return [name for name, value in vars(sys.modules[module]).items() if isinstance(value, type) and not name.startswith("_")]


def _parameters(class_path: str) -> list[str]:
    """Names that the constructor of an imported class takes, or hands on to those that it inherits from."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    inits: list[Callable[..., Any]] = [vars(c)["__init__"] for c in getattr(cls, "__mro__", ()) if "__init__" in vars(c)]
    return [p for init in inits if inspect.isfunction(init) for p in inspect.signature(init).parameters if p != "self"]


def _closest(word: str, known: Collection[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)
