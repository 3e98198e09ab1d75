"""The contract as a page for people, docs/api.md: the OpenAPI document in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from deployments.contract import FORM, JSON, REFUSALS, REQUEST_HEADERS, Schema


def markdown(document: Schema) -> str:
    """The document as a page for people."""
    info = document["info"]
    lines = [
        "# The HTTP API",
        "",
        f"{info['title']} {info['version']}. Made by `helios openapi --markdown` from `deployments/contract.py`; a "
        "running service has the same, with its own limits and models, at `/openapi.json`. Programs that use it are in "
        "[clients.md](clients.md).",
        "",
        info["description"],
        "",
        f"Every request may carry an `X-Request-Id`: {REQUEST_HEADERS['X-Request-Id'][1]}. *key*: with "
        "`Authorization: Bearer …`, where the service has keys, and of `/metrics` one for metrics; *link*: with the "
        "query of a video's `share_url`. `HEAD` is a `GET` without the body.",
        "",
        "## Refusals",
        "",
        "Each is an [Error](#error) that names the field, the value and what is allowed.",
        "",
        "| status | meaning and codes | headers |",
        "|---|---|---|",
        *(f"| {status} | {cell(text)} | {names(always)} |" for status, (text, always) in REFUSALS.items()),
    ]
    for path, methods in document["paths"].items():
        for method, told in methods.items():
            if method != "head":
                lines += operation_in_words(path, method, told, "head" in methods)
    lines += ["", "## Shapes"]
    for name, schema in document["components"]["schemas"].items():
        lines += ["", f"### {name}", "", *fields_in_words(schema)]
    return "\n".join(lines) + "\n"


def operation_in_words(path: str, method: str, told: Schema, also_head: bool) -> Iterator[str]:
    needed = [" or ".join(name) for name in told["security"] if name]
    access = f", {' or '.join(needed)}" if needed else ""
    yield from ("", f"## {method.upper()} {path}", "")
    yield f"{told['summary']}. (`{told['operationId']}`{access}{', `HEAD` too' if also_head else ''})"
    if parameters := [own for own in told["parameters"] if own["name"] != "X-Request-Id"]:
        yield from ("", "| parameter | in | form | meaning |", "|---|---|---|---|")
        for own in parameters:
            form = in_words(own["schema"])
            default = f"; default {own['schema']['default']}" if "default" in own["schema"] else ""
            yield f"| `{own['name']}` | {own['in']} | {form} | {cell(own['description'])}{default} |"
    if "requestBody" in told:
        content = told["requestBody"]["content"]
        files = [name for name, own in content[FORM]["schema"]["properties"].items() if own.get("format") == "binary"]
        with_file = "".join(f", in which `{name}` is an image or a video as a file" for name in files)
        yield from ("", f"Body, as JSON or as a form{with_file}:", "")
        yield from fields_in_words(content[JSON]["schema"])
        yield from ("", "```json", compact(content[JSON]["example"]), "```")
    yield from ("", "| status | meaning | body | headers |", "|---|---|---|---|")
    for status, answer in told["responses"].items():
        if int(status) < 400:
            bodies = [
                in_words(content["schema"]) if kind == JSON else f"`{kind}`"
                for kind, content in answer.get("content", {}).items()
            ]
            description = cell(answer["description"])
            yield f"| {status} | {description} | {', '.join(bodies)} | {names(answer['headers'])} |"
    yield from ("", f"Refused with {', '.join(status for status in told['responses'] if int(status) >= 400)}.")


def fields_in_words(schema: Schema) -> Iterator[str]:
    yield from ("| field | form | meaning |", "|---|---|---|")
    required = schema.get("required", ()) if schema.get("additionalProperties") is False else ()
    for name, own in schema["properties"].items():
        meaning = [own["description"]] if "description" in own else []
        meaning += [option["description"] for option in own.get("anyOf", ()) if "description" in option]
        if own.get("default") is not None:
            meaning.append(f"default {compact(own['default'])}")
        if name in required:
            meaning.append("required")
        yield f"| `{name}` | {in_words(own)} | {cell('; '.join(meaning))} |"


def in_words(schema: Schema) -> str:
    """The form of a value, in a few words."""
    match schema:
        case {"$ref": str(name)}:
            name = name.rsplit("/", 1)[1]
            return f"[{name}](#{name.lower()})"
        case {"anyOf": options}:
            return " or ".join(in_words(option) for option in options)
        case {"const": value}:
            return f"`{compact(value)}`"
        case {"enum": values}:
            return ", ".join(f"`{value}`" for value in values)
        case {"type": "array", "items": items, "minItems": least, "maxItems": most} if least == most:
            return f"list of {most}: {in_words(items)}"
        case {"type": "array", "items": items, "maxItems": most}:
            return f"list of at most {most}: {in_words(items)}"
        case {"type": "array", "items": items}:
            return f"list: {in_words(items)}"
        case {"type": "object", "properties": inner}:
            return "{" + ", ".join(f"`{name}`" for name in inner) + "}"
        case {"type": "object"}:
            return "object"
        case {"type": "string", "maxLength": most}:
            return f"text of at most {most} bytes"
        case {"type": "string", "pattern": pattern}:
            return f"text `{cell(pattern)}`"
        case {"type": "string"}:
            return "text"
        case {"type": "integer"}:
            return f"whole number{range_in_words(schema)}"
        case {"type": "number"}:
            return f"number{range_in_words(schema)}"
        case {"type": kind}:
            return str(kind)
    return "any"


def range_in_words(schema: Schema) -> str:
    match schema:
        case {"exclusiveMinimum": least, "maximum": most}:
            return f" above {least}, to {most:g}"
        case {"minimum": least, "exclusiveMaximum": most}:
            return f" from {least}, below {most:g}"
        case {"minimum": least, "maximum": most}:
            return f" {least} to {most if isinstance(most, int) else format(most, 'g')}"
    return ""


def names(headers: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in headers if name != "X-Request-Id")


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
