"""YAML as this project reads and writes it: the core schema of YAML 1.2, which has no surprises in it.

PyYAML follows YAML 1.1, where 1e-3 is a string, 1:30 is 90, `no` is false and 010 is 8. Here a number is what a number
is in Python, and only `true` and `false` are booleans. What YAML can do beyond plain data (tags, anchors, aliases) is
refused: no experiment needs it, and aliases are how a small file grows without bound.
"""

import re
from collections.abc import Hashable, Iterator
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

MAX_CHARACTERS = 1 << 20
_MAX_DIGITS = 40

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:null|Null|NULL|~|)$")
_INT = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9]+(?:_[0-9]+)*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?"  # .5, 0.5, 1.5e-3
    r"|[0-9]+(?:_[0-9]+)*(?:\.[eE][-+]?[0-9]+|[eE][-+]?[0-9]+|\.)"  # 1e-3, 1.e-3, 1.
    r"|\.(?:inf|Inf|INF))$"
    r"|^\.(?:nan|NaN|NAN)$"
)


class YamlError(ValueError):
    """Text that is not YAML, or YAML that is refused; the message names line and column where they are known."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and nothing beyond plain data."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own protocol)

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # so it is in PyYAML's stubs
        if isinstance(event, yaml.events.AliasEvent) or getattr(event, "anchor", None):
            raise YamlError(f"anchors and aliases are not supported{_at(event.start_mark)}")
        if getattr(event, "tag", None):
            raise YamlError(f"the tag {event.tag!r} is not supported{_at(event.start_mark)}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Node, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, MappingNode):
            raise YamlError(f"a mapping of keys was expected{_at(node.start_mark)}")
        result: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise YamlError(f"the key {key!r} is not a name{_at(key_node.start_mark)}")
            if key in result:
                raise YamlError(f"the key {key!r} stands twice{_at(key_node.start_mark)}")
            result[key] = self.construct_object(value_node, deep=True)
        return result

    def construct_plain_mapping(self, node: MappingNode) -> Iterator[dict[Hashable, Any]]:
        yield self.construct_mapping(node, deep=True)

    def construct_core_int(self, node: ScalarNode) -> int:
        text = node.value.replace("_", "")
        if len(text) > _MAX_DIGITS:
            raise YamlError(f"a number of {len(text)} digits is too long{_at(node.start_mark)}")
        return int(text)

    def construct_core_float(self, node: ScalarNode) -> float:
        text = node.value.replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def construct_text(self, node: ScalarNode) -> str:
        text = str(node.value)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise YamlError(f"half a surrogate pair is not a character{_at(node.start_mark)}")
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would take for something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # an object that occurs twice is written twice

    def represent_text(self, text: str) -> ScalarNode:
        # PyYAML writes these as they are where it does not quote, and folds or drops them when reading.
        style = '"' if any(character in "\x85\u2028\u2029\ufeff" for character in text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    _kind.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_core_float)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_plain_mapping)


def parse(text: str) -> Any:
    """Plain data (None, bool, int, float, str, list, dict with text keys) of one YAML document, or YamlError."""
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"more than {MAX_CHARACTERS:,} characters are too many for a configuration")
    try:
        # _Loader derives from SafeLoader and makes plain data only.
        return yaml.load(text, Loader=_Loader)
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:
        what = error.problem or error.context or "it cannot be read"
        raise YamlError(f"not valid YAML: {what}{_at(error.problem_mark or error.context_mark)}") from error
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise YamlError("nested too deeply") from error


def write(data: Any) -> str:
    """YAML text of plain data, keys in their order; `parse` gives the same data back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def _at(mark: Any) -> str:
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
