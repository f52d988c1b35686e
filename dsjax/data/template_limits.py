"""A Jinja environment whose templates end soon and stay small, whatever they say.

A chat template comes with a model, so from anywhere. Jinja's sandbox keeps it from what it must
not touch, but not from running for ever or filling the memory. Here every loop and call looks at
the time that the thread has used, and whatever makes a value much longer than those it is made of
is measured before it is done.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

# For a conversation of n characters: of one value, of all values made, and seconds.
_VALUE_CHARS, _VALUE_CHARS_EACH = 1 << 20, 16
_TOTAL_CHARS, _TOTAL_CHARS_EACH = 1 << 26, 1024
_SECONDS, _SECONDS_EACH = 1.0, 1e-5
# What takes longer a character than all else may get that much less.
_SLOW, _SLOW_FILTERS = 8, frozenset({"pprint", "urlize", "wordwrap", "striptags", "xmlattr"})
_INTEGER_BITS = 1 << 14
_PRECISION = 300


class TemplateLimitError(jinja2.TemplateError):
    """A template ran for too long or made too much."""


class Budget:
    """What one rendering may still use."""

    def __init__(self, num_chars: int = 0) -> None:
        """Makes the budget of a conversation of so many characters."""
        self.value_chars = _VALUE_CHARS + _VALUE_CHARS_EACH * num_chars
        self._left = _TOTAL_CHARS + _TOTAL_CHARS_EACH * num_chars
        self._end = time.thread_time() + _SECONDS + _SECONDS_EACH * num_chars

    def tick(self, num_chars: int = 0) -> None:
        """Counts characters that are written out; raises TemplateLimitError past the limits."""
        self._left -= num_chars
        if self._left < 0:
            raise TemplateLimitError("it writes too much")
        if time.thread_time() > self._end:
            raise TemplateLimitError("it runs for too long")

    def require(self, size: int) -> None:
        """Refuses a value of so many characters or items before it is made."""
        self.tick()
        if size > self.value_chars:
            raise TemplateLimitError(f"it makes a value of {size} characters or items")

    def take(self, value: Any) -> Any:
        """Counts a value that was made, all that it holds as often as it holds it."""
        self.require(weight(value, self.value_chars))
        self.tick(len(value) if isinstance(value, str | bytes | list | tuple) else 0)
        return value


BUDGET: ContextVar[Budget] = ContextVar("budget")


def weight(value: Any, most: int) -> int:
    """Returns the characters and items in a value, or some number above `most`."""
    total, stack = 0, [value]
    while stack and total <= most:
        item = stack.pop()
        total += 1
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            stack += item
        elif isinstance(item, jinja2.utils.Namespace):
            # A template reads and writes the attributes of one; they are not Python's.
            stack += object.__getattribute__(item, "_Namespace__attrs").values()
    return total


def _budget() -> Budget:
    return BUDGET.get(None) or Budget()  # a template may be compiled outside of a rendering


def _longest(values: Iterable[Any], most: int) -> int:
    return max((weight(value, most) for value in values), default=0)


def _largest(values: Iterable[Any]) -> int:
    return max((abs(int(v)) for v in values if isinstance(v, int | float) and v == v), default=0)


def _formatted(text: str, sign: str, values: list[Any], most: int) -> int:
    """Bounds the length of what a format gives: widths as written, or given as values."""
    fields = text.count(sign)
    widths = sum(int(digits[:20]) for digits in re.findall(r"\d+", text))
    given = _largest(values) if "*" in text or ":" in text else 0
    return len(text) + widths + fields * (_longest(values, most) + given)


def _replaced(value: str, old: Any, new: Any) -> int:
    return len(value) + (value.count(str(old)) if old else len(value) + 1) * len(str(new))


def _joined(separator: Any, items: list[Any], most: int) -> int:
    return weight(items, most) + len(items) * len(str(separator))


def _check(name: str, value: Any, given: list[Any], options: Mapping[str, Any]) -> None:
    """Measures what a filter or a method of a string is about to make."""
    budget = _budget()
    operands = [*given, *options.values()]
    most = budget.value_chars
    if name in ("center", "ljust", "rjust", "zfill", "batch", "slice", "to_bytes"):
        budget.require(_largest(operands))
        budget.tick(_largest(operands))
    elif name == "expandtabs":
        budget.require(str(value).count("\t") * (_largest(operands) or 8))
    elif name in ("replace", "translate"):
        if name == "replace" and len(given) >= 2:
            budget.require(_replaced(str(value), given[0], given[1]))
        else:
            budget.require(len(value) * _longest(operands, most))
    elif name in ("indent", "tojson"):
        lines = str(value).count("\n") + 1 if name == "indent" else weight(value, most)
        texts = [len(item) for item in operands if isinstance(item, str)]
        budget.require(lines * max(_largest(operands), *texts, 1))
    elif name in ("urlize", "wordwrap"):
        texts = [len(item) for item in operands if isinstance(item, str)]
        budget.require(len(str(value)) * max(*texts, 1, 1))
    elif name == "round" and _largest(operands) > _PRECISION:
        raise TemplateLimitError(f"it rounds to {_largest(operands)} digits")
    elif name == "sum" and not all(isinstance(o, int | float | str | None) for o in operands):
        budget.require(len(value) * weight(value, most))
    if name in _SLOW_FILTERS:
        budget.require(_SLOW * weight(value, most))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # after the context

    @functools.wraps(function)
    def bounded(*args: Any, **options: Any) -> Any:
        before, value, given = args[:first], args[first], list(args[first + 1 :])
        budget = _budget()
        if name in ("join", "sum", "list") and not isinstance(value, str | Mapping):
            value = list(_counted(value))
        if name == "join":
            separator = given[0] if given else options.get("d", "")
            budget.require(_joined(separator, list(value), budget.value_chars))
        elif name == "format":
            values = [*given, *options.values()]
            budget.require(_formatted(str(value), "%", values, budget.value_chars))
        else:
            _check(name, value, given, options)
        return budget.take(function(*before, value, *given, **options))

    bounded.is_limited = True  # type: ignore[attr-defined]
    return bounded


def _counted(items: Iterable[Any]) -> Iterable[Any]:
    budget = _budget()
    for count, item in enumerate(items):
        budget.require(count)
        yield item


class _Ticking(jinja2.visitor.NodeTransformer):
    """Lets every loop, macro and block count, and every list and `~` be measured."""

    def _ticking(self, node: Any) -> Any:
        node = self.generic_visit(node)
        texts = (data.data for data in node.find_all(jinja2.nodes.TemplateData))
        count = jinja2.nodes.Const(sum(map(len, texts)), lineno=node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(_call("tick", [count]), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _ticking

    def _measured(self, node: Any) -> Any:
        node = self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _call("measured", [node])

    visit_List = visit_Tuple = visit_Dict = _measured

    def visit_Concat(self, node: Any) -> Any:
        parts = [self.visit(part) for part in node.nodes]
        return _call("concatenated", parts)


def _call(name: str, arguments: list[Any]) -> jinja2.nodes.Call:
    lineno = arguments[0].lineno if arguments else 0
    function = jinja2.nodes.EnvironmentAttribute(name, lineno=lineno)
    return jinja2.nodes.Call(function, arguments, [], None, None, lineno=lineno)


class _Generator(jinja2.compiler.CodeGenerator):
    def visit_Template(self, node: Any, frame: Any = None) -> None:
        super().visit_Template(_Ticking().visit(node), frame)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of Jinja, with limits on time and size; `BUDGET` holds those of a rendering."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        """Takes the options of Jinja's environment, but no `finalize`."""
        super().__init__(finalize=lambda value: _budget().take(value), **options)
        del self.globals["lipsum"]
        self.limit_filters()

    def limit_filters(self) -> None:
        """Puts limits on the filters that were added since."""
        for name, function in self.filters.items():
            if not hasattr(function, "is_limited"):
                self.filters[name] = _bounded_filter(name, function)

    def tick(self, num_chars: int) -> None:
        """Counts a turn of a loop."""
        _budget().tick(num_chars)

    def measured(self, value: Any) -> Any:
        """Returns a list, tuple or dict that a template wrote down, unless it is too large."""
        return _budget().take(value)

    def concatenated(self, *values: Any) -> str:
        """Does what `~` does."""
        budget = _budget()
        budget.require(sum(weight(value, budget.value_chars) for value in values))
        return str(budget.take("".join(map(str, values))))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes an operator after a look at how large the result will be."""
        budget = _budget()
        if isinstance(left, int) and isinstance(right, int):
            sizes = int(left).bit_length(), int(right).bit_length()
            bits = sizes[0] * max(right, 0) if operator == "**" else max(sum(sizes), 0)
            if operator in ("*", "**") and bits > _INTEGER_BITS:
                raise TemplateLimitError("it computes with numbers that are too large")
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(many, str | bytes | list | tuple):
                    budget.require(len(many) * times)
        elif operator == "+" and isinstance(left, str | bytes | list | tuple):
            budget.require(len(left) + (len(right) if hasattr(right, "__len__") else 0))
        elif operator == "%" and isinstance(left, str | bytes):
            values = list(right) if isinstance(right, tuple) else [right]
            text = left if isinstance(left, str) else left.decode("latin-1")
            budget.require(_formatted(text, "%", values, budget.value_chars))
        return budget.take(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns the sandbox's `str.format`, which looks at widths first."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        text = getattr(value, "__self__", "")

        def bounded(*args: Any, **options: Any) -> str:
            budget = _budget()
            values = [*args, *options.values()]
            if values and isinstance(values[0], Mapping):
                values += values[0].values()
            budget.require(_formatted(str(text), "{", values, budget.value_chars))
            return inner(*args, **options)

        return bounded

    def call(self, context: Any, obj: Any, /, *args: Any, **options: Any) -> Any:
        """Calls what a template calls, and measures what comes of it."""
        budget = _budget()
        budget.tick()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str | bytes) and name == "join" and args:
            items = list(_counted(args[0]))
            budget.require(_joined(owner, items, budget.value_chars))
            args = (items,)
        elif isinstance(owner, str | bytes | int) and not isinstance(owner, bool):
            _check(name, owner, list(args), options)
        # What this environment's own functions give is measured already.
        result = super().call(context, obj, *args, **options)
        return result if owner is self else budget.take(result)
